"""From gradients to weights, as in ember_mlx.finetune.step: one norm judges, then comes a paced update in place.

The gradients are evaluated in the order of the backward pass: what leaves the head, then a layer at a time. Then comes
the update, likewise.
"""

from ember_mlx.planner.evaluation import Array
from ember_mlx.planner.graph import FLOAT32, Graph
from ember_mlx.planner.network import average, part_of
from ember_mlx.planner.optimizer_state import state_of

__all__ = ["judge", "rounded", "stepped", "update"]

ROWS_PER_BLOCK, ROWS_PER_ROUNDING = 4096, 512  # of ember_mlx.optimizers.ember
SMALL, NEIGHBOURS, SCRATCH = 2**16, 16, 2**17  # of ember_mlx.optimizers.guarded
MOST_BLOCKS = 256  # of an array that are planned one by one; the norm of a large one has more, and smaller
ADDED_AT_ONCE = 16  # that many additions are compiled into one kernel
ROWS_OF_KERNEL = 128  # of ember_mlx.kernels.statistics
FEW_KERNELS = ("adam", "flash", "sinkgd")  # a layer's are handed over faster than any is done; of others none measured
WHOLE_KERNELS = ("adam-mini", "flash-adamw", "flash-lion")  # whose whole step is one on a GPU


def judge(graph: Graph) -> None:
    """The norm of all gradients, which are all there before anything changes."""
    if graph.run.micro_batches > 1:
        for name, gradient in graph.gradients.items():
            before = graph.exist(gradient.numbers, gradient.width, "gradients")
            graph.gradients[name] = graph.elementwise([gradient, before], role="gradients")
    graph.evaluate(graph.losses, 0)
    graph.evaluate(graph.leaving_head, 1)
    if graph.run.workers > 1:
        _paced(graph, _as_made(graph))
        average(graph)
        graph.evaluate(list(graph.gradients.values()), len(graph.evaluations))
    graph.role = "scratch"
    order = [name for name in graph.weights if name in graph.gradients]
    small, sums = {}, []
    for place, name in enumerate(order):
        gradient = graph.gradients[name]
        if gradient.numbers < SMALL:
            small.setdefault((place // NEIGHBOURS, gradient.numbers), []).append(gradient)
        else:
            rows, features = graph.shapes[name][0], gradient.numbers // graph.shapes[name][0]
            height = max(SCRATCH // features, rows // MOST_BLOCKS, 1)
            sums.append(_mean_squares(graph, gradient, graph.shapes[name], columns=False, block=height))
    for alike in small.values():
        while True:
            groups = [alike[i : i + ADDED_AT_ONCE] for i in range(0, len(alike), ADDED_AT_ONCE)]
            alike = [graph.elementwise(group, width=FLOAT32) for group in groups]
            if len(alike) == 1:
                break
        sums.append(graph.make(alike, 1, FLOAT32))
    in_turn = [[each] for each in sums] if graph.backend == "cpu" else []  # where each of them needs scratch
    norm = graph.make(sums, 1, FLOAT32)
    _paced(graph, [*_as_made(graph), *in_turn, [norm]])


def _as_made(graph):
    """The gradients in the order of the backward pass."""
    layers, outside = _by_layer({name: [name] for name in graph.weights if name in graph.gradients})
    looked_up = [table.name for table in graph.model.tables() if table.role != "head"]
    head = [n for n in outside if n not in looked_up]
    width = max((graph.shapes[n][1] for n in head if len(graph.shapes[n]) == 2), default=0)
    # With fewer tokens (the last one counts there) than the model is wide the layers come first, as in gradient_groups.
    first = [*layers, head] if graph.run.batch_size * (graph.run.length + 1) < width else [head, *layers]
    groups = [*first, [n for n in outside if n in looked_up]]
    return [[graph.gradients[name] for name in names] for names in groups]


def update(graph: Graph) -> None:
    """The optimizers' steps, layer by layer from the last, then what is in no layer from the smallest."""
    tables = {table.name for table in graph.model.tables()}
    graph.role = "scratch"
    new = {}
    for name in graph.gradients:
        weight, state = stepped(graph, name, name in tables)
        new[name] = [weight, *state]
        graph.results += new[name]
    layers, outside = _by_layer(new)
    if graph.backend != "cpu" and graph.run.optimizer.startswith(FEW_KERNELS):
        graph.late = range(len(graph.evaluations), len(graph.evaluations) + len(layers))
    _paced(graph, [*layers, *sorted(outside.values(), key=lambda group: group[0].numbers)])
    graph.results += [w for name, w in graph.weights.items() if name not in graph.gradients]  # frozen
    if "adafactor" in (graph.run.optimizer, graph.run.tables and graph.run.table_optimizer):
        # Finite gradients may overflow there: what was before stays until the outcome is judged.
        graph.results += [graph.weights[name] for name in graph.gradients]
        graph.results += [array for array in graph.existing if array.role == "optimizer state"]


def _by_layer(named):
    """The arrays of each layer, from the last, and those outside with their names."""
    layers, outside = {}, {}
    for name, arrays in named.items():
        _, _, rest = name.partition(".layers.")
        if rest:
            layers.setdefault(int(rest.split(".")[0]), []).extend(arrays)
        else:
            outside[name] = arrays
    return [layers[number] for number in sorted(layers, reverse=True)], outside


def _paced(graph, groups):
    """One after another, once all before is done; a GPU is one ahead within them."""
    first = len(graph.evaluations)
    for group in groups:
        number = len(graph.evaluations)
        graph.evaluate(group, number if graph.backend == "cpu" else max(number - 1, first))


def stepped(graph: Graph, name: str, is_table: bool) -> tuple[Array, list[Array]]:
    """The new weight and its new state."""
    run, w, shape = graph.run, graph.weights[name], graph.shapes[name]
    optimizer = run.table_optimizer if is_table else run.optimizer
    gradient, whole = graph.gradients[name], w
    sharded = run.shard_optimizer and optimizer != "ember" and shape[0] % run.workers == 0
    if sharded:
        shape = (shape[0] // run.workers, *shape[1:])
        w, gradient = (part_of(array, array.numbers / run.workers) for array in (w, gradient))
    kept = [graph.exist(numbers, width, "optimizer state") for numbers, width in state_of(optimizer, shape, w.width)]
    # MLX's own optimizers compute 16-bit weights in float32 where tables train (ember_mlx.optimizers.in_float32).
    wide = max(w.width, FLOAT32) if run.tables else w.width
    rounds = run.body_rounding == "stochastic" and not is_table and w.width < FLOAT32
    on_gpu = graph.backend != "cpu"
    if rounds and on_gpu and optimizer == "sinkgd" and len(shape) > 1:  # a kernel that reads gradients as they lie
        new, state = graph.make([w, gradient], w.numbers), []
    elif rounds and on_gpu and optimizer in ("adam", "adamw"):
        new, *state = _by_kernel(graph, shape, gradient, w, kept)
    elif on_gpu and optimizer.startswith(WHOLE_KERNELS):
        wide_w, wide_g = (graph.elementwise([x], width=FLOAT32) if rounds else x for x in (w, gradient))
        new, *state = _by_kernel(graph, shape, wide_g, wide_w, kept)
        if rounds:  # the new weight less the old one, in float32, which another kernel rounds
            new = graph.make([graph.elementwise([new, wide_w])], w.numbers)
    else:
        new, state = RULES.get(optimizer, _elementwise)(graph, shape, gradient, w, kept, wide)
        if rounds:
            new.width = FLOAT32  # the step, which a kernel rounds into a new weight
            new = rounded(graph, w, new, shape[0])
    if sharded:
        new = graph.make([new], whole.numbers, whole.width)  # the rows of all
    new.role = "weights"
    for array in state:
        array.role = "optimizer state"
    return new, state


def _by_kernel(graph, shape, g, w, kept):
    """One kernel gives the weight and its state new memory. It reads rows, so a transposed gradient is copied."""
    if len(shape) > 1 and graph.run.fine_tune_type == "full":  # as it comes out of a product of matrices
        g = graph.make([g], g.numbers, g.width)
    return graph.several([w, g, *kept], [(array.numbers, array.width) for array in (w, *kept)])


def rounded(graph: Graph, w: Array, step: Array, rows: int) -> Array:
    """A new weight, rounded stochastically: by a kernel on a GPU, elsewhere in blocks of rows with float32 copies."""
    if graph.backend != "cpu":
        return graph.make([w, step], w.numbers)
    parts = []
    for first in range(0, rows, ROWS_PER_ROUNDING):
        numbers = min(ROWS_PER_ROUNDING, rows - first) * (w.numbers // rows)
        values, clipped = graph.several([w, step], [(numbers, FLOAT32)] * 2)
        bits = graph.elementwise([clipped, graph.make([], numbers, FLOAT32)])
        parts.append(graph.make([bits, values], numbers))
    return graph.make([w, *parts], w.numbers)


def _mean_squares(graph, g, shape, columns=True, block=ROWS_PER_BLOCK):
    """Row and column means: one kernel on a GPU, blocks of float32 squares elsewhere."""
    rows, features = shape[0], g.numbers // shape[0]
    if graph.backend != "cpu":
        of_rows, sums = graph.several([g], [(rows, FLOAT32), (-(-rows // ROWS_OF_KERNEL) * features, FLOAT32)])
        return graph.make([of_rows, sums] if columns else [of_rows], rows + features * columns, FLOAT32)
    means = []
    for first in range(0, rows, block):
        height = min(block, rows - first)
        squares = graph.make([g], height * features, FLOAT32)
        means.append(graph.make([squares], height, FLOAT32))
        if columns:
            means.append(graph.make([squares], features, FLOAT32))
    return graph.make(means, rows + features * columns, FLOAT32)


def _ember(graph, shape, g, w, kept, wide):
    moment = graph.elementwise([*kept, _mean_squares(graph, g, shape)])
    if graph.run.stochastic_rounding and w.width < FLOAT32:
        return graph.make([w, g, moment], w.numbers), [moment]  # a kernel, and blocks on a CPU, write a new table
    return graph.elementwise([w, g, moment]), [moment]


def _adam(graph, shape, g, w, kept, wide):
    """Each of the three arrays has a kernel of its own, in which narrow ones are widened and rounded."""
    moments = [graph.elementwise([moment, g], width=moment.width) for moment in kept]
    return graph.elementwise([w, *moments]), moments


def _elementwise(graph, shape, g, w, kept, wide):
    """What needs nothing of the weight's size beside the gradient: SGD, SinkGD, Adam-mini."""
    state = [
        graph.elementwise([old, g] if old.numbers == g.numbers else [old, graph.make([g], old.numbers)]) for old in kept
    ]
    return graph.elementwise([w, g, *state]), state


def _sgd(graph, shape, g, w, kept, wide):
    return graph.elementwise([w, g]), kept


def _muon(graph, shape, g, w, kept, wide):
    moment = graph.elementwise([*kept, g], width=wide)
    update = graph.elementwise([moment, g], width=wide)
    for _ in range(5 if len(shape) == 2 else 0):  # Newton-Schulz
        side = min(shape)
        square = graph.make([update], side * side, wide)
        update = graph.elementwise([update, graph.make([square, update], w.numbers, wide)])
    state = moment if wide == w.width else graph.elementwise([moment], width=w.width)
    return graph.elementwise([w, update]), [state]


def _adafactor(graph, shape, g, w, kept, wide):
    squares = graph.elementwise([g], width=wide)
    if len(shape) < 2:
        state = [graph.elementwise([*kept, squares])]
        return graph.elementwise([w, g, *state]), state
    state = [graph.elementwise([moment, graph.make([squares], moment.numbers)]) for moment in kept]
    update = graph.elementwise([graph.make(state, w.numbers, wide), g])
    size = graph.make([graph.elementwise([update])], 1)
    return graph.elementwise([w, update, size]), state


RULES = {"ember": _ember, "adam": _adam, "adamw": _adam, "sgd": _sgd, "muon": _muon, "adafactor": _adafactor}
