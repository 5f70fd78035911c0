"""README and docs: what they name exists, what they link to is there, and their Python runs."""

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from piflow_edge.cli import main

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# Options of other programs that stand alone in the text.
FOREIGN = {"--cpu", "--check"}  # of accelerate launch, of benchmarks/page.py
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
# What stands before a block of Python that no test can run, with the reason.
NOT_RUN = re.compile(r"<!-- not run: \S.* -->\n\n?$")

# The wheel's tests run beside tests and docs alone.
from_a_checkout = pytest.mark.skipif(not (ROOT / "piflow_edge").is_dir(), reason="the sources are not here")

every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def options(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts} | {"--help", "-h"}


def calls(text: str) -> list[list[str]]:
    """Every use of our command, as words: in blocks of shell, and in `code`."""
    lines = []
    for language, body in FENCE.findall(text):
        if language in ("sh", "bash"):
            lines += body.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    found = []
    for line in lines:
        line = line.partition(" #")[0]
        for match in re.finditer(r"(?:piflow-edge|-m piflow_edge\.cli) ([^|;&]+)", line):
            found.append(shlex.split(match[1]))
    return found


@every_page
def test_commands_and_their_options_exist(page):
    for words in calls(page.read_text(encoding="utf-8")):
        if words[0].startswith("-"):
            assert words[0] in options(main), words
            continue
        assert words[0] in main.commands, f"there is no command {words[0]}"
        named = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert named <= options(main.commands[words[0]]), words


@every_page
def test_options_named_alone_exist(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    named = set(re.findall(r"`(--[a-z][a-z-]*)", text)) - FOREIGN
    known = set().union(*map(options, main.commands.values()), options(main))
    assert named <= known


@from_a_checkout
@every_page
def test_make_targets_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z][a-z0-9-]*)", text, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"
    for file in re.findall(r"\b((?:benchmarks|tests|docs|export|engines|piflow_edge)/[\w./-]+\.\w+)", text):
        if file.startswith("docs/") and page.parent != ROOT:
            continue  # a link, which the next test follows
        if file.startswith("benchmarks/results/"):
            continue  # made when somebody measures
        assert (ROOT / file).exists(), file


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        slug = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        names.add(f"{slug}-{count}" if count else slug)
    return names


@from_a_checkout
@every_page
def test_relative_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+://", target) or target.startswith("results/"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def python(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [
        match[2]
        for match in FENCE.finditer(text)
        if match[1] == "python" and not NOT_RUN.search(text[: match.start()])
    ]


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=n) for p, n in zip(PAGES, NAMES, strict=True) if python(p)],
)
def test_python_in_it_runs(page, tmp_path):
    blocks = python(page)
    if any("import torch" in block for block in blocks):
        pytest.importorskip("torch", reason="this page's Python needs the 'train' extra")
    # One after the other, as a reader would, in an empty folder.
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def reference() -> list[str]:
    """Names that the API page shows, in full."""
    return re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("name", reference())
def test_the_api_reference_names_what_exists(name):
    module, _, attribute = name.rpartition(".")
    if ".distill" in module or ".export" in module:
        pytest.importorskip("torch", reason="this part needs the 'train' extra")
    found = getattr(importlib.import_module(module), attribute, None) or importlib.import_module(name)
    assert found.__doc__


def test_the_api_reference_holds_every_public_name():
    import piflow_edge

    shown = {name.rpartition(".")[2] for name in reference()}
    errors = vars(importlib.import_module("piflow_edge.errors"))  # shown as a whole
    assert {name for name in piflow_edge.__all__ if not name.startswith("_")} <= shown | set(errors)


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the site needs the 'docs' extra")
def test_links_of_the_site_lead_somewhere(tmp_path):
    # Without the docstrings, which `make docs` takes from the wheel; a broken link is an error either way.
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    bare = re.sub(r"\n  - mkdocstrings:\n(?: {4,}.*\n)+", "\n", settings)
    assert bare != settings
    for name in ("docs_dir: ", "hooks: ["):
        assert name in bare
        bare = bare.replace(name, f"{name}{ROOT}/")
    (tmp_path / "mkdocs.yml").write_text(bare, encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr


def test_nothing_was_left_open():
    for page in PAGES:
        assert not re.search(r"@[A-Z]+@|TODO|FIXME", page.read_text(encoding="utf-8")), page
