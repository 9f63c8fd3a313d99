"""The command line: `sfl`."""
