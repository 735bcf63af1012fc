"""How fast an unmodified program loads its model with penstock and without: ``python -m bench.page_cache``.

What is measured is the wall time of a whole command, from spawn to exit, seen from outside. The arms are run in
turn, round by round, each round beginning with another arm; ratios are taken within a round and the median of
these is what counts. The limit L is measured between the rounds of the same run: a load cannot end before the
program is through with a model that is in memory already, nor before the disk has delivered the bytes (to direct reads
into huge pages: docs/decisions/0009). Beside each ratio of cold runs stands what L alone would give.

**The state of memory is part of the method.** By default memory is kept as on a server that has been up for a while:
full of old, clean page cache, the pages of a sparse file, whose holes are read as zeros without any I/O. A model is
made cold by swapping it against this ballast in small steps, and a thread drops ballast as a run takes memory, so that
no run waits for reclaim. A virtual machine that hands freed memory back to its host would otherwise pay for touching it
again, 3 to 9 microseconds a 4 KiB page, in every cold arm and by chance (docs/decisions/0008). With ``--no-ballast``
memory is free, as after a boot: what a run before left in the page cache is dropped and given two seconds.

The libraries that a client and penstock import are cached in every arm: each run is preceded by one that only imports.

How much of the model is resident is verified before every run; a cold run with more than 1 % fails. Every arm
starts from the same state.

**The memory limit** is a cgroup, made for each run and removed after it, with the command inside it from its
first instruction, penstock included. A run that sees an OOM kill fails.

**The bytes** are verified: in a round of its own, which is not timed, by a CRC of every tensor (or file, where a
client reads files) against what an independent reader got with O_DIRECT, past the page cache; in every timed run
by a sum of one word of each page, which costs next to nothing.

**The read-ahead** of the disk is set for each run and restored at the end, also after SIGTERM and Ctrl-C.
"""
