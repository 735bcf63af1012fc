"""One module for each kernel interface: typed, thin, without policy."""
