"""Ember on the token tables and any other MLX optimizer on the rest, as one optimizer."""

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import MultiOptimizer, Optimizer
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from ember_mlx.optimizers.body import Tree
from ember_mlx.optimizers.guarded import Guard
from ember_mlx.optimizers.in_float32 import stock_in_float32
from ember_mlx.shared.errors import InputError
from ember_mlx.token_tables import LOOKED_FOR, find_token_tables

__all__ = ["PairedOptimizer"]


class PairedOptimizer(Guard):
    """One optimizer for the token tables, another for the rest of a model, each with its own learning rate.

    Optimizers of ``mlx.optimizers`` compute in float32 for 16-bit weights here, and round once, to nearest: in float16
    Adam's eps would be 0. Their state for float16 weights is float32. Such an optimizer is changed for good.

    It goes wherever an ``mlx.optimizers.Optimizer`` goes: a loop of one's own, ``mx.compile``, mlx-lm's ``train``.
    Make it after freezing, unfreezing and ``linear_to_lora_layers``: what is trainable then is what it trains.

    Args:
        model (mlx.nn.Module): The model; its token tables are those of :func:`ember_mlx.find_token_tables`.
        tables (Optimizer): For the trainable token tables, usually :class:`ember_mlx.Ember`.
        rest (Optimizer): For every other trainable parameter.
        skip_nonfinite (bool): Let a step whose gradients hold a NaN or an infinity change nothing, neither weights nor
            state, and count it in ``nonfinite_steps``. Gradients whose squares overflow are such too.
        clip_grad_norm (float, optional): Scale the gradients of tables and rest together to at most this global norm,
            which is computed in float32.

    ``learning_rate`` is that of the rest, as mlx-lm reports it; ``table_learning_rate`` that of the tables. Setting
    one never touches the other, and each may be a schedule.

    ``state`` is the same container for the life of the optimizer, so ``mx.compile`` may capture it. Its names are the
    parameters' paths; assigning a state (nested or flat, in any order) fills it by name:

        mx.save_safetensors("optimizer.safetensors", dict(tree_flatten(optimizer.state)))
        optimizer.state = mx.load("optimizer.safetensors")

    Inside ``mx.compile`` nothing can be raised, so a loop that is to stop at a NaN asks between two steps, when the
    state has been evaluated. :class:`ember_mlx.optimizers.guarded.GuardedOptimizer` says more of the guard:

        if optimizer.nonfinite_steps.item():
            break

    Raises:
        InputError: (a ``ValueError``) when no token table is trainable, when one stands in the model twice, when a
            gradient is of a parameter that was not trainable at the start, and when an assigned state does not fit name
            by name; for a ``clip_grad_norm`` that is not above 0.

    Example:
        >>> optimizer = PairedOptimizer(model, tables=Ember(1e-3), rest=AdamW(1e-5, bias_correction=True))
        >>> optimizer.update(model, gradients)
    """

    def __init__(
        self,
        model: nn.Module,
        tables: Optimizer,
        rest: Optimizer,
        skip_nonfinite: bool = False,
        clip_grad_norm: float | None = None,
    ):
        for name, optimizer in {"tables": tables, "rest": rest}.items():
            if not isinstance(optimizer, Optimizer):
                raise InputError(f"PairedOptimizer({name}={optimizer!r}): must be an mlx.optimizers.Optimizer, made")
        if tables is rest:
            raise InputError("PairedOptimizer: tables and rest are one and the same optimizer: make two")
        for optimizer in (tables, rest):
            stock_in_float32(optimizer)
        self.tables = tables
        found = {table.path for table in find_token_tables(model)}
        trainable = dict(tree_flatten(model.trainable_parameters()))
        self._table_paths = frozenset(found & trainable.keys())
        if not self._table_paths:
            raise InputError(_no_table(model))
        _refuse_shared(model, self._table_paths)
        self._rest_paths = frozenset(trainable) - self._table_paths
        self.rest = rest
        super().__init__(trainable, {"rest": rest, "tables": tables}, skip_nonfinite, clip_grad_norm)
        self.init(trainable)

    def init(self, parameters: Tree) -> None:
        tables, rest = self._split(parameters)
        self.tables.init(tables)
        self.rest.init(self._as_rest_takes_it(rest))

    def apply_unguarded(self, gradients: Tree, parameters: Tree) -> Tree:
        """The update alone, of gradients that are judged and clipped already."""
        tables, rest = self._split(gradients)
        flat = dict(tree_flatten(parameters))
        updated = self.tables.apply_gradients(tables, flat)
        rest_parameters = self._as_rest_takes_it({path: flat[path] for path in rest})
        updated |= tree_flatten(self.rest.apply_gradients(self._as_rest_takes_it(rest), rest_parameters))
        return tree_map_with_path(lambda path, _: updated[path], gradients)

    def side_of(self, path: str) -> Optimizer:
        """The optimizer that trains the parameter at ``path``."""
        if path in self._table_paths:
            return self.tables
        if path in self._rest_paths:
            return self.rest
        raise InputError(
            f"PairedOptimizer: {path} was not trainable when the optimizer was made, so no side has state for it; "
            "freeze it, or make a new PairedOptimizer after unfreezing it"
        )

    @property
    def step(self) -> mx.array:
        """The number of steps done, an mx.array; both sides count alike."""
        return self.tables.step

    @property
    def learning_rate(self) -> mx.array:
        return self.rest.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.array) -> None:
        self.rest.learning_rate = learning_rate

    @property
    def table_learning_rate(self) -> mx.array:
        return self.tables.learning_rate

    @table_learning_rate.setter
    def table_learning_rate(self, learning_rate: float | mx.array) -> None:
        self.tables.learning_rate = learning_rate

    def _split(self, tree):
        """Flat dicts, path -> array, for the two sides: a path names its state, wherever it stands in the tree."""
        tables, rest = {}, {}
        for path, array in tree_flatten(tree):
            (tables if self.side_of(path) is self.tables else rest)[path] = array
        return tables, rest

    def _as_rest_takes_it(self, flat):
        """MultiOptimizer makes trees of what it gets, so its parts must be trees too."""
        return tree_unflatten(list(flat.items())) if flat and isinstance(self.rest, MultiOptimizer) else flat


def _refuse_shared(model, table_paths):
    """A module in two places has two names, and MLX gives its gradient to one of them only."""
    seen, owners = {}, {path.rpartition(".")[0] for path in table_paths}
    for path, module in model.named_modules():
        first = seen.setdefault(id(module), path)
        if first != path and {first, path} & owners:
            raise InputError(
                f"PairedOptimizer: {first} and {path} are one and the same module, so its gradient could go to either "
                "side; keep it in one place, and call it from there"
            )


def _no_table(model):
    found = ", ".join(table.path for table in find_token_tables(model))
    if not found:
        return f"PairedOptimizer: no token table in {type(model).__name__}; looked for {LOOKED_FOR}"
    return (
        f"PairedOptimizer: no token table of {type(model).__name__} is trainable; found {found}, frozen or quantized: "
        "unfreeze one (a quantized one must be dequantized first)"
    )
