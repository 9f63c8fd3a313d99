"""The edge server: the deeper blocks once, and for each device an adapter with its optimiser."""
