"""A whole cluster in one process: the real engines and databases, everything else in memory and from a seed."""
