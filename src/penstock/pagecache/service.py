"""Which service a command is: what determines the order of its reads, hashed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

# Variables that change which worker reads what. CUDA_VISIBLE_DEVICES counts by how many, not by which.
_PARALLELISM = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "NNODES", "NODE_RANK")
_DEVICES = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ASCEND_RT_VISIBLE_DEVICES",
)
_INTERPRETERS = ("python", "pypy", "torchrun")


def service_id(command: Sequence[str], roots: Sequence[Path], environment: Mapping[str, str], directory: str) -> str:
    """A name for the service, readable at its head: ``serve-llama-3b-1f0c2a9d4e6b``.

    Hashed are the command with the model's path reduced to its last part, so that nodes which keep the model
    elsewhere agree; a script's path below the working directory; and the parallelism asked for in the
    environment. Left out are contents: a model whose files changed is the same service with a stale template.
    """
    words = [os.path.basename(command[0])]
    words += [_without_roots(argument, roots, directory) for argument in command[1:]]
    words += [f"{name}={environment[name]}" for name in _PARALLELISM if name in environment]
    words += [f"{name}#{len(environment[name].split(','))}" for name in _DEVICES if name in environment]
    text = "\0".join(words).encode("utf-8", "surrogatepass")  # a file's name need not be text
    digest = hashlib.blake2b(text, digest_size=6).hexdigest()
    head = [_stem(command)] + [root.name for root in roots[:1]]
    return "-".join([*head, digest])


def _without_roots(argument: str, roots: Sequence[Path], directory: str) -> str:
    flag, equals, value = argument.partition("=")
    for text, prefix in ((argument, ""), (value, flag + equals)):
        if text and len(text) <= 4096:
            path = Path(os.path.abspath(os.path.join(directory, text)))
            for root in roots:
                if path.is_relative_to(root):
                    return f"{prefix}{{model}}/{root.name}/{path.relative_to(root).as_posix()}"
    return argument


def _stem(command: Sequence[str]) -> str:
    """The script or module where an interpreter runs one, else the program."""
    program = os.path.basename(command[0])
    for word in command[1:4]:
        if word.endswith(".py"):
            return Path(word).stem
    if program.startswith(_INTERPRETERS) and "-m" in command[1:-1]:  # to llama.cpp, -m is the model
        return command[command.index("-m") + 1]
    return program
