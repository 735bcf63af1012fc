"""A reader that read()s every shard from its start to its end, 1 MiB a call, into one buffer."""

from __future__ import annotations

import numpy as np

from bench.page_cache.clients.staging import Tally, parse_options, weight_files

READ_BYTES = 1 << 20


def main() -> None:
    """Load, count, report."""
    options = parse_options(__doc__ or "")
    tally = Tally(options.verify)
    buffer = np.zeros(READ_BYTES, np.uint8)
    with tally.phase("load"):
        for path in weight_files(options.path, reverse=options.reverse) * options.passes:
            with path.open("rb", buffering=0) as file:
                size_bytes = path.stat().st_size
                starts = range(0, size_bytes, READ_BYTES)
                for start in reversed(starts) if options.reverse else starts:
                    if options.reverse:
                        file.seek(start)
                    wanted = min(READ_BYTES, size_bytes - start)
                    got = 0
                    while got < wanted:
                        count = file.readinto(buffer[got:wanted])
                        if not count:
                            raise EOFError(f"{path}: {wanted - got} bytes are missing at {start + got}")
                        got += count
                    # in reverse a file's CRC would need its blocks in order, so each block is a piece there
                    piece = f"{path.name}@{start}" if options.reverse else path.name
                    tally.add(piece, buffer[:wanted])
    tally.report()


if __name__ == "__main__":
    main()
