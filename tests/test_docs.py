"""The pages of the docs: their code runs, their configs pass the checks, their commands and links exist."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

import kdx
from kdx.cli import _parse
from kdx.config import load, load_mapping, overlay
from kdx.derive import expand_runs
from kdx.plugins import Registry, discover
from kdx.runs import Options, build_plan, prepare
from kdx.spec import check
from kdx.study import plan_study, read_study
from kdx.tune import check_search, read_search

ROOT = Path(kdx.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BASE = ROOT / "configs" / "methods" / "base.yaml"
"""What a YAML block that is only a part of a config is laid over: a student with one teacher, `cnn`."""
LANGUAGES = {"python", "yaml", "toml", "console", "text"}


@dataclass(frozen=True)
class Block:
    """A code block, and the line of the page that it starts on."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def file(self) -> str | None:
        """The name of the file that the block is, if its first line is one."""
        found = re.match(r"# (\w+\.py)\n", self.text)
        return found[1] if found else None


@cache
def tokens(page: Path) -> Sequence[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def blocks(page: Path, language: str | None = None) -> list[Block]:
    found = [
        Block(page, token.map[0] + 1, token.info, token.content)
        for token in tokens(page)
        if token.type == "fence" and token.map is not None
    ]
    return [block for block in found if language in (None, block.language)]


def inline(page: Path) -> Iterator[Token]:
    """Everything within lines of text: words, code, links."""
    for token in tokens(page):
        yield from token.children or ()


def anchors(page: Path) -> set[str]:
    """What a link may name after `#`: the headings in small letters, spaces as hyphens, other signs left out."""
    headings = (
        after.content for token, after in zip(tokens(page), tokens(page)[1:], strict=False)
        if token.type == "heading_open"
    )  # fmt: skip
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def registry() -> Registry:
    return discover()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader has it: the configs at hand, and modules that lie in it can be imported."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def write_files(page: Path, folder: Path) -> None:
    for block in blocks(page, "python"):
        if block.file is not None:
            (folder / block.file).write_text(block.text, encoding="utf-8")


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command after a `$`; a backslash goes on in the next line, and `&&` starts another one."""
    lines = block.text.replace("\\\n", " ").splitlines()
    for line in lines:
        if line.startswith("$ "):
            words = shlex.split(line[2:], comments=True)
            while "&&" in words:
                place = words.index("&&")
                yield words[:place]
                words = words[place + 1 :]
            yield words


def check_command(words: Sequence[str], where: str) -> None:
    """A command of kdx is understood, its file is there, and its overrides fit the config."""
    try:
        options = _parse(words[1:])
    except SystemExit:
        pytest.fail(f"{where}: kdx does not understand {shlex.join(words)}")
    if "config" in options and options.config.parts[0] == "configs":
        config = load(ROOT / options.config, options.overrides)
        check(expand_runs(config), registry())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks_say_what_they_are(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block} is in {block.language!r}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(page, folder)
    module = ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    before = set(sys.modules)
    try:
        for block in blocks(page, "python"):
            # As many empty lines before it as the page has, so that an error names the line of the page.
            code = compile("\n" * block.line + block.text, str(page), "exec")
            exec(code, vars(module))
    finally:
        for name in set(sys.modules) - before:
            if not name.startswith("kdx") and str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page, "yaml")], ids=str)
def test_yaml_blocks_make_a_plan(block: Block, folder: Path) -> None:
    given = yaml.safe_load(block.text)
    write_files(block.page, folder)
    if "variants" in given:
        base = ROOT / "configs" / "ablations" / given["base"]
        (folder / "study.yaml").write_text(yaml.safe_dump({**given, "base": str(base)}, sort_keys=False))
        _, plans = plan_study(read_study(folder / "study.yaml"), Options(quiet=True))
        assert set(plans) >= set(given["variants"])
        return
    if "space" in given:
        base = ROOT / "configs" / "ablations" / given["base"]
        (folder / "search.yaml").write_text(yaml.safe_dump({**given, "base": str(base)}, sort_keys=False))
        assert check_search(read_search(folder / "search.yaml"), Options(quiet=True)).own is not None
        return
    if "train" not in given:  # a part of a config
        given = overlay({"extends": str(BASE)}, given)
        config = load_mapping(given, folder)
    else:
        config = load_mapping(given, ROOT / "configs")
    how = Options(quiet=True)
    plan = build_plan(prepare(config, how), how, trained=False)
    assert set(plan.spec.losses) >= set(given.get("losses", ()))


@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page, "console")], ids=str)
def test_console_blocks_hold_commands_that_kdx_understands(block: Block) -> None:
    found = list(commands(block))
    assert found, f"{block} has no line that starts with `$ `"
    for words in found:
        if words[0] == "kdx":
            check_command(words, str(block))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_within_the_text_are_understood(page: Path) -> None:
    for token in inline(page):
        if token.type == "code_inline" and re.match(r"kdx [a-z]+ ", token.content):
            check_command(shlex.split(token.content), page.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for token in inline(page):
        target = str(token.attrs.get("href", ""))
        if token.type != "link_open" or "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(found), f"{page.name} links to {target}; there are {anchors(found)}"


def test_the_readme_leads_to_every_page() -> None:
    links = {str(token.attrs.get("href", "")) for token in inline(ROOT / "README.md")}
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= links


def test_paths_in_the_text_exist() -> None:
    for page in PAGES:
        for token in inline(page):
            if token.type == "code_inline" and re.fullmatch(r"(configs|plugins|tests|kdx|docs)/[\w./]*", token.content):
                assert (ROOT / token.content).exists(), f"{page.name} names {token.content}, which is not there"


def test_the_page_on_architecture_names_every_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = {path.stem for path in (ROOT / "kdx").glob("*.py") if not path.stem.startswith("_")}
    assert {name for name in files if f"`{name}`" not in text} == set()
