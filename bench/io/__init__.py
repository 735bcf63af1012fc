"""How fast penstock's engines move bytes, beside fio and a plain loop: ``python -m bench.io``.

Shapes are random 4 KiB with 64 in flight, 128 KiB with 32, 1 MiB with 16 and 4 MiB with 8, each read and written,
direct, in one file whose pages of 4 KiB each hold their own number, in every sector. Arms:

- ``fio``: io_uring with registered files and buffers, one process: the limit that C reaches.
- ``uring``, ``threads``: penstock's engines, made so that the device has no more than that depth (threads: 16 at most).
  Three times as many requests wait in the engine, which fio has not; as many as the depth are taken from the
  completions and submitted anew at a time. Buffers are huge pages, and fio's are not.
- ``plain``: one thread, one ``preadv`` or ``pwritev`` after another.

The arms take turns in every round, and figures are medians over rounds; ratios are medians of the ratios within
rounds. What is read is compared with the numbers it must hold: in each arm all blocks of the last requests, and once
before, over the whole file. What is written while it is timed is what the memory holds; in another run of each arm
it is what belongs there, and the file is read back through the page cache. CPU seconds are the process's own,
user and system; what a kernel thread does for it is in neither arm's.
"""
