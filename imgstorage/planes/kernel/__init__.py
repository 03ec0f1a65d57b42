"""The kernel data plane: zvols, iSCSI targets and sessions, device-mapper. See docs/design/kernel-plane.md."""
