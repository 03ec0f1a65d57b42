"""zfs: datasets, volumes, snapshots and streams of one host.

Tried with OpenZFS 2.1.11 (Debian 12); recordings of it are in tests/recordings/zfs-2.1.11.

* :mod:`names`: what is given to the command; checked, because a comma or ``%`` in a snapshot's name means several.
* :mod:`errors`: why a command was refused, as :class:`errors.Reason`; the exit status is 1 for every reason, 2 for
  a wrong command line.
* :mod:`properties`: reading one dataset or many, with the source of each user property.
* :mod:`datasets`, :mod:`snapshots`: making, changing, destroying.
* :mod:`streams`: argv of ``send`` and ``receive`` for pipes (bytes never pass through Python), estimates, tokens.

All sizes are bytes. Nothing here is recursive or forced unless its name or an argument says so.
"""
