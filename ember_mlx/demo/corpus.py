"""Text that every Python brings: the docstrings and comments of its own library, read and never imported.

It makes two things, from files that do not overlap:

- `pretraining_text`: what the bundled model was pretrained on (examples/02_pretrain_demo_model.py);
- `finetuning_pairs`: prompt/completion pairs for the demo, from the modules in `HELD_OUT`. The pretraining leaves these
  out, and copies of their text in other files too.

Only the standard library of Python is needed.
"""

import ast
import hashlib
import io
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, compress
from pathlib import Path

from ember_mlx.shared.errors import InputError

__all__ = ["HELD_OUT", "finetuning_pairs", "pretraining_files", "pretraining_text", "stdlib_folder"]

# Top-level modules and packages of the standard library that the demo is fine-tuned on.
# fmt: off
HELD_OUT = frozenset({
    "_strptime", "asyncio", "calendar", "datetime", "decimal", "difflib", "email", "fractions", "http", "imaplib",
    "inspect", "ipaddress", "logging", "mailbox", "numbers", "pathlib", "random", "shutil", "smtplib", "statistics",
    "tarfile", "unittest", "urllib", "zipfile",
})
# fmt: on

# One question, and another wording for the pretraining: the demo's task must be new to the model, its format not.
FINETUNING_PROMPT = "What does {signature} do?"
PRETRAINING_PROMPT = "Document this function: {signature}"

# Folders that hold no prose, or somebody else's code.
SKIPPED_FOLDERS = frozenset({"__pycache__", "_vendor", "site-packages", "dist-packages", "test", "tests"})

FEWEST_PAIRS = 200


@dataclass(frozen=True)
class Docstring:
    """The docstring `text` of `signature`, which is "module", "class Name" or "module.name(arguments)"."""

    signature: str
    text: str
    is_public_function: bool


# --- one file -----------------------------------------------------------------------------------------------------


def _read_docstrings(path: Path, module: str) -> list[Docstring]:
    """All docstrings of a source file; a file that this Python cannot read or parse has none."""
    try:
        with warnings.catch_warnings():  # invalid escapes in somebody else's strings
            warnings.simplefilter("ignore")
            return list(_docstrings(ast.parse(path.read_bytes()), module))
    except (SyntaxError, ValueError, RecursionError, OSError):
        return []


def _read_comments(path: Path) -> list[str]:
    """All comments of a source file that read like prose; a file that this Python cannot read has none."""
    try:
        return list(_comments(path.read_bytes()))
    except (SyntaxError, ValueError, OSError, tokenize.TokenError):
        return []


def _read(path: Path, module: str) -> tuple[list[Docstring], list[str]]:
    return _read_docstrings(path, module), _read_comments(path)


def _docstrings(node: ast.AST, name: str, is_public: bool = True) -> Iterator[Docstring]:
    """Walk modules, classes and functions in source order; what is nested in a function is left out."""
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    text = ast.get_docstring(node)
    if text and text.isascii():
        signature = (
            f"{name}({_arguments(node)})" if is_function else f"{type(node).__name__.removesuffix('Def')} {name}"
        )
        yield Docstring(signature, _without_doctests(text), is_function and is_public)
    if not is_function:
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from _docstrings(child, f"{name}.{child.name}", is_public and not child.name.startswith("_"))


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The names of the arguments, without annotations, defaults and self."""
    arguments = function.args
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    text = ", ".join(name for name in names if name not in ("self", "cls"))
    return text if len(text) <= 60 else "..."


def _without_doctests(text: str) -> str:
    """Cut the interactive examples: from >>> to the next empty line."""
    text = re.sub(r"^[ \t]*>>>.*?(?:\n[ \t]*\n|\Z)", "\n", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\n\s*\n", "\n\n", text).strip()


def _comments(source: bytes) -> Iterator[str]:
    """Blocks of comments on lines of their own, if they read like prose and not like code that was switched off."""
    block: list[str] = []
    last_line = 0
    end = tokenize.TokenInfo(tokenize.COMMENT, "#", (0, 0), (0, 0), "#")  # flushes the last block
    for token in chain(tokenize.tokenize(io.BytesIO(source).readline), [end]):
        if token.type != tokenize.COMMENT or not token.line.lstrip().startswith("#"):
            continue
        if token.start[0] != last_line + 1:
            text = "\n".join(block).strip()
            letters = sum(character.isalpha() or character.isspace() for character in text)
            if len(text.split()) >= 6 and letters > 0.85 * len(text) and text.isascii():
                yield text
            block = []
        block.append(token.string.lstrip("#").removeprefix(" "))
        last_line = token.start[0]


def _first_paragraph(text: str) -> str:
    return " ".join(text.split("\n\n", 1)[0].split())


def _first_paragraphs(text: str, length: int = 500) -> str:
    """As many paragraphs as fit into `length` characters, and at least one."""
    paragraphs = text.split("\n\n")
    ends = accumulate(len(paragraph) + 2 for paragraph in paragraphs)
    return "\n\n".join(paragraphs[: max(1, sum(end <= length for end in ends))])


def _key(text: str) -> bytes:
    """Two texts with one key say the same at their beginning, whatever their case, spaces and punctuation."""
    words = re.sub(r"\W+", " ", _first_paragraph(text).casefold()).strip()
    return hashlib.sha256(words.encode()).digest()[:12]


# --- many files ---------------------------------------------------------------------------------------------------


def stdlib_folder() -> Path:
    """The folder of this Python's standard library.

    Raises InputError if it holds no .py files (a frozen or zipped Python).
    """
    folder = Path(sysconfig.get_path("stdlib"))
    if not (folder / "ast.py").is_file():
        raise InputError(
            f"The demo reads the docstrings of Python's own library, but {folder} holds no .py files. Use a Python "
            "with source files: one from python.org, conda, uv, Homebrew or a Linux distribution."
        )
    return folder


def _source_files(folder: Path) -> list[Path]:
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = set(folders) - SKIPPED_FOLDERS  # not walked: what is installed has far more files
        found += [Path(place, name) for name in files if name.endswith(".py")]
    return sorted(found)


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _is_held_out(module: str) -> bool:
    return module.split(".", 1)[0] in HELD_OUT


def _stdlib_files(held_out: bool) -> list[tuple[Path, str]]:
    """(path, module) of all files of the standard library that are, or are not, held out.

    _pydatetime and _pydecimal are named after the modules that they are the Python version of.
    """
    root = stdlib_folder()
    files = [(path, _module_name(path, root).removeprefix("_py")) for path in _source_files(root)]
    return [(path, module) for path, module in files if _is_held_out(module) == held_out]


def pretraining_files(package_folders: Iterable[Path] = ()) -> list[tuple[Path, str]]:
    """(path, module) of every file to pretrain on: the standard library without HELD_OUT, and the given packages."""
    files = _stdlib_files(held_out=False)
    for folder in package_folders:
        files += [(path, _module_name(path, folder.parent)) for path in _source_files(folder)]
    return files


def pretraining_text(
    files: list[tuple[Path, str]], map_files: Callable = map
) -> Iterator[tuple[list[str], list[dict[str, str]]]]:
    """For each file, in order: (documents, prompt/completion pairs), each text only where it is seen first.

    A docstring is one document, after its signature; the comments of a file are one more. Pairs ask for the docstring
    of a public function. Whatever the held-out modules say too is left out. `map_files` can be the `map` of a pool of
    processes.
    """
    seen: set[bytes] = set()

    def new(texts: list[str]) -> list[bool]:
        keys = [_key(text) for text in texts]
        flags = [key not in seen and key not in keys[:i] for i, key in enumerate(keys)]
        seen.update(keys)
        return flags

    for path, module in _stdlib_files(held_out=True):
        docstrings, comments = _read(path, module)
        new([docstring.text for docstring in docstrings] + comments)

    for docstrings, comments in map_files(_read, *zip(*files, strict=True)):
        docstrings = list(compress(docstrings, new([docstring.text for docstring in docstrings])))
        comments = list(compress(comments, new(comments)))
        documents = [f"{docstring.signature}\n\n{docstring.text}" for docstring in docstrings]
        pairs = [
            {
                "prompt": PRETRAINING_PROMPT.format(signature=docstring.signature),
                "completion": _first_paragraphs(docstring.text),
            }
            for docstring in docstrings
            if docstring.is_public_function
        ]
        yield documents + (["\n\n".join(comments)] if comments else []), pairs


def finetuning_pairs(valid: int = 64) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, valid) lists of {"prompt": ..., "completion": ...} from the docstrings of the held-out modules.

    The prompt names a public function and its arguments, the completion is the first paragraph of its docstring.
    No completion occurs twice. The order is that of a hash of the pair: the same on every machine with the same
    version of Python, and not sorted by module.

    Raises InputError without the standard library's source files, or with too few of them.
    """
    pairs: dict[bytes, dict[str, str]] = {}
    for path, module in _stdlib_files(held_out=True):
        for docstring in _read_docstrings(path, module):
            completion = _first_paragraph(docstring.text)
            is_sentence = completion.endswith(".") and completion[:1].isupper() and 4 <= len(completion.split()) <= 40
            if docstring.is_public_function and is_sentence:
                prompt = FINETUNING_PROMPT.format(signature=docstring.signature)
                pairs.setdefault(_key(completion), {"prompt": prompt, "completion": completion})
    if len(pairs) < max(FEWEST_PAIRS, 2 * valid):
        raise InputError(
            f"The demo found only {len(pairs)} usable docstrings in {stdlib_folder()}, and needs "
            f"{max(FEWEST_PAIRS, 2 * valid)}. Use a Python with a complete standard library: one from python.org, "
            "conda, uv, Homebrew or a Linux distribution."
        )
    ordered = [pairs[key] for key in sorted(pairs)]
    return ordered[valid:], ordered[:valid]
