"""The kernel data plane: zvols, iSCSI, device-mapper, and copies by ``zfs send`` and ``zfs receive``."""
