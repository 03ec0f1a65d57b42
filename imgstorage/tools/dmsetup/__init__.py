"""dmsetup: device-mapper devices of this host.

Tried with libdevmapper 1.02.185 (Debian 12) and Linux 6.1; recordings of it are in tests/recordings/dmsetup-1.02.185.

* :mod:`tables`: what a device is made of, and how a snapshot is doing: lines of tables and of status (pure).
* :mod:`commands`: argv and what they print (pure).
* :mod:`devices`: making, switching, removing.
* :mod:`sysfs`: what is there, without a command.

Tables and status lines: dmsetup(8), and admin-guide/device-mapper of the kernel. Sectors have 512 bytes.
"""
