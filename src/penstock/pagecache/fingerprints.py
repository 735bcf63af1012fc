"""Fingerprints remembered on this node, so that an unchanged file is not sampled again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from penstock.linux.wholefile import WholeFile
from penstock.pagecache.base import ModelFile
from penstock.pagecache.template import fingerprint

_SETTLED_NS = 100_000_000  # dates of files step by a tick of the kernel, 10 ms at most


class FingerprintCache:
    """Fingerprints by device, inode, size, mtime and ctime: a file for which all are the same is unchanged.

    Losing the cache costs 17 small reads a file; so nothing that goes wrong with it is an error.

    Args:
        directory: one small file for each model file is kept there.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(self, file: ModelFile) -> str:
        """The fingerprint of a file.

        Raises:
            OSError: it cannot be read.
        """
        status = os.stat(file.path)
        key = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        entry = self._directory / hashlib.blake2b(os.fsencode(file.path), digest_size=12).hexdigest()
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(entry.read_text(encoding="utf-8"))
            if known["key"] == key:
                return str(known["fingerprint"])
        found = fingerprint(file.path, status.st_size)
        if time.time_ns() - status.st_ctime_ns < _SETTLED_NS:
            return found  # another change may yet get the same date
        with contextlib.suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            with WholeFile(entry, 0o644) as kept:
                kept.write(json.dumps({"path": file.path, "key": key, "fingerprint": found}).encode())
                kept.commit(is_durable=False)
        return found
