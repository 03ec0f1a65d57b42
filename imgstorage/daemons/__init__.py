"""The three daemons: processes that wire engine, plane, store and bus together. Nothing else does."""
