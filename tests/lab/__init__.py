"""The lab: virtual machines with a real kernel, ZFS, iSCSI and device-mapper, in which the project's own code runs.

``build*.py`` make what guests boot from, ``network.py``, ``guest.py`` and ``lab.py`` run them, ``inside/`` is what runs
in them. ``admin/lab`` is the command; tests get the fixture ``lab``.
"""
