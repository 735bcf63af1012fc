"""Benchmarks: each a package that is run with ``python -m bench.NAME``."""
