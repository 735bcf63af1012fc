"""Imports point downwards only, as ARCHITECTURE.md draws the layers, and importing does nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "penstock"

# From the bottom up; packages on one line do not know each other.
LAYERS = (
    ("units", "errors", "records", "__init__"),
    ("linux",),
    ("storage",),
    ("device",),
    ("checkpoint", "kv", "pagecache"),
    ("adapters",),
    ("report",),
    ("cli",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# Beside the layers: it may use all below cli, and only these use it.
TESTING = "testing"
USERS_OF_TESTING = {"cli/generate.py", "cli/demo.py"}

MODULES = sorted(SOURCE.rglob("*.py"))


def layer_of(path: Path) -> str:
    """The package directly below penstock, or the module's name where there is none."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported(tree: ast.AST, path: Path) -> Iterator[tuple[str, int]]:
    """Full names of all that a module imports, wherever in it, with their lines."""
    package = ["penstock", *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield ".".join([*base, alias.name]), node.lineno


def target_layer(name: str) -> str | None:
    """The layer that an import goes to; None where it is not penstock's."""
    parts = name.split(".")
    if parts[0] != "penstock":
        return None
    is_module = len(parts) > 1 and (parts[1] in {*RANK, TESTING} or (SOURCE / parts[1]).is_dir())
    return parts[1] if is_module else "__init__"  # penstock itself, or a name in it


def complaint(source: str, target: str, path: Path) -> str:
    """Why one layer may not import another; "" if it may."""
    if target == source or path == SOURCE / "__init__.py":  # penstock itself names what its users call
        return ""
    if target == TESTING:
        name = path.relative_to(SOURCE).as_posix()
        return "" if name in USERS_OF_TESTING else f"only {sorted(USERS_OF_TESTING)} import testing"
    if source == TESTING:
        return "" if RANK[target] < RANK["cli"] else "testing may use what lies below cli"
    return "" if RANK[target] < RANK[source] else f"{source} does not lie above {target}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_point_downwards(path: Path) -> None:
    source = layer_of(path)
    assert source == TESTING or source in RANK, f"{source} has no place in the layers"
    problems = []
    for name, line in imported(ast.parse(path.read_text()), path):
        target = target_layer(name)
        why = complaint(source, target, path) if target is not None else ""
        if why:
            problems.append(f"{path}:{line}: imports {name}: {why}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        ("linux/numa.py", "penstock.linux.libc", True),
        ("linux/numa.py", "penstock.errors", True),
        ("linux/numa.py", "penstock.storage.probe", False),
        ("pagecache/loader.py", "penstock.linux", True),
        ("pagecache/loader.py", "penstock.kv", False),
        ("pagecache/loader.py", "penstock.testing.gguf", False),
        ("report/plot.py", "penstock.cli.run", False),
        ("report/plot.py", "penstock.__version__", True),
        ("cli/run.py", "penstock.report.plot", True),
        ("cli/run.py", "penstock.testing.gguf", False),
        ("cli/generate.py", "penstock.testing.gguf", True),
        ("testing/gguf.py", "penstock.pagecache.base", True),
        ("testing/gguf.py", "penstock.cli.run", False),
        ("units.py", "penstock.linux.libc", False),
        ("units.py", "numpy", True),
        ("__init__.py", "penstock.checkpoint.load", True),
        ("checkpoint/load.py", "penstock.storage.base", True),
        ("checkpoint/load.py", "penstock.pagecache.ledger", False),
    ],
)
def test_the_rule_itself(source: str, target: str, allowed: bool) -> None:
    path = SOURCE / source
    layer = target_layer(target)
    assert (layer is None or complaint(layer_of(path), layer, path) == "") is allowed


def test_relative_imports_are_seen() -> None:
    path = SOURCE / "pagecache" / "policies" / "maio.py"
    text = "from . import ahead\nfrom ..base import Access\nfrom ...linux import numa\nimport os.path\n"
    assert [name for name, _ in imported(ast.parse(text), path)] == [
        "penstock.pagecache.policies.ahead",
        "penstock.pagecache.base.Access",
        "penstock.linux.numa",
        "os.path",
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_torch_cuda_appears_only_in_device(path: Path) -> None:
    if layer_of(path) == "device":
        return
    tree = ast.parse(path.read_text())
    names = {name for name, _ in imported(tree, path)}
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not [name for name in names | attributes if name == "torch.cuda" or name.startswith("torch.cuda.")]


def test_importing_penstock_changes_nothing_in_the_process() -> None:
    code = (
        "import gc, logging, os, signal, sys, threading\n"
        "def state():\n"
        "    handlers = [signal.getsignal(number) for number in signal.valid_signals()]\n"
        "    return (os.listdir('/proc/self/task'), threading.enumerate(), handlers, logging.root.handlers[:],\n"
        "            sorted(logging.root.manager.loggerDict), gc.get_threshold(), gc.isenabled(),\n"
        "            os.sched_getaffinity(0), dict(os.environ), os.listdir('/proc/self/fd'))\n"
        "before = state()\n"
        "import penstock\n"
        "assert state() == before\n"
        "print(sorted({'numpy', 'torch', 'click', 'rich'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.relative_to(SOURCE).parts[0] in {"linux", "storage", "pagecache", "report"}],
    ids=lambda path: path.relative_to(SOURCE).as_posix(),
)
def test_no_module_starts_anything_when_it_is_imported(path: Path) -> None:
    """Statically: nothing but definitions, constants and imports at the top level calls into the process."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If)
    for node in ast.parse(path.read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_docstring or isinstance(node, allowed), f"{path}:{node.lineno}: {ast.unparse(node)}"
