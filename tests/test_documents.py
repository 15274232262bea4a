"""The pages: README of one and a half screens, links that lead somewhere, and commands that the real parsers take."""

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from ember_mlx import cli
from ember_mlx.finetune import options
from ember_mlx.finetune.keywords import options_of

ROOT = Path(__file__).parents[1]
FOLDERS = ("ember_mlx", "cuda_ref", "examples", "tests", ".github")
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
)
GUIDES = [ROOT / "README.md", *(ROOT / "ember_mlx").rglob("README.md")]
LINK = re.compile(r'\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)"')
PATH = re.compile(r"(?<![\w./-])(?:ember_mlx|cuda_ref|examples|tests)/[a-z\d_/.-]+\.py\b")
CODE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Parsed(BaseException):
    """The parser took the line; nothing is to run. No ``except Exception`` on the way may keep it."""


def pages(chosen=PAGES):
    return pytest.mark.parametrize("page", chosen, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text):
    """Every ``ember-mlx`` line with arguments: those of blocks, and those inside a sentence that name an option."""
    lines = [line for block in CODE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    lines = [part for line in lines for part in line.split("#")[0].split("&&")]
    lines += [span for span in re.findall(r"`([^`\n]+)`", CODE.sub("", text)) if " --" in span]
    words = [shlex.split(line) for line in lines if "ember-mlx " in line]
    found = [line[1:] for line in words if line and Path(line[0]).name == "ember-mlx"]
    return [line for line in found if "--help" not in line]


def test_the_readme_is_one_and_a_half_screens():
    assert len((ROOT / "README.md").read_bytes()) <= 6144


def test_every_page_is_looked_at():
    assert len(PAGES) >= 10
    assert sum(len(commands(page.read_text())) for page in PAGES) >= 20


@pages()
def test_every_relative_link_exists(page):
    for link in (first or second for first, second in LINK.findall(CODE.sub("", page.read_text()))):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page}: {link}"
        assert target.resolve().is_relative_to(ROOT), f"{page}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page}: {link}"


def test_every_file_of_code_that_a_text_names_exists():
    """In pages, docstrings and comments alike."""
    texts = [*PAGES, *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    named = {(text, name) for text in texts for name in PATH.findall(text.read_text())}
    assert len(named) > 80
    assert [f"{text}: {name}" for text, name in sorted(named) if not (ROOT / name).exists()] == []


@pages()
def test_every_command_that_is_shown_parses(page, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *arguments, **keywords):
        parse_args(parser, *arguments, **keywords)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    for command, *arguments in commands(page.read_text()):
        assert command in cli.COMMANDS, f"{page}: {command}"
        with pytest.raises(Parsed):
            import_module(f"ember_mlx.commands.{command}").main(arguments)


@pages(GUIDES)
def test_every_flag_that_a_guide_names_exists(page):
    known = set(options.build_parser()._option_string_actions) | {"--memory", "--backend", "--json", "--out"}
    known |= {
        "--verbose",
        "--theme",
        "--workers",
        "--link",
        "--keep",
        "--prompt",
        "--adapter-path",
        "--save-path",
        "--requantize",
        "--quantize-tables",
        "--dequantize",
        "--export-gguf",
    }  # of the other commands
    prose = CODE.sub("", page.read_text())
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", prose)) <= known


def test_the_loop_of_the_readme_runs():
    whole, loop = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    from tiny_models import tiny_llama

    exec(compile(loop, "README.md", "exec"), {"model": tiny_llama()})
    keywords = re.search(r"ember_mlx.train\(.*?, (.*)\)", whole)[1]
    options_of(eval(f"dict({keywords})"))
