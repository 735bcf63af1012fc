"""Power cuts: a machine that saves sessions and templates and writes blocks is killed, and its disk is looked at here.

``python -m rig.powercut DIRECTORY ACKNOWLEDGED`` is what runs in the machine. Each round writes one generation of
everything; what has come back from the call is told through the other file, which does not go through the disk.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.errors import PenstockError
from penstock.kv.session import SessionReader, SessionWriter, session_path
from penstock.pagecache.base import Range
from penstock.pagecache.template import FileIdentity, Template, TemplateStore
from penstock.storage.base import WRITE, batch
from penstock.storage.buffers import huge_buffer
from penstock.storage.region import DATA_START, Region
from penstock.storage.threads import ThreadEngine
from penstock.units import KiB, MiB

OWNER = "penstock rig"
_NAME, _SERVICE = "context", "service"
_PART_BYTES = 300 * KiB + 11
_BLOCKS, _BLOCK_BYTES = 24, 64 * KiB


def noise(count: int, *seed: int) -> NDArray[np.uint8]:
    """So many bytes, the same for the same seed, [bytes]; numpy's own takes half a second to import there."""
    text = hashlib.shake_128(repr(seed).encode()).digest(count)
    return np.frombuffer(bytearray(text), np.uint8)


def part_of(generation: int, which: int) -> NDArray[np.uint8]:
    """A part of the session of that generation, [bytes]."""
    return noise(_PART_BYTES + generation % 7, generation, which)


def block_of(generation: int, number: int) -> NDArray[np.uint8]:
    """A block that says what it is, with a checksum of the rest at its end, [bytes]."""
    block = noise(_BLOCK_BYTES, generation, number, 1)
    block[:16] = np.array([generation, number], "<u8").view(np.uint8)
    block[-8:] = np.array([xxhash.xxh3_64_intdigest(block[:-8].data)], "<u8").view(np.uint8)
    return block


def template_of(generation: int) -> Template:
    """The template of that generation."""
    files = (FileIdentity("model.safetensors", 1 << 30, f"{generation:032x}"),)
    ranges = tuple(Range("model.safetensors", n * 8 * MiB, n * 8 * MiB + 4096 * generation) for n in range(100))
    return Template(_SERVICE, files, (ranges,), (), str(generation))


def work(directory: Path, acknowledged: Path) -> None:
    """Write one generation after another until the power goes."""
    with acknowledged.open("a", buffering=1) as told, ThreadEngine() as engine:
        buffer = np.frombuffer(huge_buffer(_BLOCKS * _BLOCK_BYTES), np.uint8)
        where = engine.add_buffer(buffer)
        region = Region.create(directory / "region", _BLOCKS * _BLOCK_BYTES // 2, owner=OWNER)
        told.write("region 0\n")
        file = engine.add_file(region.fd)
        store = TemplateStore(directory / "templates")
        for generation in range(1, 1_000_000):
            with SessionWriter(session_path(directory, _NAME), {"generation": generation}) as writer:
                for which in range(2):
                    writer.add(str(which), part_of(generation, which), {})
                writer.commit()
            told.write(f"session {generation}\n")
            store.save(template_of(generation))
            told.write(f"template {generation}\n")
            if generation == 2:
                region.grow(_BLOCKS * _BLOCK_BYTES)
            numbers = np.arange(region.size_bytes // _BLOCK_BYTES)
            for number in numbers.tolist():
                buffer[number * _BLOCK_BYTES : (number + 1) * _BLOCK_BYTES] = block_of(generation, number)
            at = numbers * _BLOCK_BYTES
            engine.submit(
                batch(WRITE, file=file, offset=DATA_START + at, length=_BLOCK_BYTES, buffer=where, buffer_offset=at)
            )
            done = engine.wait(len(numbers))
            if (done["result"] != _BLOCK_BYTES).any():
                raise OSError(f"blocks were not written: {done['result'].tolist()}")
            os.fdatasync(region.fd)
            told.write(f"blocks {generation}\n")


@dataclass(slots=True)
class Findings:
    """What was found on a disk.

    Attributes:
        wrong: what must not be, in words.
        session: its generation; 0 where there is none.
        template: the same of the template.
        torn: blocks whose checksum says that they are not whole.
    """

    wrong: list[str] = field(default_factory=list)
    session: int = 0
    template: int = 0
    torn: int = 0


def check(directory: Path, acknowledged: dict[str, int]) -> Findings:
    """Read everything back as its owner would.

    Args:
        directory: where it was written.
        acknowledged: of each kind, the last generation that was told; what came back may not be older.
    """
    found = Findings()
    _check_session(directory, acknowledged.get("session", 0), found)
    _check_template(directory, found)
    _check_region(directory, acknowledged, found)
    return found


def _check_session(directory: Path, least: int, found: Findings) -> None:
    try:
        with SessionReader(session_path(directory, _NAME)) as reader:
            found.session = int(reader.facts["generation"])
            for which in range(2):
                if not np.array_equal(reader.read(str(which)), part_of(found.session, which)):
                    found.wrong.append(f"session {found.session}: part {which} was served with other bytes")
    except FileNotFoundError:
        pass
    except PenstockError as error:
        found.wrong.append(f"the session cannot be read: {error}")
    if found.session < least:
        found.wrong.append(f"session {least} was acknowledged, and {found.session} came back")


def _check_template(directory: Path, found: Findings) -> None:
    try:
        template = TemplateStore(directory / "templates").load(_SERVICE)
    except PenstockError as error:
        found.wrong.append(f"the template cannot be read: {error}")
        return
    if template is not None:
        found.template = int(template.recorded_at)
        if template != template_of(found.template):
            found.wrong.append(f"template {found.template} came back with other contents")


def _check_region(directory: Path, acknowledged: dict[str, int], found: Findings) -> None:
    path = directory / "region"
    if not path.exists():
        if "region" in acknowledged:
            found.wrong.append("the region was made, and is not there")
        return
    try:
        region = Region.open(path, owner=OWNER)
    except PenstockError as error:
        found.wrong.append(f"the region cannot be opened: {error}")
        return
    least = acknowledged.get("blocks", 0)
    with region:
        if least >= 2 and region.size_bytes < _BLOCKS * _BLOCK_BYTES:
            found.wrong.append(f"the region had grown, and has {region.size_bytes} bytes")
        memory = huge_buffer(_BLOCK_BYTES)
        block = np.frombuffer(memory, np.uint8)
        for number in range(region.size_bytes // _BLOCK_BYTES):
            got = os.preadv(region.fd, [memory], DATA_START + number * _BLOCK_BYTES)
            generation, named = block[:16].view("<u8").tolist()
            is_whole = got == _BLOCK_BYTES and xxhash.xxh3_64_intdigest(block[:-8].data) == block[-8:].view("<u8")[0]
            if not is_whole:  # its checksum says so: not served
                found.torn += bool(block.any())
                if not block.any() and least > (number >= _BLOCKS // 2):  # the second half came with generation 2
                    found.wrong.append(f"block {number} was flushed, and is empty")
            elif named != number or not np.array_equal(block, block_of(generation, number)):
                found.wrong.append(f"block {number}: the checksum holds for what was never written")
            elif generation < least:
                found.wrong.append(f"block {number}: generation {least} was flushed, and {generation} came back")


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]))
