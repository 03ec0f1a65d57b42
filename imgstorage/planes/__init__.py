"""The data planes: how volumes, exports, overlays and copies are done on a kind of host."""
