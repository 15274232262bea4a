"""Imports run one way, from the commands down to the ground, and no file is too long to read at a sitting."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = [  # from the ground up; a room imports from floors below its own, and from itself
    {"ember_mlx.shared"},
    {"ember_mlx.kernels", "ember_mlx.token_tables", "ember_mlx.demo", "ember_mlx.plots", "ember_mlx.recipes"},
    {"ember_mlx.optimizers"},
    {"ember_mlx.streaming"},
    {"ember_mlx.finetune"},
    {"ember_mlx", "ember_mlx.exporting", "ember_mlx.geometry", "ember_mlx.planner", "ember_mlx.watch"},
    {"ember_mlx.in_python", "ember_mlx.parity"},
    {"ember_mlx.commands"},
    {"ember_mlx.cli"},
    {"ember_mlx.__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room(name):
    return ".".join(name.split(".")[:2])


@cache
def imports():
    return list(_imports())


def _imports():
    for path in [*ROOT.glob("ember_mlx/**/*.py"), *ROOT.glob("cuda_ref/**/*.py")]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "ember_mlx":
                yield from ((module, f"ember_mlx.{alias.name}") for alias in node.names if alias.name.islower())
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield module, node.module


def test_no_room_imports_from_its_own_floor_or_above():
    inside = [(module, room(name)) for module, name in imports() if module.startswith("ember_mlx.")]
    arrows = [(module, name) for module, name in inside if name in FLOOR and name != room(module)]
    assert len(arrows) > 100
    assert not [arrow for arrow in arrows if FLOOR[arrow[1]] >= FLOOR[room(arrow[0])]]


def test_the_twin_takes_from_the_ground_alone():
    taken = {room(name) for module, name in imports() if module.startswith("cuda_ref") and name.startswith("ember_mlx")}
    assert taken == {"ember_mlx.shared"}


def test_no_file_has_more_than_400_lines():
    paths = [
        path for folder in ("ember_mlx", "cuda_ref", "examples", "tests") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    assert len(paths) > 300
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert {path: lines for path, lines in sizes.items() if lines > 400} == {}
