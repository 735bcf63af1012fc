"""`penstock template` on a directory of template files, whole and damaged ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from penstock.cli.paths import template_directory
from penstock.cli.template import template
from penstock.pagecache.base import Range
from penstock.pagecache.template import FileIdentity, Template, TemplateStore

PAGE = 4096
SERVICE = "serve-llama-1f0c2a9d4e6b"
RECORDED = Template(
    service=SERVICE,
    files=(FileIdentity("a.safetensors", 5 * PAGE + 1, "aa"), FileIdentity("deeper/b.safetensors", PAGE, "bb")),
    groups=(
        (Range("a.safetensors", 0, 2 * PAGE), Range("deeper/b.safetensors", 0, PAGE)),
        (Range("a.safetensors", 2 * PAGE, 5 * PAGE + 1),),
    ),
    root_hints=("/models/llama",),
    recorded_at="2025-11-20T16:01:02+00:00",
)


def run(*arguments: str | Path, answer: str = "") -> Result:
    return CliRunner().invoke(template, [str(argument) for argument in arguments], input=answer)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    store = TemplateStore(tmp_path)
    store.path(SERVICE).write_text(RECORDED.to_json(), encoding="utf-8")
    odd = Template("an odd/name", (), ())
    store.path(odd.service).write_text(odd.to_json(), encoding="utf-8")
    (tmp_path / "broken.template.json").write_text(RECORDED.to_json()[:50], encoding="utf-8")
    return tmp_path


def test_list_shows_all_and_names_the_damaged(directory: Path) -> None:
    result = run("list", "--templates", directory)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["service", "recorded", "(UTC)", "files", "workers", "reads", "template"]
    size = (directory / f"{SERVICE}.template.json").stat().st_size
    assert [SERVICE, "2025-11-20", "16:01:02", "2", "2", "24.0", "KiB", str(size), "B"] in rows
    assert ["broken", "damaged", "50", "B"] in rows
    assert len(rows) == 4
    assert "broken.template.json: not a complete template" in result.stderr
    assert "delete it" in result.stderr


def test_an_empty_store_is_no_error(tmp_path: Path) -> None:
    result = run("list", "--templates", tmp_path / "none")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert f"no templates in {tmp_path / 'none'}" in result.stderr


def test_show_lists_each_workers_ranges_in_order(directory: Path) -> None:
    result = run("show", SERVICE, "--templates", directory)
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"service   {SERVICE}\n"
        "recorded  2025-11-20T16:01:02+00:00 at /models/llama\n"
        "files     2, 24.0 KiB\n"
        "\n"
        "worker 0: 2 ranges, 12.0 KiB\n"
        "  a.safetensors           8.0 KiB  [0, 8192)\n"
        "  deeper/b.safetensors    4.0 KiB  [0, 4096)\n"
        "\n"
        "worker 1: 1 range, 12.0 KiB\n"
        "  a.safetensors          12.0 KiB  [8192, 20481)\n"
    )


def test_show_as_json(directory: Path) -> None:
    body = json.loads(run("show", SERVICE, "--json", "--templates", directory).stdout)
    assert body["service"] == SERVICE
    assert body["bytes_read"] == 6 * PAGE + 1
    assert body["files"][1] == {"name": "deeper/b.safetensors", "size_bytes": PAGE, "fingerprint": "bb"}
    assert body["workers"][1] == [{"name": "a.safetensors", "start": 2 * PAGE, "stop": 5 * PAGE + 1}]


@pytest.mark.parametrize(("command", "service"), [("show", "other"), ("delete", "other")])
def test_an_unknown_service_names_the_known(command: str, service: str, directory: Path) -> None:
    result = run(command, service, "--templates", directory)
    assert result.exit_code == 1
    assert "no template of 'other'" in result.stderr
    assert SERVICE in result.stderr
    assert len(list(directory.iterdir())) == 3


def test_show_says_why_a_template_cannot_be_read(directory: Path) -> None:
    result = run("show", "broken", "--templates", directory)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "not a complete template" in result.stderr


def test_delete_takes_names_as_listed(directory: Path) -> None:
    result = run("delete", "broken", "an odd/name", "--templates", directory)
    assert result.exit_code == 0, result.output
    assert result.stdout == "deleted broken\ndeleted an odd/name\n"
    assert [path.name for path in directory.iterdir()] == [f"{SERVICE}.template.json"]


def test_delete_all_asks_first(directory: Path) -> None:
    refused = run("delete", "--all", "--templates", directory, answer="n\n")
    assert refused.exit_code == 1
    assert f"Delete 3 templates in {directory}?" in refused.stdout
    assert len(list(directory.iterdir())) == 3
    assert run("delete", "--all", "--templates", directory, answer="y\n").exit_code == 0
    assert list(directory.iterdir()) == []
    assert run("delete", "--all", "--yes", "--templates", directory).exit_code == 0


def test_delete_wants_either_names_or_all(directory: Path) -> None:
    assert run("delete", "--templates", directory).exit_code == 2
    assert run("delete", "--all", SERVICE, "--templates", directory).exit_code == 2
    assert len(list(directory.iterdir())) == 3


def test_where_templates_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("PENSTOCK_TEMPLATES", raising=False)
    assert template_directory(None) == tmp_path / "data" / "penstock" / "templates"
    monkeypatch.setenv("PENSTOCK_TEMPLATES", str(tmp_path / "shared"))
    assert template_directory(None) == tmp_path / "shared"
    assert template_directory(str(tmp_path / "given")) == tmp_path / "given"
    assert list(tmp_path.iterdir()) == []  # asking makes none


@pytest.mark.parametrize("command", [[], ["list"], ["show"], ["delete"]])
def test_every_help_has_an_example(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"  penstock template {command[0] if command else 'list'}" in result.stdout


def test_importing_the_command_imports_no_heavy_module() -> None:
    code = "import sys, penstock.cli.template; print({'numpy', 'rich', 'platformdirs'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "set()"
