"""Tensor parallelism of two: a launcher, and two workers that each map every shard and copy half of every tensor.

Worker 0 takes the first half of each matrix's rows, worker 1 the rest; both take the vectors. So the two read
slices that interleave through the files. Each has a ring of half the size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

WORKERS = 2


def _work(rank: int) -> None:
    from bench.page_cache.clients.staging import (
        Ring,
        Tally,
        map_file,
        parse_options,
        safetensors_index,
        weight_files,
    )

    options = parse_options(__doc__ or "")
    tally = Tally(options.verify)
    with tally.phase("ring"):
        ring = Ring(options.ring_bytes // WORKERS)
    with tally.phase("load"):
        for path in weight_files(options.path, reverse=options.reverse):
            file = map_file(path)
            tensors = safetensors_index(file)
            for tensor in reversed(tensors) if options.reverse else tensors:
                start, stop = tensor.start, tensor.stop
                if tensor.rows is not None:
                    row_bytes = (stop - start) // tensor.rows
                    stop = start + (rank + 1) * tensor.rows // WORKERS * row_bytes
                    start += rank * tensor.rows // WORKERS * row_bytes
                ring.copy(tally, f"{tensor.name}@{rank}", file[start:stop])
            del file
    tally.report()


def _launch() -> int:
    command = [sys.executable, "-m", "bench.page_cache.clients.tp2", *sys.argv[1:]]
    workers = []
    for rank in range(WORKERS):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(WORKERS),
            "CUDA_VISIBLE_DEVICES": str(rank),
        }
        workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [worker.communicate()[0] for worker in workers]
    status = max(abs(worker.returncode) for worker in workers)
    if status:
        return status
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    print(
        json.dumps(
            {
                "bytes": sum(result["bytes"] for result in results),
                "samples": sum(result["samples"] for result in results) % (1 << 64),
                "pieces": {name: crc for result in results for name, crc in result["pieces"].items()},
                "phases": {name: max(result["phases"][name] for result in results) for name in results[0]["phases"]},
            }
        )
    )
    return 0


def main() -> None:
    """Launch the workers, or be one."""
    if "LOCAL_RANK" in os.environ:
        _work(int(os.environ["LOCAL_RANK"]))
    else:
        sys.exit(_launch())


if __name__ == "__main__":
    main()
