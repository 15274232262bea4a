"""Ember on the token tables and any other MLX optimizer on the rest, as one optimizer."""

import mlx.core as mx
from mlx.optimizers import MultiOptimizer, Optimizer
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from ember_mlx.errors import InputError
from ember_mlx.token_tables import LOOKED_FOR, find_token_tables

__all__ = ["PairedOptimizer"]


class PairedOptimizer(Optimizer):
    """One optimizer for the token tables, another for the rest of a model, each with its own learning rate.

    It goes wherever an ``mlx.optimizers.Optimizer`` goes: a loop of one's own, ``mx.compile``, mlx-lm's ``train``.
    Make it after freezing, unfreezing and ``linear_to_lora_layers``: what is trainable then is what it trains.

    Args:
        model (mlx.nn.Module): The model; its token tables are those of :func:`ember_mlx.find_token_tables`.
        tables (Optimizer): For the trainable token tables, usually :class:`ember_mlx.Ember`.
        rest (Optimizer): For every other trainable parameter.

    ``learning_rate`` is that of the rest, as mlx-lm reports it; ``table_learning_rate`` that of the tables. Setting
    one never touches the other, and each may be a schedule.

    ``state`` is the same container for the life of the optimizer, so ``mx.compile`` may capture it. Its names are the
    parameters' paths; assigning a state (nested or flat, in any order) fills it by name:

        mx.save_safetensors("optimizer.safetensors", dict(tree_flatten(optimizer.state)))
        optimizer.state = mx.load("optimizer.safetensors")

    Raises:
        InputError: (a ``ValueError``) when no token table is trainable, when one stands in the model twice, when a
            gradient is of a parameter that was not trainable at the start, and when an assigned state does not fit name
            by name.

    Example:
        >>> optimizer = PairedOptimizer(model, tables=Ember(1e-3), rest=AdamW(1e-5, bias_correction=True))
        >>> optimizer.update(model, gradients)
    """

    def __init__(self, model, tables: Optimizer, rest: Optimizer):
        for name, optimizer in {"tables": tables, "rest": rest}.items():
            if not isinstance(optimizer, Optimizer):
                raise InputError(f"PairedOptimizer({name}={optimizer!r}): must be an mlx.optimizers.Optimizer, made")
        if tables is rest:
            raise InputError("PairedOptimizer: tables and rest are one and the same optimizer: make two")
        self.tables = tables
        self.rest = rest
        found = {table.path for table in find_token_tables(model)}
        trainable = dict(tree_flatten(model.trainable_parameters()))
        self._table_paths = frozenset(found & trainable.keys())
        if not self._table_paths:
            raise InputError(_no_table(model))
        _refuse_shared(model, self._table_paths)
        self._rest_paths = frozenset(trainable) - self._table_paths
        self._state = {"tables": tables.state, "rest": rest.state}
        self.init(trainable)

    def init(self, parameters):
        """Make the state of ``parameters``; what is there already stays. Done when the optimizer is made."""
        tables, rest = self._split(parameters)
        self.tables.init(tables)
        self.rest.init(self._as_rest_takes_it(rest))

    def apply_gradients(self, gradients, parameters):
        tables, rest = self._split(gradients)
        flat = dict(tree_flatten(parameters))
        updated = self.tables.apply_gradients(tables, flat)
        rest_parameters = self._as_rest_takes_it({path: flat[path] for path in rest})
        updated |= tree_flatten(self.rest.apply_gradients(self._as_rest_takes_it(rest), rest_parameters))
        return tree_map_with_path(lambda path, _: updated[path], gradients)

    def side_of(self, path):
        """The optimizer that trains the parameter at ``path``."""
        if path in self._table_paths:
            return self.tables
        if path in self._rest_paths:
            return self.rest
        raise InputError(
            f"PairedOptimizer: {path} was not trainable when the optimizer was made, so no side has state for it: "
            "freeze it, or make a new PairedOptimizer after unfreezing it"
        )

    @property
    def state(self):
        return self._state

    @state.setter
    def state(self, state):
        own, new = dict(tree_flatten(self._state)), dict(tree_flatten(state))
        for name in own | new:
            if name not in own or name not in new:
                raise InputError(
                    f"PairedOptimizer.state: {name} is {'missing' if name in own else 'not of this optimizer'}: assign "
                    "a state saved from the same model with the same trainable parameters and optimizers"
                )
            if own[name].shape != new[name].shape or own[name].dtype != new[name].dtype:
                raise InputError(
                    f"PairedOptimizer.state: {name} has shape {new[name].shape} and dtype {new[name].dtype}, which "
                    f"must be {own[name].shape} and {own[name].dtype}: assign the state of this model"
                )
        # In place, name by name: a compiled step holds these very containers.
        _fill(self._state, new)

    @property
    def step(self):
        """The number of steps done, an mx.array; both sides count alike."""
        return self.tables.step

    @property
    def learning_rate(self):
        return self.rest.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.rest.learning_rate = learning_rate

    @property
    def table_learning_rate(self):
        return self.tables.learning_rate

    @table_learning_rate.setter
    def table_learning_rate(self, learning_rate):
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


def _fill(container, arrays, prefix=""):
    for key, value in container.items() if isinstance(container, dict) else enumerate(container):
        name = f"{prefix}{key}"
        if isinstance(value, mx.array):
            container[key] = arrays[name]
        else:
            _fill(value, arrays, f"{name}.")


def _refuse_shared(model, table_paths):
    """A module in two places has two names, and MLX gives its gradient to one of them only."""
    seen, owners = {}, {path.rpartition(".")[0] for path in table_paths}
    for path, module in model.named_modules():
        first = seen.setdefault(id(module), path)
        if first != path and {first, path} & owners:
            raise InputError(
                f"PairedOptimizer: {first} and {path} are one and the same module, so its gradient could go to either "
                "side: keep it in one place, and call it from there"
            )


def _no_table(model):
    found = ", ".join(table.path for table in find_token_tables(model))
    if not found:
        return f"PairedOptimizer: no token table in {type(model).__name__}; looked for {LOOKED_FOR}"
    return (
        f"PairedOptimizer: no token table of {type(model).__name__} is trainable; found {found}, frozen or quantized: "
        "unfreeze one (a quantized one must be dequantized first)"
    )
