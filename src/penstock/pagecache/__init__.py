"""The programmable page cache: policies decide, the runtime carries out what the machine allows."""
