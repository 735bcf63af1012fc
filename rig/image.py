"""The image with Python, what tests import, and this checkout: an ext4 file system made without mounting it."""

from __future__ import annotations

import compileall
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from penstock.units import MiB
from rig.errors import RigError
from rig.provision import tool

REPOSITORY = Path(__file__).resolve().parents[1]
HYPOTHESIS = REPOSITORY / ".hypothesis"  # in the image
_ROOTS = ("click", "numpy", "platformdirs", "rich", "xxhash", "pytest", "pytest-timeout", "hypothesis", "safetensors")
_LEFT_OUT = ("site-packages", "test", "idlelib", "tkinter", "ensurepip", "turtledemo", "lib2to3", "pydoc_data")
_OF_CHECKOUT = ("src", "tests", "bench", "rig", "examples", "docs", "pyproject.toml", "README.md", "ARCHITECTURE.md")


def make_image(path: Path, tests: Sequence[str]) -> list[Path]:
    """Write the image; returns the directories in it that go over those of the same paths in the machine.

    Args:
        path: of the image.
        tests: what will be run in it, as pytest is told.

    Raises:
        RigError: it cannot be made.
    """
    staging = path.with_suffix(".staging")
    shutil.rmtree(staging, ignore_errors=True)
    standard = Path(sysconfig.get_path("stdlib")).resolve()
    base = Path(sys.base_prefix).resolve()
    over = [REPOSITORY, standard if base == Path("/usr") else base]
    try:
        _copy_tree(standard, staging)
        if base != Path("/usr"):
            _copy_tree(base / "bin", staging)
            for library in base.glob("lib/libpython*"):
                _copy(library, staging)
        for name in _OF_CHECKOUT:
            source = REPOSITORY / name
            (_copy_tree if source.is_dir() else _copy)(source, staging)
        environment = Path(sys.prefix)
        _copy_tree(environment / "bin", staging)
        _copy(environment / "pyvenv.cfg", staging)
        site = Path(sysconfig.get_path("purelib"))
        for file in _files(_with_requirements(_ROOTS), site):
            _copy(file, staging)
        for link in site.glob("*penstock*.pth"):
            _copy(link, staging)
        for part in (REPOSITORY, standard):  # the machine sees them read-only, and would compile at each start
            compileall.compile_dir(
                staging / str(part).lstrip("/"), stripdir=str(staging), quiet=2, workers=0,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )  # fmt: skip
        _rewrite_assertions(tests, staging)
        _remember_characters(staging / HYPOTHESIS.relative_to("/"))
        used = sum(file.lstat().st_size + 4096 for file in staging.rglob("*"))
        _make_file_system(path, int(used * 1.15) + 64 * MiB, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return over


def _rewrite_assertions(tests: Sequence[str], staging: Path) -> None:
    """Compile tests as pytest does, which takes it half a minute under emulation, its plugins among them."""
    beside = staging.with_suffix(".pycache")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(beside)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-qq", *tests]
    subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, check=False)
    for compiled in beside.rglob("*-pytest-*.pyc"):
        directory = staging / compiled.parent.relative_to(beside)
        if directory.is_dir():
            (directory / "__pycache__").mkdir(exist_ok=True)
            shutil.move(compiled, directory / "__pycache__" / compiled.name)
    shutil.rmtree(beside, ignore_errors=True)


def _remember_characters(directory: Path) -> None:
    """Have hypothesis keep its tables of Unicode there, which it makes in half a minute under emulation."""
    code = "from hypothesis.strategies import text; text().example()"
    environment = {**os.environ, "HYPOTHESIS_STORAGE_DIRECTORY": str(directory)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, check=False)


def make_disk(path: Path, size_bytes: int) -> None:
    """An empty ext4 file system in a sparse file."""
    _make_file_system(path, size_bytes, None)


def _make_file_system(path: Path, size_bytes: int, contents: Path | None) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size_bytes)
    command = [tool("mke2fs"), "-q", "-F", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
    command += ["-O", "^metadata_csum"] + (["-d", str(contents)] if contents else [])
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RigError(f"mke2fs failed: {done.stderr.strip()}")


def _copy(source: Path, staging: Path) -> None:
    target = staging / str(source).lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target, follow_symlinks=False)


def _copy_tree(source: Path, staging: Path) -> None:
    def left_out(directory: str, names: list[str]) -> set[str]:
        inside = Path(directory) == source
        return {name for name in names if inside and name in _LEFT_OUT}

    shutil.copytree(
        source, staging / str(source).lstrip("/"), symlinks=True, ignore=left_out, dirs_exist_ok=True
    )  # fmt: skip


def _with_requirements(names: Iterable[str]) -> Iterator[Distribution]:
    """Distributions and all that they need here."""
    waiting, seen = list(names), set[str]()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # for another platform, or an extra
        yield found
        needed = [requirement for requirement in found.requires or () if "extra ==" not in requirement]
        waiting += [re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0] for requirement in needed]


def _files(distributions: Iterable[Distribution], site: Path) -> Iterator[Path]:
    for found in distributions:
        for part in found.files or ():
            path = Path(os.path.abspath(str(found.locate_file(part))))
            if path.is_file() and path.is_relative_to(site):
                yield path
