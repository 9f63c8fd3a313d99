"""Where each megabyte goes: a device half profiled in this process, or any running process from outside."""
