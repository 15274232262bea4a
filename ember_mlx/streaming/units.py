"""Which modules of a model are its units, and what each call of one took and gave.

Units are the members of the model's outermost lists of modules that a run calls; where one is never called, its called
children. Everything else is glue. No name and no architecture decides anything.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ember_mlx.streaming.call_tree import flatten

__all__ = [
    "Call",
    "Recording",
    "calls_go_to",
    "find_units",
    "is_leaf",
    "outputs_of_a_layer",
    "put_back_random_state",
    "record",
]


@dataclass
class Call:
    """One call of a unit: its arguments' arrays, its results' arrays, and the random state on both sides."""

    path: str
    spec: tuple
    inputs: list
    key: mx.array
    out_spec: tuple = None
    object_specs: list = None
    outputs: list = None
    key_after: mx.array = None
    sources: list = None  # of each input: (call, output) that it is, as far as identity tells
    dropped: dict = field(default_factory=dict)  # inputs that are to be made again, and which output each is


@dataclass
class Recording:
    """One forward pass: its calls, what ran it, and the cotangents that have arrived so far, by (call, output)."""

    run: callable
    key: mx.array
    calls: list = field(default_factory=list)
    result: object = None
    key_after: mx.array = None
    cotangents: dict = field(default_factory=dict)


_hooked = {}  # id of a module, and the method -> its path, and where its calls go


@contextmanager
def calls_go_to(modules: dict[str, nn.Module], function: Callable, method: str = "__call__") -> Iterator[None]:
    """Within, a call of that method of a module goes to ``function(path, own_call, arguments, keywords)``.

    A call looks ``__call__`` up in the class, so a module gets a subclass of its own class for that time.
    """
    own_classes = [(module, type(module)) for module in modules.values()]
    try:
        for path, module in modules.items():
            _hooked[id(module), method] = path, function
            module.__class__ = _hooked_class(type(module), method)
        yield
    finally:
        for module, own in own_classes:
            module.__class__ = own
            _hooked.pop((id(module), method), None)


@cache
def _hooked_class(own, method):
    def call(module, *arguments, **keywords):
        path, function = _hooked[id(module), method]
        return function(path, partial(getattr(own, method), module), arguments, keywords)

    return type(own.__name__, (own,), {method: call})


def find_units(model: nn.Module, run: Callable[[], object]) -> dict[str, nn.Module]:
    """The units among a model's modules, by path, in the order of the model.

    Args:
        model: Any model.
        run: A function that runs it on a few tokens.
    """
    modules = dict(model.named_modules())
    lists = {}
    for path in modules:
        parent, _, last = path.rpartition(".")
        if last.isdigit() and tree_flatten(modules[path].parameters()):
            lists.setdefault(parent, []).append(path)
    outermost = []
    for parent in sorted(lists, key=lambda path: path.count(".")):
        if not any(parent.startswith(other + ".") for other in outermost):
            outermost.append(parent)
    in_order = list(modules)
    members = sorted((path for parent in outermost for path in lists[parent]), key=in_order.index)
    return {path: modules[path] for path in _called(modules, members, run)}


def outputs_of_a_layer(model: nn.Module, units: dict[str, nn.Module]) -> int:
    """How many numbers of a token the linears of the widest unit give together; experts count as one.

    0 where nothing trains but the head and what comes after the units: then no unit has a backward pass.
    """
    modules = dict(model.named_modules())
    trained = [path for path, _ in tree_flatten(model.trainable_parameters())]
    in_units = tuple(f"{unit}." for unit in units)
    if not any(path.startswith(in_units) or _is_embedding(modules, path) for path in trained):
        return 0
    weights = {unit: tree_flatten(module.parameters()) for unit, module in units.items()}
    linears = ((array for path, array in pairs if _is_matrix(path, array)) for pairs in weights.values())
    return max((sum(array.shape[-2] for array in arrays) for arrays in linears), default=0)


def _is_embedding(modules, path):
    return isinstance(modules.get(path.rpartition(".")[0]), nn.Embedding)


def _is_matrix(path, array):
    return path.rpartition(".")[2] == "weight" and array.ndim > 1


def _called(modules, paths, run):
    called = set()

    def note(path, own_call, arguments, keywords):
        called.add(path)
        return own_call(*arguments, **keywords)

    with calls_go_to({path: modules[path] for path in paths}, note):
        run()
    children = [
        child
        for path in paths
        if path not in called
        for child in (f"{path}.{name}" for name in modules[path].children())
        if child in modules and tree_flatten(modules[child].parameters())
    ]
    return [path for path in paths if path in called] + (_called(modules, children, run) if children else [])


def record(
    run: Callable[[], object],
    units: dict[str, nn.Module],
    evaluate: Callable,
    after_call: Callable[[Recording], None],
    call_unit: Callable | None,
) -> Recording:
    """Run the model as it is and keep what each call of a unit took and gave, evaluated call by call.

    It must not happen inside a trace: there MLX keeps the graph of all that is evaluated.

    Args:
        run: Runs the model; its result is kept, not evaluated.
        evaluate: Takes the arrays of a call and has them evaluated.
        after_call: Is called with the recording after each call.
        call_unit: ``call_unit(call, own_call, arguments, keywords)`` makes a unit's result. None: the unit itself does,
            and what it took is looked for among the outputs of earlier calls.
    """
    recording = Recording(run, mx.random.state[0])
    made, alive = {}, []

    def keep(path, own_call, arguments, keywords):
        spec, leaves, objects = flatten((arguments, keywords))
        # Python's a += b and a[i] = b change an array itself, so what is kept is another array on the same data.
        call = Call(path, spec, [mx.stop_gradient(leaf) for leaf in leaves], mx.random.state[0])
        if call_unit is None:
            call.sources = [made.get(id(leaf)) if is_leaf(leaf) else None for leaf in leaves]
            result = own_call(*arguments, **keywords)
        else:
            result = call_unit(call, own_call, arguments, keywords)
        call.out_spec, outputs, _ = flatten(result)
        of_objects = [flatten(item) for item in objects]
        call.object_specs = [spec for spec, _, _ in of_objects]
        outputs = outputs + [leaf for _, leaves, _ in of_objects for leaf in leaves]
        call.outputs = [mx.stop_gradient(leaf) for leaf in outputs]
        evaluate(*call.outputs, *outputs, *call.inputs)
        call.key_after = mx.random.state[0]
        if call_unit is None:
            made.update({id(leaf): (len(recording.calls), j) for j, leaf in enumerate(outputs)})
            alive.extend(outputs)  # an id is one array's only while that array lives
        recording.calls.append(call)
        after_call(recording)
        return result

    with calls_go_to(units, keep):
        recording.result = run()
    recording.key_after = mx.random.state[0]
    return recording


def is_leaf(array: mx.array) -> bool:
    """Whether an array holds no graph: it is evaluated, and no trace goes through it."""
    text = io.StringIO()
    mx.export_to_dot(text, array)
    return "shape=rectangle" not in text.getvalue()


def put_back_random_state(key: mx.array) -> None:
    """``mx.random.state`` cannot be assigned to. Where nothing was drawn, it costs nothing."""
    if mx.random.state[0] is not key:
        high, low = key.tolist()
        mx.random.seed(high << 32 | low)
