"""The demo's text: where it comes from, and that the three parts of it do not overlap."""

import subprocess
import sys
from pathlib import Path

import pytest

from ember_mlx.demo import corpus
from ember_mlx.shared.errors import InputError

SOURCE = '''"""Module docstring of many words."""

# This comment is a sentence that a person
# wrote over two lines of the file.
value = 1  # a comment at the end of a line is not kept

# result = compute(value)[0]; print(result, "%d" % 3, {1: 2}) == 4


class Shape:
    """A shape with an area."""

    def area(self, unit, *, precise=False):
        """Return the area of the shape.

        >>> Shape().area("m")
        4

        It is never negative.
        """

    def _hidden(self):
        """Not part of the interface, so no question is asked about it."""
'''


@pytest.fixture(scope="module")
def pairs():
    return corpus.finetuning_pairs()


def test_finetuning_pairs_are_a_few_hundred_and_deterministic(pairs):
    train, valid = pairs
    assert len(valid) == 64
    assert len(train) >= 400
    assert corpus.finetuning_pairs(valid=32) == (valid[32:] + train, valid[:32])


def test_finetuning_pairs_ask_about_a_function_and_answer_in_prose(pairs):
    for pair in pairs[0] + pairs[1]:
        assert pair["prompt"].startswith("What does ")
        assert pair["prompt"].endswith(") do?")
        assert pair["completion"][0].isupper()
        assert ">>>" not in pair["completion"]


def test_no_completion_occurs_twice_so_train_and_valid_do_not_overlap(pairs):
    completions = [pair["completion"].casefold() for split in pairs for pair in split]
    assert len(set(completions)) == len(completions)


def test_the_pairs_come_from_the_held_out_modules_alone(pairs):
    modules = {pair["prompt"].removeprefix("What does ").split(".")[0] for split in pairs for pair in split}
    assert modules <= corpus.HELD_OUT
    assert len(modules) > 15


def test_the_pretraining_files_leave_out_the_held_out_modules_and_the_tests():
    root = corpus.stdlib_folder()
    files = corpus.pretraining_files()
    tops = {path.relative_to(root).parts[0].removesuffix(".py").removeprefix("_py") for path, _ in files}
    assert len(files) > 300
    assert not tops & corpus.HELD_OUT
    assert not tops & corpus.SKIPPED_FOLDERS
    assert corpus.pretraining_files() == files


@pytest.fixture(scope="module")
def text_of(tmp_path_factory, pairs):
    """What `corpus.pretraining_text` gives for the files of a small package, by the names of the files."""
    folder = tmp_path_factory.mktemp("site") / "package"
    folder.mkdir()
    copied = pairs[1][0]["completion"]
    sources = {
        "copy_held_out.py": f'def f():\n    """{copied}"""\n\n\ndef g():\n    """Said nowhere else."""\n',
        "not_python.py": "def f(:\n",
        "nul.py": "\0",
        "shapes.py": SOURCE,
        "shapes_copy.py": SOURCE.replace("A shape", "a  SHAPE"),
    }
    for name, source in sources.items():
        (folder / name).write_text(source)
    files = [(path, module) for path, module in corpus.pretraining_files([folder]) if folder in path.parents]
    return dict(zip(sources, corpus.pretraining_text(files), strict=True))


def test_pretraining_text_of_a_file(text_of):
    documents, questions = text_of["shapes.py"]
    assert documents == [
        "Module package.shapes\n\nModule docstring of many words.",
        "Class package.shapes.Shape\n\nA shape with an area.",
        "package.shapes.Shape.area(unit, precise)\n\nReturn the area of the shape.\n\nIt is never negative.",
        "package.shapes.Shape._hidden()\n\nNot part of the interface, so no question is asked about it.",
        "This comment is a sentence that a person\nwrote over two lines of the file.",
    ]
    assert questions == [
        {
            "prompt": "Document this function: package.shapes.Shape.area(unit, precise)",
            "completion": "Return the area of the shape.\n\nIt is never negative.",
        }
    ]


def test_pretraining_text_has_each_text_once(text_of):
    assert text_of["shapes_copy.py"] == ([], [])


def test_pretraining_text_leaves_out_copies_of_held_out_text(text_of):
    documents, questions = text_of["copy_held_out.py"]
    assert documents == ["package.copy_held_out.g()\n\nSaid nowhere else."]
    assert len(questions) == 1


def test_files_that_this_python_cannot_read_have_no_text(text_of):
    assert text_of["not_python.py"] == text_of["nul.py"] == ([], [])


def test_reading_imports_nothing(tmp_path):
    """The corpus itself needs neither MLX nor the modules that it reads."""
    program = (
        "import sys, types\n"
        f"for name, folder in (('ember_mlx', {str(Path(corpus.__file__).parents[1])!r}), ('ember_mlx.demo', '')):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules[name].__path__ = [folder] if folder else [sys.modules['ember_mlx'].__path__[0] + '/demo']\n"
        "from ember_mlx.demo import corpus\n"
        "corpus.finetuning_pairs()\n"
        "print([name for name in ('mlx', 'numpy', 'mailbox', 'imaplib', 'statistics') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"


def test_a_python_without_its_source_files_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path / "python312.zip"))
    with pytest.raises(InputError, match=r"python312\.zip holds no \.py files\. Use a Python with"):
        corpus.finetuning_pairs()


def test_a_python_with_too_few_of_them_too(tmp_path, monkeypatch):
    (tmp_path / "ast.py").write_text("")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="only 0 usable docstrings .* needs 200. Use a Python"):
        corpus.finetuning_pairs()
