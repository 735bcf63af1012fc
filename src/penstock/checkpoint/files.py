"""A checkpoint on disk: a safetensors or GGUF file, or several with or without an index."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from penstock.checkpoint import gguf, safetensors
from penstock.checkpoint.base import Header, TensorInfo, collection_paused, open_regular
from penstock.errors import CheckpointError

INDEX_SUFFIX = ".safetensors.index.json"
_LARGEST_INDEX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The headers of all files.

    Attributes:
        path: as it was asked for.
        headers: by file, in the order in which the files are named.
        tensors: of all files, by name; those that the index does not name as well.
        index: the file that says which tensor lies in which shard; None where there is none.
    """

    path: Path
    headers: tuple[Header, ...]
    tensors: Mapping[str, TensorInfo]
    index: Path | None

    @property
    def size_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        path: a safetensors or GGUF file, an index, or a directory. A directory with several safetensors files and no
            index is all of them; one with none is all of its GGUF files.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or its shards and its index differ.
        OSError: it cannot be read.
    """
    with collection_paused():
        return _open(Path(path))


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        index, files = files_in(path)
    elif path.name.endswith(INDEX_SUFFIX):
        index, files = path, []
    else:
        index, files = None, [path]
    located: dict[str, str] | None = None
    if index is not None:
        located = read_index(index)
        for problem in differences(index, located, {}):
            raise CheckpointError(problem)
        files = [index.parent / name for name in sorted(set(located.values()))]
    headers = tuple(read_header(file) for file in files)
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for tensor in header.tensors:
            twin = tensors.setdefault(tensor.name, tensor)
            if twin is not tensor:
                raise CheckpointError(f"{tensor.path}: tensor {tensor.name!r} is in {twin.path} as well")
    if index is not None and located is not None:
        names = {Path(header.file.path): {tensor.name for tensor in header.tensors} for header in headers}
        for problem in differences(index, located, names):
            raise CheckpointError(problem)
    return Checkpoint(path, headers, tensors, index)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Parse the header of a file of either format, as its name says, or else its first bytes.

    Raises:
        CheckpointError: it breaks a rule of its format.
        UnsupportedError: a GGUF file, and the gguf package is not installed.
        OSError: it cannot be read.
    """
    name = os.fspath(path)
    is_gguf = name.endswith(".gguf")
    if not is_gguf and not name.endswith(".safetensors"):
        fd = open_regular(name)
        try:
            is_gguf = os.pread(fd, len(gguf.MAGIC), 0) == gguf.MAGIC
        finally:
            os.close(fd)
    return gguf.read_header(name) if is_gguf else safetensors.read_header(name)


def files_in(path: Path) -> tuple[Path | None, list[Path]]:
    """The index that counts in a directory, or the files where there is none.

    Raises:
        CheckpointError: there are several indices, or no checkpoint.
    """
    names = sorted(entry.name for entry in path.iterdir())
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if f"model{INDEX_SUFFIX}" in indices:
        indices = [f"model{INDEX_SUFFIX}"]
    if len(indices) > 1:
        raise CheckpointError(f"{path}: has several indices, {', '.join(indices)}: name the one to be used")
    files = [path / name for name in names if name.endswith(".safetensors")]
    if indices:
        return path / indices[0], []
    if path / "model.safetensors" in files:
        return None, [path / "model.safetensors"]
    files = files or [path / name for name in names if name.endswith(".gguf")]
    if not files:
        raise CheckpointError(f"{path}: neither a *.safetensors nor a *.gguf file is there")
    return None, files


def read_index(path: Path) -> dict[str, str]:
    """Which file each tensor lies in.

    Raises:
        CheckpointError: it is no index, or names files outside its directory.
    """
    fd = open_regular(path)
    with open(fd, "rb") as file:
        data = file.read(_LARGEST_INDEX_BYTES + 1)
    if len(data) > _LARGEST_INDEX_BYTES:
        raise CheckpointError(f"{path}: an index of more than {_LARGEST_INDEX_BYTES} bytes is none")
    try:
        content = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    located = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(located, dict) or not all(isinstance(name, str) for name in located.values()):
        raise CheckpointError(f"{path}: has no weight_map of tensors to files")
    for name in set(located.values()):
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\0" in name or not parts.parts:
            raise CheckpointError(f"{path}: names {name!r}, which is not a file below it")
    return located


def differences(index: Path, located: Mapping[str, str], names: Mapping[Path, Collection[str]]) -> Iterator[str]:
    """What an index says that is not so: files and tensors that are elsewhere or nowhere.

    Args:
        located: of `read_index`.
        names: of the tensors in each file, of those files that are whole.
    """
    shards = {name: index.parent / name for name in sorted(set(located.values()))}
    for name, shard in shards.items():
        if not shard.exists():
            yield f"{index}: names {name}, which is not there"
    for name, shard_name in located.items():
        shard = shards[shard_name]
        if shard in names and name not in names[shard]:
            elsewhere = next((str(file) for file in names if name in names[file]), "no file")
            yield f"{index}: tensor {name!r} is said to be in {shard_name}, and is in {elsewhere}"
