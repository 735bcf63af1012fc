"""KV caches larger than memory, over the page cache and past it."""
