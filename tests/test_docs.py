"""The documentation says what is true: generated pages, examples, links and names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.cli.commands import COMMANDS
from penstock.pagecache.base import Access, Context, Evict, ModelFile, Policy, Prefetch
from penstock.pagecache.template import Template
from penstock.units import GiB, MiB

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_command_line_page_is_what_help_prints() -> None:
    # In a process of its own: click keeps a command's help option as its first caller wanted it.
    code = "import runpy; print(runpy.run_path('docs/generate_cli.py')['generate'](), end='')"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    assert page == printed, "a --help has changed: run `make docs`"
    for name in COMMANDS:
        assert f"\n## penstock {name}\n" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    fenced = "".join(re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    used = re.findall(r"^\s*(?:\$ )?penstock ([a-z]+)\b(?!:)", fenced, re.MULTILINE) + re.findall(
        r"`penstock ([a-z]+)", text
    )
    assert set(used) <= set(COMMANDS)


def test_the_architecture_names_every_module() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (\w+)/\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL))
    for path in (ROOT / "src/penstock").rglob("*.py"):
        if path.name == "__init__.py":
            continue
        package, _, name = path.relative_to(ROOT / "src/penstock").as_posix().rpartition("/")
        top, _, below = package.partition("/")
        section = sections[top] if top else text
        assert f"`{below}/{name}`" in section or f"`{name}`" in section, f"ARCHITECTURE.md lacks {package}/{name}"


def test_the_template_example_is_one() -> None:
    (example,) = blocks("docs/templates.md", "json")
    template = Template.from_json(example, "docs/templates.md")
    first, second = template.files
    (group,) = template.groups
    assert [(part.name, part.start, part.stop) for part in group] == [
        (first.name, 0, first.size_bytes),
        (second.name, 0, 50 * 4096),
        (second.name, 2048 * 4096, second.size_bytes),
    ]
    assert json.loads(template.to_json()) == json.loads(example)
    table = (ROOT / "docs/templates.md").read_text(encoding="utf-8")
    for field in json.loads(example):
        assert f"| `{field}` |" in table


def test_the_policy_example_works() -> None:
    (example,) = blocks("docs/policies.md", "python")
    names: dict[str, object] = {}
    exec(compile(example, "docs/policies.md", "exec"), names)  # noqa: S102 - our own page
    window = names["Window"]
    assert isinstance(window, type)
    policy = window()
    assert isinstance(policy, Policy)
    file = ModelFile("a.safetensors", "/m/a.safetensors", 4 * GiB, 1, 1)
    access = Access(file, 2 * GiB, 2 * GiB + MiB, 0, 1.0, miss=True)
    policy.start(Context((file,), keep_bytes=GiB))
    assert policy.prefetch(None) == ()
    assert policy.prefetch(access) == [Prefetch(file, 2 * GiB + MiB, 2 * GiB + 513 * MiB, 0)]
    assert policy.evict(access) == [Evict(file, 0, GiB)]


def test_decisions_are_numbered_in_order() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("*.md"))
    for number, page in enumerate(pages, 1):
        assert page.name.startswith(f"{number:04}-")
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"# {number:04}. ")
        assert "\n## Alternatives\n" in text
