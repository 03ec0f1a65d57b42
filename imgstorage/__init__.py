"""Img-Storage: virtual machine disks from a NAS, used at local-disk speed."""

__version__ = "0.1.0"
