"""What others may use is declared: hints on every public function, a true `__all__`, and named dependencies."""

import ast
import re
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("ember_mlx", "cuda_ref")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
ENTRY = {"ember_mlx.__main__"}  # it is run, not imported
# Of one name in the package index and another in Python.
DISTRIBUTIONS = {"mlx_lm": "mlx-lm", "yaml": "pyyaml"}


@cache
def tree_of(name):
    """Parsed by the tests: both workers import this file, and one of them needs no tree."""
    return ast.parse(MODULES[name].read_text())


def declared(tree):
    """The names in ``__all__``, or None."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            return ast.literal_eval(node.value)
    return None


def defined(tree):
    """Every name that a module defines or imports at its top."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)


def public_functions(body, prefix=""):
    for node in body:
        is_public = not getattr(node, "name", "_").startswith("_")
        if isinstance(node, ast.FunctionDef) and (is_public or node.name in ("__init__", "__call__")):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef) and is_public:
            yield from public_functions(node.body, f"{node.name}.")


def unhinted(tree):
    for name, function in public_functions(tree.body):
        arguments = function.args
        given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        bare = [each.arg for each in given if each and each.annotation is None and each.arg not in ("self", "cls")]
        if bare or (function.returns is None and not name.endswith("__init__")):
            yield f"{name}({', '.join(bare)})"


@pytest.mark.parametrize("name", sorted(MODULES.keys() - ENTRY))
def test_every_module_declares_what_is_public(name):
    names, lazy = declared(tree_of(name)), "__getattr__" in set(defined(tree_of(name)))
    assert names is not None
    missing = set(names) - set(defined(tree_of(name)))
    assert lazy or not missing


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_public_function_has_hints(name):
    assert list(unhinted(tree_of(name))) == []


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_what_another_keeps_to_itself(name):
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            public = {
                *(declared(tree_of(node.module)) or ()),
                *(m.rpartition(".")[2] for m in MODULES if m.startswith(node.module)),
            }
            assert {alias.name for alias in node.names} <= public, (node.module, [alias.name for alias in node.names])


def test_every_library_that_is_imported_is_a_named_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    named = {re.match(r"[\w-]+", each)[0] for group in groups for each in group}
    imported = set()
    for name in MODULES:
        for node in ast.walk(tree_of(name)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    others = imported - set(sys.stdlib_module_names) - set(PACKAGES)
    assert {"mlx", "rich", "torch"} < others
    # matplotlib brings cycler, whose colours are matplotlib's own setting
    assert {DISTRIBUTIONS.get(name, name) for name in others} - named <= {"cycler"}


def test_the_packages_say_that_they_are_typed():
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)
