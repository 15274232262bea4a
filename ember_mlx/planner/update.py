"""What the optimizers make of the gradients, as MLX's and ours are written."""

from math import prod

from ember_mlx.planner.graph import FLOAT32, Graph

__all__ = ["update"]

ROWS_PER_BLOCK = 4096  # of ember_mlx.optimizers.ember
SMALL, NEIGHBOURS = 2**16, 16  # of ember_mlx.optimizers.guarded
GROUP = 32  # of ember_mlx.optimizers.companded
ADDED_AT_ONCE = 16  # that many additions are compiled into one kernel


def update(graph: Graph) -> None:
    """The optimizer's step on every gradient, guarded: nothing is changed unless all of them are finite."""
    run, tables = graph.run, {table.name for table in graph.model.tables()}
    order = [name for name in graph.weights if name in graph.gradients]
    if run.accumulate:
        for name in order:
            before = graph.exist(graph.gradients[name].numbers, graph.gradients[name].width, "gradients")
            graph.gradients[name] = graph.elementwise([graph.gradients[name], before], role="gradients")
    graph.role = "scratch"
    optimizers = {name: run.table_optimizer if name in tables else run.optimizer for name in order}
    means = {name: _mean_squares(graph, name) for name in order if optimizers[name] == "ember"}
    finite = _finite(graph, [means.get(name, graph.gradients[name]) for name in order])
    states = []
    for name in sorted(order, key=lambda name: name in tables):
        g, w = graph.gradients[name], graph.weights[name]
        new, state = _rule(optimizers[name])(graph, name, g, w, finite, means.get(name))
        new.role = "weights"
        graph.results.append(new)
        states += state
    for array in states:
        array.role = "optimizer state"
    graph.results += states
    graph.results += [w for name, w in graph.weights.items() if name not in order]  # frozen: the model keeps them


def _finite(graph, witnesses):
    """One number of all of them: neighbours of one shape, if they are small, are added up first."""
    small, sums = {}, []
    for place, array in enumerate(witnesses):
        if array.numbers < SMALL:
            small.setdefault((place // NEIGHBOURS, array.numbers), []).append(array)
        else:
            sums.append(graph.make([array], 1))
    for alike in small.values():
        while len(alike) > 1:
            groups = [alike[i : i + ADDED_AT_ONCE] for i in range(0, len(alike), ADDED_AT_ONCE)]
            alike = [graph.elementwise(group, width=FLOAT32) for group in groups]
        sums.append(graph.make(alike, 1))
    return graph.make(sums, 1)


def _state(graph, numbers, width):
    return graph.exist(numbers, width, "optimizer state")


def _mean_squares(graph, name):
    """Ember's row and column means: one kernel on a GPU, blocks of float32 squares elsewhere."""
    g, (rows, columns) = graph.gradients[name], graph.shapes[name]
    if graph.backend != "cpu":
        return graph.make([g], rows + columns, FLOAT32)
    sums = []
    for first in range(0, rows, ROWS_PER_BLOCK):
        height = min(ROWS_PER_BLOCK, rows - first)
        squares = graph.elementwise([g], height * columns, FLOAT32)
        sums += [graph.make([squares], height, FLOAT32), graph.make([squares], columns, FLOAT32)]
    return graph.make(sums, rows + columns, FLOAT32)


def _ember(graph, name, g, w, finite, means):
    moment = _state(graph, means.numbers, FLOAT32)
    new = graph.elementwise([moment, means])
    if graph.run.stochastic_rounding and w.width < FLOAT32:
        g = graph.make([w, g, new], w.numbers)  # a kernel, and blocks on a CPU, write a new table
    return graph.elementwise([w, g, new, finite], w.numbers), [graph.elementwise([new, moment, finite])]


def _adam(graph, name, g, w, finite, means):
    moments = [_state(graph, w.numbers, w.width) for _ in "mv"]
    new = [graph.elementwise([moment, g]) for moment in moments]
    return graph.elementwise([w, *new, finite]), [
        graph.elementwise([n, moment, finite]) for n, moment in zip(new, moments, strict=True)
    ]


def _ours(*kept, rest=False):
    """Ours, in pieces: new state beside the old, and no float32 copy of a whole weight.

    Args:
        kept (callable): (graph, name) -> pairs of a count of numbers and their width, one array each.
        rest (bool): Whether a bfloat16 weight keeps an int8 rest.
    """

    def rule(graph, name, g, w, finite, means):
        sizes = [size for of in kept for size in of(graph, name)]
        sizes += [(w.numbers, 1)] if rest and w.width == 2 else []
        old = [_state(graph, numbers, width) for numbers, width in sizes]
        new = [graph.make([g, w, *old], array.numbers, array.width) for array in old]
        return graph.elementwise([w, g, *old, finite], w.numbers), [
            graph.elementwise([n, moment, finite], moment.numbers, moment.width)
            for n, moment in zip(new, old, strict=True)
        ]

    return rule


def _float32(graph, name):
    return [(prod(graph.shapes[name]), FLOAT32)]


def _blocks(graph, name):
    """As :func:`ember_mlx.optimizers.adam_mini.blocks_of` counts them."""
    shape, last = graph.shapes[name], name.rpartition(".")[2]
    if last in ("lora_a", "lora_b"):
        return [(shape[-1], FLOAT32)]
    heads = {"q_proj": graph.model.heads, "k_proj": graph.model.kv_heads}
    return [(heads[last] if last in heads and len(shape) == 2 else prod(shape[:-1]), FLOAT32)]


def _columns(graph, name):
    return [(graph.shapes[name][-1], FLOAT32)]


def _eight_bits(graph, name):
    groups = -(-prod(graph.shapes[name]) // GROUP)
    return [(GROUP * groups, 1), (groups, FLOAT32)]


def _of_vectors(graph, name):
    return 2 * _float32(graph, name) if len(graph.shapes[name]) < 2 else []


def _rule(name):
    name, *options = name.split()
    if name in RULES:
        return RULES[name]
    kept = OURS[f"{name} int8" if "int8" in options else name]
    return _ours(*kept, rest="bf16+int8" in options)


def _sgd(graph, name, g, w, finite, means):
    _state(graph, w.numbers, w.width)  # kept, though there is no momentum
    return graph.elementwise([w, g, finite]), []


def _muon(graph, name, g, w, finite, means):
    moment = _state(graph, w.numbers, w.width)
    new = graph.elementwise([moment, g])
    update = graph.elementwise([new, g])
    for _ in range(5 if len(graph.shapes[name]) == 2 else 0):  # Newton-Schulz
        side = min(graph.shapes[name])
        square = graph.make([update], side * side)
        update = graph.elementwise([update, graph.make([square, update], w.numbers)])
    return graph.elementwise([w, update, finite]), [graph.elementwise([new, moment, finite])]


def _adafactor(graph, name, g, w, finite, means):
    shape = graph.shapes[name]
    squares = graph.elementwise([g])
    if len(shape) < 2:
        moment = _state(graph, w.numbers, w.width)
        new = graph.elementwise([moment, squares])
        return graph.elementwise([w, g, new, finite]), [graph.elementwise([new, moment, finite])]
    moments = [_state(graph, size, w.width) for size in shape]
    new = [graph.elementwise([moment, graph.make([squares], moment.numbers)]) for moment in moments]
    update = graph.elementwise([graph.make(new, w.numbers), g])
    size = graph.make([graph.elementwise([update])], 1)
    return graph.elementwise([w, update, size, finite]), [
        graph.elementwise([n, moment, finite]) for n, moment in zip(new, moments, strict=True)
    ]


OURS = {
    "adam-mini": (_float32, _blocks),
    "adam-mini int8": (_eight_bits, _blocks),
    "sinkgd": (_of_vectors,),
    "flash-adamw": (_eight_bits, _eight_bits),
    "flash-lion": (_eight_bits,),
    "sage": (_float32, _columns),
}
RULES = {
    "ember": _ember,
    "adam": _adam,
    "adamw": _adam,
    "sgd": _sgd,
    "muon": _muon,
    "adafactor": _adafactor,
}
