"""The programs that are measured: each is a process of its own that knows nothing of penstock.

A client loads the model at a path and ends with one line of JSON on stdout: the seconds of its phases, the bytes
it read, a checksum of samples, and with ``--verify`` a CRC of every piece.
"""
