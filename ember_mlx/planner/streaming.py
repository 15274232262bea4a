"""The peak of a streamed step (ember_mlx.streaming): the weights and the state, and little above them.

A sum of sizes, since nothing is in flight for long: kept inputs of the layers, and the largest of three moments. One
layer's activations and cotangents are there with one matrix that is stepped, or the kept logits with a block of the
head, or a whole table that Ember does not train. On a GPU what is in flight comes on top.
"""

from collections import Counter
from math import prod

from ember_mlx.planner.architecture import Architecture
from ember_mlx.planner.evaluation import Peak
from ember_mlx.planner.graph import FLOAT32, Graph, Run
from ember_mlx.planner.optimizer_state import state_of

__all__ = ["streamed_peak"]

SHARE_OF_LOGITS = 8  # of ember_mlx.streaming: the logits are kept up to this part of the weights
BLOCKS = 36  # of ember_mlx.streaming: the head is cut into so many
LOGITS_AT_ONCE = 2**24  # of ember_mlx.streaming: or into blocks of so many logits


def streamed_peak(model: Architecture, run: Run, step: Graph) -> Peak:
    """Bytes at the worst moment of a streamed step.

    Args:
        model: Its shapes.
        run: What of the options matters.
        step: The ordinary step of the same run: what its weights, gradients and state are.
    """
    tokens, width = run.batch_size * run.length, model.width
    tables = {table.name: table for table in model.tables(run.tables)}
    always = Counter(activations=(model.layers + 1) * tokens * model.hidden * width)
    for array in step.existing:
        if array.role in ("weights", "optimizer state"):
            always[array.role] += array.nbytes
    of_layer = sum(linear.inputs + linear.outputs for linear in (model.linears(0) if model.layers else []))
    matrices = [_stepping(step, name, run.optimizer) for name in step.gradients if name not in tables]
    moments = [Counter(activations=2 * tokens * of_layer * width)]  # and as much of cotangents
    moments[0] += max(matrices, key=Counter.total, default=Counter())
    head = next(table for table in tables.values() if table.role != "embedding")
    moments.append(_head(head, head.name in step.gradients, tokens, width, always["weights"]))
    if run.table_optimizer != "ember":
        moments += [_stepping(step, name, run.table_optimizer) for name in tables if name in step.gradients]
    worst = always + max(moments, key=Counter.total)
    most = Counter(always)
    for moment in moments:
        most |= always + moment
    return Peak(worst.total(), worst, most)


def _stepping(step: Graph, name: str, optimizer: str) -> Counter:
    """What it takes to step one weight: its gradient, the new weight, and float32 copies where it has fewer bits."""
    shape, width = step.shapes[name], step.weights[name].width
    numbers = prod(shape)
    whole = sum(kept == numbers for kept, _ in state_of(optimizer, shape, width))
    copies = (1 + whole) * FLOAT32 if width < FLOAT32 else whole * width
    return Counter(gradients=numbers * width, scratch=numbers * (width + copies))


def _head(head, trained, tokens, width, weights):
    rows = min(max(LOGITS_AT_ONCE // tokens, 128), max(head.rows // BLOCKS, 128), head.rows)
    kept = tokens * head.rows * width
    block = 2 * tokens * rows * FLOAT32 + 2 * rows * head.columns * FLOAT32
    by_hidden = 2 * tokens * head.columns * FLOAT32
    return Counter(logits=kept if trained and kept <= weights / SHARE_OF_LOGITS else 0, scratch=block + by_hidden)
