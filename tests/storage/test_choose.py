"""penstock.storage.choose: where io_uring is refused, threads do it, and it is said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from penstock.linux import uring
from penstock.storage.choose import create_engine

# Refuses io_uring_setup by a seccomp filter, as container engines do, and tells what comes of it.
CODE = """
import ctypes, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
error = int(sys.argv[1])
instructions = [
    (0x20, 0, 0, 0),  # load the system call's number
    (0x15, 0, 1, 425),  # io_uring_setup?
    (0x06, 0, 0, 0x00050000 | error),  # return that errno
    (0x06, 0, 0, 0x7FFF0000),  # allow
]
program = b"".join(struct.pack("<HBBI", *instruction) for instruction in instructions)
text = ctypes.create_string_buffer(program)
filter = struct.pack("<HxxxxxxQ", len(instructions), ctypes.addressof(text))
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.c_char_p(filter), 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP
from penstock.errors import UnsupportedError
from penstock.storage.choose import create_engine
engine, reason = create_engine()
print(engine.name, "|", reason)
try:
    create_engine("uring")
except UnsupportedError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (1, "not permitted: a seccomp filter refuses it, as those of container engines do"),
        (38, "this kernel has none, or a seccomp filter hides it"),
    ],
)
def test_refused_by_a_seccomp_filter(error: int, reason: str) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, str(error)], capture_output=True, text=True, check=True)
    setting = Path("/proc/sys/kernel/io_uring_disabled")
    if error == 1 and setting.exists() and setting.read_text().strip() != "0":  # the reason before that one
        reason = f"not permitted: kernel.io_uring_disabled is {setting.read_text().strip()}"
    lines = done.stdout.splitlines()
    assert lines == [f"threads | io_uring: {reason}", f"io_uring: {reason}"]


@pytest.mark.skipif(bool(uring.probe()), reason=f"needs io_uring: {uring.probe()}")
def test_the_best_there_is() -> None:
    engine, reason = create_engine()
    with engine:
        assert (engine.name, reason) == ("uring", "")


def test_by_name() -> None:
    engine, reason = create_engine("threads")
    with engine:
        assert (engine.name, reason) == ("threads", "")
    with pytest.raises(ValueError, match="choose one of auto, uring, threads"):
        create_engine("libaio")  # type: ignore[arg-type]
