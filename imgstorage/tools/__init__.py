"""One module per external tool: argv builders, parsers, verbs. All of them run through ``run.py``."""
