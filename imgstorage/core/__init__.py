"""What the project knows, without any I/O: names, the state machine, messages and protocols."""
