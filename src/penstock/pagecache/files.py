"""Which files are a model's, and under what names a template knows them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from penstock.pagecache.base import ModelFile
from penstock.units import MiB

_SUFFIXES = frozenset(
    f".{name}"
    for name in [
        "safetensors",
        "gguf",
        "ggml",
        "bin",
        "pt",
        "pth",
        "ckpt",
        "npy",
        "npz",
        "h5",
        "msgpack",
        "onnx",
        "data",
        "llamafile",
        "distcp",
        "mar",
        "engine",
        "plan",
        "tensors",
    ]
)
_SMALLEST_WEIGHTS_BYTES = 256 * 1024
_SMALLEST_UNKNOWN_BYTES = 64 * MiB


def looks_like_weights(path: str, size_bytes: int) -> bool:
    """Whether a file that a program opened is worth observing: weights by name, or anything large.

    Shared libraries are large too in this field (libtorch_cpu.so), and are none of ours.
    """
    name = os.path.basename(path)
    if os.path.splitext(name)[1].lower() in _SUFFIXES:
        return size_bytes >= _SMALLEST_WEIGHTS_BYTES
    return size_bytes >= _SMALLEST_UNKNOWN_BYTES and ".so" not in name


def find_weights(path: Path) -> list[Path]:
    """The weight files at a path: itself, or those of a directory tree, sorted by name.

    Hidden directories (version control, partial downloads) are left out.
    """
    if path.is_file():
        return [path]
    found = []
    for directory, subdirectories, names in os.walk(path):
        subdirectories[:] = sorted(d for d in subdirectories if not d.startswith("."))
        for name in sorted(names):
            candidate = Path(directory, name)
            try:
                if looks_like_weights(str(candidate), candidate.stat().st_size):
                    found.append(candidate)
            except OSError:
                continue  # a dangling link, or a file deleted meanwhile
    return found


def models_in_command(command: Sequence[str], directory: str | os.PathLike[str] = ".") -> list[Path]:
    """Paths named in a command line that hold weights: ``--model DIR``, ``--model=DIR`` or a bare argument."""
    models: list[Path] = []
    for argument in command[1:]:
        for text in (argument, argument.partition("=")[2]):
            if not text or len(text) > 4096 or "\n" in text:
                continue
            path = Path(directory, text)
            try:
                is_model = (path.is_dir() and _holds_weights(path)) or (
                    path.is_file() and looks_like_weights(str(path), path.stat().st_size)
                )
            except (OSError, ValueError):
                continue
            if is_model and path not in models:
                models.append(path)
    return models


def _holds_weights(directory: Path) -> bool:
    """Weights directly inside, or a pipeline of diffusers, which keeps them in directories of its own.

    Else a home directory named on a command line would be a model.
    """
    with os.scandir(directory) as entries:
        return any(
            entry.is_file()
            and (entry.name == "model_index.json" or looks_like_weights(entry.name, entry.stat().st_size))
            for entry in entries
        )


class ModelFiles:
    """The model files known so far, by device and inode.

    A name is the path below the model's root; the root is what the user or the command named, or else the
    directory of the first file seen. Where two models have a file of the same name, the second one's begins with
    its directory's.

    Args:
        roots: model directories or files, as given.
    """

    def __init__(self, roots: Iterable[Path] = ()) -> None:
        self._files: dict[tuple[int, int], ModelFile] = {}
        self.roots: list[Path] = []
        for root in roots:
            self.add_root(root)

    def __iter__(self) -> Iterator[ModelFile]:
        return iter(dict.fromkeys(self._files.values()))

    def __len__(self) -> int:
        return len(set(self._files.values()))

    def get(self, device: int, inode: int) -> ModelFile | None:
        """The file with that device and inode, if it is one of the model's."""
        return self._files.get((device, inode))

    def by_name(self, name: str) -> ModelFile | None:
        """The file with that name below a root."""
        return next((file for file in self._files.values() if file.name == name), None)

    def add_root(self, root: Path) -> list[ModelFile]:
        """Add a directory's weights, or one file, under names below it."""
        root = Path(os.path.abspath(root))
        base = root.parent if root.is_file() else root
        self.roots.append(base)
        return [self._add(path, path.relative_to(base).as_posix()) for path in find_weights(root)]

    def add(self, path: str, device: int, inode: int) -> ModelFile:
        """Add a file that the program opened, as the observer saw it.

        The device may differ from stat's: btrfs shows a subvolume's there and the superblock's in maps.

        Raises:
            OSError: it is gone.
        """
        file = self._add_below_root(path)
        return self._files.setdefault((device, inode), file)

    def _add_below_root(self, path: str) -> ModelFile:
        absolute = Path(os.path.abspath(path))
        for root in self.roots:
            if absolute.is_relative_to(root):
                return self._add(absolute, absolute.relative_to(root).as_posix())
        self.roots.append(absolute.parent)
        return self._add(absolute, absolute.name)

    def _add(self, path: Path, name: str) -> ModelFile:
        status = path.stat()
        known = self._files.get((status.st_dev, status.st_ino))
        if known is not None:
            return known
        file = ModelFile(self._free_name(path, name), str(path), status.st_size, status.st_dev, status.st_ino)
        self._files[status.st_dev, status.st_ino] = file
        return file

    def _free_name(self, path: Path, name: str) -> str:
        """The name, behind as many directories as it takes to tell the file from another model's."""
        taken = {file.name for file in self._files.values() if file.path != str(path)}
        for directory in path.parents[name.count("/") :]:
            if name not in taken:
                break
            name = f"{directory.name}/{name}"
        return name
