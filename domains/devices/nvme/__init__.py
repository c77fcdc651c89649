"""The NVMe controller as a process."""
