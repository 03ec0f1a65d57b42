"""The command line: ``imgstorage``, and ``rocks`` where no other is installed.

``verbs.py`` says what there is to type, ``grammar.py`` reads it, one module per noun answers it, ``errors.py`` says
what went wrong. ``docs/commands.md`` and the man page are made from the same data.
"""
