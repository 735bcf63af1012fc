"""KV caches larger than memory, partly in memory that the kernel may take back."""
