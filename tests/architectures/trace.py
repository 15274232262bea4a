"""Which weights meet token ids and which produce the logits, found by running the model; module classes play no part.

For token ids T and one token v outside T, the gradient of the logits of v is nonzero
    in exactly the rows T of a table that is looked up by token id,
    in exactly the row {v} of a table that produces the logits,
    in exactly the rows T + {v} of a table that does both.
Any other weight has another pattern: a matrix has all rows, positions have the first len(T), hashed n-grams other rows.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

IDS = [11, 29, 140, 23, 17, 131]
ABSENT = 97


def trace_token_tables(model: nn.Module, *, one_by_one: bool = False) -> dict[str, str]:
    """Path of each token table -> "embedding", "head" or "tied". Replaces the model's weights by random ones.

    `one_by_one` feeds sequences of one token instead of one sequence.
    """
    _randomize(model)
    ids = mx.array([[i] for i in IDS] if one_by_one else [IDS])
    logits = model(ids)
    assert not mx.isnan(logits).any(), "the tiny model's logits are not numbers: the trace would mean nothing"
    parameters = dict(tree_flatten(model.parameters()))
    floating = {path: p for path, p in parameters.items() if mx.issubdtype(p.dtype, mx.floating)}

    def absent_logits(trial: dict[str, mx.array]) -> mx.array:
        model.update(tree_unflatten(list(trial.items())))
        return _weighted(model(ids)[..., ABSENT])

    try:
        gradients = mx.grad(absent_logits)(floating)
        mx.eval(gradients)
    except (ValueError, RuntimeError):
        gradients = {}  # a kernel without a gradient: everything is perturbed
    model.update(tree_unflatten(list(floating.items())))

    roles = {}
    for path, matrix in parameters.items():
        # The scales and biases of a packed weight share its rows: the weight speaks for them.
        packed = parameters.get(path.rpartition(".")[0] + ".weight")
        if matrix.ndim != 2 or (packed is not matrix and packed is not None and packed.dtype == mx.uint32):
            continue
        if path in gradients:
            roles[path] = _role_from_gradient(gradients[path])
        elif matrix.shape[0] > max(IDS):
            roles[path] = _role_from_perturbation(model, path, matrix, ids)
    return {path: role for path, role in roles.items() if role}


def _randomize(model: nn.Module) -> None:
    # Some heads and gains start at zero, which would hide every gradient behind them.
    mx.random.seed(0)
    floating = [(n, p) for n, p in tree_flatten(model.parameters()) if mx.issubdtype(p.dtype, mx.floating)]
    noisy = [(n, p + 0.05 * mx.random.normal(p.shape).astype(p.dtype)) for n, p in floating]
    model.update(tree_unflatten(noisy))
    mx.eval(model.parameters())


def _weighted(logits: mx.array) -> mx.array:
    # Unequal weights: equal ones could cancel.
    return (logits.flatten().astype(mx.float32) * mx.array([1.0, -2.0, 3.0, -4.0, 5.0, -6.0])).sum()


def _role_from_gradient(gradient: mx.array) -> str | None:
    nonzero = mx.any(gradient != 0, axis=1).tolist()
    rows = {i for i, hit in enumerate(nonzero) if hit}
    return {frozenset(IDS): "embedding", frozenset({ABSENT}): "head", frozenset({*IDS, ABSENT}): "tied"}.get(
        frozenset(rows)
    )


def _role_from_perturbation(model: nn.Module, path: str, matrix: mx.array, ids: mx.array) -> str | None:
    """The same for a weight that has no gradient: change a row, see which columns of the logits move."""
    logits = model(ids)

    def moved(row: int) -> set[int]:
        changed = mx.array(matrix)
        changed[row] = ~changed[row] if changed.dtype == mx.uint32 else changed[row] + 1
        model.update(tree_unflatten([(path, changed)]))
        columns = mx.any(model(ids) != logits, axis=(0, 1)).tolist()
        model.update(tree_unflatten([(path, matrix)]))
        return {i for i, hit in enumerate(columns) if hit}

    # Two rows each: a single row of some matrix may happen to move nothing.
    present, absent = [(i, moved(i)) for i in (IDS[0], IDS[2])], [(i, moved(i)) for i in (ABSENT, ABSENT + 1)]
    if any(columns - {row} for row, columns in absent):
        return None
    looked_up = all(columns - {row} for row, columns in present)
    answers = all(columns == {row} for row, columns in absent)
    return {(True, False): "embedding", (False, True): "head", (True, True): "tied"}.get((looked_up, answers))
