"""The userspace data plane: sparse files, tgt and qemu-storage-daemon. It needs no kernel module and no root.

Modules shared by the NAS side and the container side: ``files`` (durable files), ``digest`` (comparing what
came back), ``names`` (initiator and target names).
"""
