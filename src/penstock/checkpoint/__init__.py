"""Model files: what is in them, and getting it into memory past the page cache."""
