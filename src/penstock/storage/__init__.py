"""Engines that move bytes between storage and memory, and what the storage can do."""
