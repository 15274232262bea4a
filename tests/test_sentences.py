"""No sentence that a user reads, in an error, a warning or a help text, is over 25 words."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for package in ("ember_mlx", "cuda_ref") for path in sorted((ROOT / package).rglob("*.py"))]
SAID_BY = {"InputError", "warn", "rprint", "print"}  # the calls whose words a user reads
SHOWN = {"help", "description", "epilog"}  # the arguments of argparse
TEXTS_ALONE = {"option_help.py"}  # all of it is help
LONGEST = 25


def words_of(node):
    """A text, with one word for each value in it."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(part.value if isinstance(part, ast.Constant) else "value" for part in parts)


def texts(path):
    tree = ast.parse(path.read_text())
    roots = [tree] if path.name in TEXTS_ALONE else []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        said = getattr(call.func, "id", getattr(call.func, "attr", "")) in SAID_BY
        roots += [*call.args] if said else []
        roots += [keyword.value for keyword in call.keywords if keyword.arg in SHOWN]
    for node in {id(node): node for root in roots for node in ast.walk(root)}.values():
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            yield node.lineno, words_of(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_sentence_is_longer_than_25_words(path):
    for line, text in texts(path):
        for sentence in re.split(r"[.;!?]\s+|\n\n|\n {2,}", text):  # parts of an error end with ;
            assert len(sentence.split()) <= LONGEST, f"line {line}: {sentence}"
