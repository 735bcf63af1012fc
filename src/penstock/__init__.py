"""penstock: a programmable page cache for programs nobody may change."""

__version__ = "0.1.0"
