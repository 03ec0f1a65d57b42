"""Measurements of the kernel plane in the lab: ``admin/lab bench``; docs/bench.md says how to read them."""
