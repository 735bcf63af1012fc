"""One run of one arm, in a process of its own: ``python -m bench.kv.replay ARM DIRECTORY WORKLOAD [LIMIT CHANGES]``.

The workload is JSON. LIMIT is the file of the cgroup's limit, and CHANGES what to write there before which step.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

from bench.kv.arms import make_arm
from bench.kv.workload import Baseline, Workload
from bench.readahead import block_device
from penstock.linux.process import memory_bytes

_SECTOR_BYTES = 512
_REST_BYTES_PER_S = 1.5e9  # a rented disk that has just been written to is slower for a while


def main() -> None:
    """Prefill, decode, compare; prints what it took as JSON."""
    name, place, shape, *rest = sys.argv[1:]
    changes = {int(step): limit_bytes for step, limit_bytes in json.loads(rest[1]).items()} if rest else {}
    directory = Path(place)
    workload = Workload(**json.loads(shape))
    own_bytes = Baseline(workload).anon_bytes()
    arm = make_arm(name, workload, directory)
    arm.use_space()
    time.sleep(workload.kv_bytes / _REST_BYTES_PER_S)
    begin = time.perf_counter()
    arm.prefill()
    prefill_s = time.perf_counter() - begin
    os.sync()
    steps_s, read_bytes = [], []
    for step in range(workload.steps - 1):
        before_bytes = _device_read_bytes(directory)
        if step in changes:
            Path(rest[0]).write_text(str(changes[step]))
        begin = time.perf_counter()
        tokens = workload.prompt + step
        arm.step(tokens)
        steps_s.append(time.perf_counter() - begin)
        read_bytes.append(_device_read_bytes(directory) - before_bytes)
    copied_bytes = sum(range(workload.prompt, tokens + 1)) * 2 * workload.layers * workload.row_bytes
    assert arm.device.copied_bytes >= copied_bytes
    arm.compare(workload.prompt + workload.steps - 1)
    figures = arm.figures()
    arm.close()
    use = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "prefill_s": prefill_s,
                "steps_s": steps_s,
                "read_bytes": read_bytes,
                "cpu_s": use.ru_utime + use.ru_stime,
                "own_bytes": own_bytes,
                "peak_rss_bytes": memory_bytes(os.getpid())["VmHWM"],
                "figures": figures,
            }
        )
    )


def _device_read_bytes(directory: Path) -> int:
    return int((block_device(directory) / "stat").read_text().split()[2]) * _SECTOR_BYTES


if __name__ == "__main__":
    main()
