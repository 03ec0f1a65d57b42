"""Everything on one machine: a private broker (broker.py) and the daemons around it."""
