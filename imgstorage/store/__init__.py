"""The daemons' databases: SQLite through sqlite-utils, one file and one connection per daemon."""
