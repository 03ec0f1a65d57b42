"""What the daemons do: journal, steps, reconcile, message handling.

Clock, randomness, records, post, tasks and plane all come from outside (``core/ports.py``, ``core/post.py``,
``core/records.py``), so that one process can run a whole cluster, with faults, from a seed.
"""
