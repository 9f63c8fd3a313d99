"""All daemons as local processes: planned, started, watched, and stopped together."""
