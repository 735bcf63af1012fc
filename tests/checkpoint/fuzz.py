"""A fuzzer of the header parsers: ``python tests/checkpoint/fuzz.py [SECONDS]``, 600 by default.

Changes the files of corpus/ at random, and has them parsed. What comes of it must be a header or a CheckpointError (for
GGUF also an UnsupportedError), within a second and without memory beyond the file's size; a safetensors header that is
taken must be one that the safetensors library takes. What breaks that is written to corpus/ under its hash, and found
by the test of the corpus from then on.
"""

from __future__ import annotations

import hashlib
import random
import struct
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import gguf.constants  # noqa: F401 (imported at its first use else, for a second)
import safetensors

from penstock.checkpoint import gguf as ours_gguf
from penstock.checkpoint import safetensors as ours_safetensors
from penstock.errors import CheckpointError, UnsupportedError

CORPUS = Path(__file__).parent / "corpus"
WORDS = [0, 1, 7, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
TOKENS = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"1e9", b"null", b"true", b'"x":', b"\\u0000", b"\xff", b" "]
MOST_S = 1.0
MOST_BYTES = 8 << 20  # beside the file: parsers make objects of what they read


def complaint(path: Path) -> str:
    """What is wrong with what the parser makes of the file; "" if nothing."""
    contents = path.read_bytes()
    parse = ours_gguf.read_header if path.suffix == ".gguf" else ours_safetensors.read_header
    tracemalloc.start()
    begun_s = time.monotonic()
    taken = True
    try:
        header = parse(path)
        for tensor in header.tensors:
            if not header.data_start <= tensor.start <= tensor.stop <= len(contents):
                return f"tensor {tensor.name!r} lies outside the file"
    except CheckpointError:
        taken = False
    except UnsupportedError:
        taken = False
        if path.suffix != ".gguf":
            return "UnsupportedError"
    except Exception as error:  # noqa: BLE001 (that is what is looked for)
        return f"{type(error).__name__}: {error}"
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if time.monotonic() - begun_s > MOST_S:
        return "took too long"
    if peak_bytes > 40 * len(contents) + MOST_BYTES:
        return f"took {peak_bytes} bytes of memory for a file of {len(contents)}"
    if taken and path.suffix != ".gguf":
        try:
            safetensors.deserialize(contents)
        except safetensors.SafetensorError as error:
            return f"taken, which the safetensors library refuses: {error}"
    return ""


def changed(contents: bytes, others: list[bytes], source: random.Random) -> bytes:
    """The contents with a few random changes."""
    data = bytearray(contents)
    for _ in range(source.choice([1, 1, 1, 2, 3, 8])):
        at = source.randrange(len(data) + 1)
        match source.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << source.randrange(8)
            case 1:
                data[at : at + 8] = struct.pack("<Q", source.choice(WORDS))
            case 2:
                data[at : at + 4] = struct.pack("<I", source.choice(WORDS) & 0xFFFFFFFF)
            case 3:
                del data[at : at + source.choice([1, 2, 8, 100])]
            case 4:
                data[at:at] = source.choice(TOKENS)
            case 5:
                data[at:at] = data[at : at + source.choice([1, 8, 50])]
            case 6:
                other = source.choice(others)
                start = source.randrange(len(other) + 1)
                data[at:at] = other[start : start + source.choice([4, 30, 200])]
            case 7 if len(data) > 8:  # the length of a safetensors header, right again after other changes
                data[:8] = struct.pack("<Q", max(0, len(data) - 8 - source.choice([0, 8, 35, 100])))
    return bytes(data)


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 600.0
    seed = random.SystemRandom().randrange(1 << 32)
    source = random.Random(seed)
    seeds = {path: path.read_bytes() for path in sorted(CORPUS.iterdir())}
    found = tried = 0
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as scratch:
        while time.monotonic() < until:
            path, contents = source.choice(list(seeds.items()))
            case = Path(scratch) / f"case{path.suffix}"
            case.write_bytes(changed(contents, list(seeds.values()), source))
            tried += 1
            if what := complaint(case):
                found += 1
                kept = CORPUS / f"{hashlib.sha256(case.read_bytes()).hexdigest()[:16]}{path.suffix}"
                kept.write_bytes(case.read_bytes())
                print(f"{kept}: {what}")
    print(f"{tried} files in {seconds:.0f} s (seed {seed}): {found} complaints")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
