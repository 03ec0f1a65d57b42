"""The userspace data plane: sparse files, tgt and qemu-storage-daemon. It needs no kernel module and no root."""
