"""The demonstration: the main job in both modes on a real disk image, in a sandbox of its own, through the commands."""
