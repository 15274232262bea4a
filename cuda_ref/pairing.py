"""Ember on the token tables and any other PyTorch optimizer on the rest, as one optimizer."""

import warnings
import weakref
from collections.abc import Callable, MutableMapping
from itertools import chain
from typing import NoReturn

import torch
from torch.optim import Optimizer

from cuda_ref.optimizers import Ember
from cuda_ref.optimizers.base import WrappingOptimizer
from cuda_ref.optimizers.checks import loss_of, name_of
from cuda_ref.token_tables import LOOKED_FOR, find_token_tables
from ember_mlx.shared.errors import InputError

__all__ = ["PairedOptimizer"]


class PairedOptimizer(WrappingOptimizer):
    """One optimizer for the token tables, another for the rest of a model, each with its own learning rate.

    It goes wherever a ``torch.optim.Optimizer`` goes: a loop of one's own, LR schedulers, ``GradScaler``, accelerate,
    Hugging Face's ``Trainer``, ``torch.distributed.checkpoint``. Make it after freezing, unfreezing, adding adapters
    and ``fully_shard``: what is trainable then is what it trains.

    Args:
        model (nn.Module): The model; its token tables are those of :func:`cuda_ref.find_token_tables`.
        tables (callable): Gets the trainable token tables as a list of (name, parameter), which every PyTorch optimizer
            takes, and returns the optimizer for them, usually :class:`cuda_ref.Ember`.
        rest (callable): The same for every other trainable parameter; not called when there is none.

    Attributes:
        tables, rest (Optimizer): The two optimizers; ``rest`` is None when only tables train.
        param_groups (list of dict): The groups of the rest, then those of the tables: the very dicts that the two
            optimizers read. Loggers, Trainer's too, show the learning rate of the first.
        state (mapping): Parameter -> its state, of both sides.

    A scheduler scales each group's own ``lr``; one that takes a list, such as ``LambdaLR``, takes it in the order of
    ``param_groups``. ``OneCycleLR`` and ``CyclicLR`` need ``cycle_momentum=False``, for Ember has no momentum.

    Raises:
        InputError: (a ``ValueError``) when no token table is trainable, when ``tables`` or ``rest`` is no callable or
            returns no optimizer of just the parameters that it got, for ``add_param_group``, and when a loaded state
            does not fit; nothing is loaded then.

    Examples:
        >>> optimizer = PairedOptimizer(model, tables=partial(Ember, lr=1e-4), rest=partial(AdamW, lr=2e-5, fused=True))
        >>> trainer = Trainer(model, args, optimizers=(optimizer, None), ...)  # args.learning_rate is not used

        Groups of one's own, here without decay of norms and biases:

        >>> def adamw(named):
        ...     matrices = {"params": [(name, p) for name, p in named if p.ndim > 1]}
        ...     vectors = {"params": [(name, p) for name, p in named if p.ndim < 2], "weight_decay": 0.0}
        ...     return AdamW([matrices, vectors], lr=2e-5, weight_decay=0.1)
        >>> optimizer = PairedOptimizer(model, tables=partial(Ember, lr=1e-4), rest=adamw)

        Made by Trainer itself, on which it insists under FSDP:

        >>> sides = {"tables": partial(Ember, lr=1e-4), "rest": adamw}
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=(lambda: PairedOptimizer, sides), ...)
    """

    def __init__(self, model: torch.nn.Module, tables: Callable[[list], Optimizer], rest: Callable[[list], Optimizer]):
        if not isinstance(model, torch.nn.Module):
            raise InputError(
                f"PairedOptimizer(model={type(model).__name__}): the first argument is the torch.nn.Module, not its "
                "parameters. Trainer gives it when told optimizer_cls_and_kwargs=(lambda: PairedOptimizer, sides)"
            )
        found = find_token_tables(model)
        paths = {table.path for table in found}
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        of_tables = [(name, p) for name, p in trainable if name in paths]
        of_rest = [(name, p) for name, p in trainable if name not in paths]
        if not of_tables:
            raise InputError(_no_table(model, found))
        sides = {
            "tables": _side("tables", tables, of_tables),
            "rest": _side("rest", rest, of_rest) if of_rest else None,
        }
        # Optimizer.__init__ would make groups and state beside those of the sides; this sets up all else that it does.
        self.__setstate__({"defaults": {}, **sides})
        self._model = weakref.ref(model)
        self._table_paths = {p: name for name, p in of_tables}

    def __getstate__(self):
        # A copy belongs to the copy of the model, which it does not know.
        return {"defaults": self.defaults, "tables": self.tables, "rest": self.rest}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._model, self._table_paths = lambda: None, {}
        self._stepped = {}  # parameter -> its shape, dtype and device in the last step, which its state has too

    @property
    def param_groups(self) -> list[dict]:
        """The groups of the rest, then those of the tables."""
        return [group for side in self._sides for group in side.param_groups]

    @property
    def state(self) -> MutableMapping:
        """Parameter -> its state, of both sides."""
        return _StateOfBoth(self._sides)

    @property
    def _sides(self):
        return [side for side in (self.rest, self.tables) if side is not None]

    def add_param_group(self, param_group: dict) -> NoReturn:
        """Raises InputError: a group belongs to one side."""
        raise InputError(
            "PairedOptimizer.add_param_group: a group belongs to one side: call .rest.add_param_group or "
            ".tables.add_param_group, and make the learning rate scheduler afterwards"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As PyTorch's, of both sides."""
        for side in self._sides:
            side.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both optimizers; returns what ``closure`` returns, which is called once."""
        loss = loss_of(closure)
        if stale := self._stale():
            warnings.warn(
                f"PairedOptimizer.step: {stale}. Make the optimizer after adapters, new tokens and fully_shard",
                stacklevel=3,
            )
        self._check_state()
        for side in reversed(self._sides):  # Ember refuses a bad gradient before anything is written
            side.step()
        self._stepped = {p: _form(p) for p in self._parameters() if p.grad is not None}
        return loss

    def _parameters(self):
        return (p for group in self.param_groups for p in group["params"])

    def _stale(self):
        """What to say where a token table does not train that should, or None."""
        tables = [p for group in self.tables.param_groups for p in group["params"]]
        if all(p.grad is None for p in tables):
            return "no token table has a gradient"
        model = self._model()
        if model is None or all(_is_at(model, path, p) for p, path in self._table_paths.items()):
            return None
        kept = set(model.parameters())
        replaced = [path for p, path in self._table_paths.items() if p not in kept]
        return f"the model has replaced {', '.join(replaced)}, which trains no longer" if replaced else None

    def _check_state(self):
        """Every parameter must have the form for which its state was made: most optimizers fail in the middle else."""
        for side in self._sides:
            named = [(name_of(group, i), p) for group in side.param_groups for i, p in enumerate(group["params"])]
            for name, p in named if not isinstance(side, Ember) else ():  # which looks for itself
                was, now = self._stepped.get(p), _form(p)
                state = [x for x in side.state.get(p, {}).values() if isinstance(x, torch.Tensor) and x.ndim]
                if was not in (None, now) and p.grad is not None and state:
                    raise InputError(
                        f"PairedOptimizer.step: {name} was {_in_words(was)} in the last step and is "
                        f"{_in_words(now)}: its state no longer fits. Convert, move or resize the model before the "
                        "first step, or make the optimizer anew"
                    )

    def _joined_state(self):
        joined = {"state": {}, "param_groups": []}
        first = 0  # number of a parameter
        for side in self._sides:
            saved = side.state_dict()
            for number, state in saved["state"].items():
                joined["state"][first + number if isinstance(number, int) else number] = state
            for group in saved["param_groups"]:
                joined["param_groups"].append(group | {"params": [first + number for number in group["params"]]})
            first += sum(len(group["params"]) for group in saved["param_groups"])
        return joined

    def _load_parts(self, state_dict):
        """The groups decide what is whose."""
        groups, state = state_dict["param_groups"], state_dict["state"]
        saved, own = ([len(group["params"]) for group in of] for of in (groups, self.param_groups))
        if saved != own:
            raise InputError(
                f"PairedOptimizer.load_state_dict: the saved groups hold {saved} parameters, those of this optimizer "
                f"{own}; load the state of the same model with the same trainable parameters, tables and rest"
            )
        first = len(groups) - len(self.tables.param_groups)
        of_tables = {i for group in groups[first:] for i in group["params"]}
        # Ember's first: it refuses the state of another table before anything is written.
        for side, part in ((self.tables, groups[first:]), (self.rest, groups[:first])):
            if side is not None:
                own_state = {i: value for i, value in state.items() if (i in of_tables) == (side is self.tables)}
                side.load_state_dict({"state": own_state, "param_groups": part})
        self._stepped = {}


class _StateOfBoth(MutableMapping):
    """What ``Optimizer.state`` is, read from and written to two optimizers: an empty dict for what has none yet."""

    def __init__(self, sides):
        self._sides = sides

    def _where(self, parameter):
        holding = (side.state for side in self._sides if parameter in side.state)
        training = (s.state for s in self._sides for g in s.param_groups if any(parameter is p for p in g["params"]))
        for state in chain(holding, training):
            return state
        raise KeyError(parameter)

    def __getitem__(self, parameter):
        return self._where(parameter)[parameter]

    def __setitem__(self, parameter, state):
        self._where(parameter)[parameter] = state

    def __delitem__(self, parameter):
        del self._where(parameter)[parameter]

    def __contains__(self, parameter):
        return any(parameter in side.state for side in self._sides)

    def __iter__(self):
        return chain.from_iterable(side.state for side in self._sides)

    def __len__(self):
        return sum(len(side.state) for side in self._sides)


def _form(p):
    return tuple(p.shape), p.dtype, p.device


def _in_words(form):
    shape, dtype, device = form
    return f"{shape} in {str(dtype).removeprefix('torch.')} on {device}"


def _is_at(model, path, p):
    """Whether the model has just this parameter there; quicker than to look through all of them."""
    try:
        return model.get_parameter(path) is p
    except AttributeError:
        return False


def _side(name, make, named):
    """The optimizer that ``make`` makes of the named parameters: of all of them, and of no others."""
    usual = {"tables": "Ember, lr=1e-4", "rest": "torch.optim.AdamW, lr=2e-5"}[name]
    allowed = f"must be a callable that makes an optimizer of a list of (name, parameter), such as partial({usual})"
    if not callable(make):
        raise InputError(f"PairedOptimizer: {name} is of type {type(make).__name__}; {allowed}")
    optimizer = make(list(named))
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"PairedOptimizer: {name} returned an object of type {type(optimizer).__name__}; {allowed}")
    got = {p for group in optimizer.param_groups for p in group["params"]}
    lost = [path for path, p in named if p not in got]
    if lost or len(got) != len(named):
        wrong = f"left out {', '.join(lost)}" if lost else f"added {len(got) - len(named)} parameters of its own"
        raise InputError(
            f"PairedOptimizer: {name} {wrong}; its groups must hold what it was given, no less and no more"
        )
    return optimizer


def _no_table(model, found):
    if not found:
        return f"PairedOptimizer: no token table in {type(model).__name__}; looked for {LOOKED_FOR}"
    remedy = "set requires_grad of one before this call"
    if hasattr(model, "peft_config"):  # save_pretrained would leave out a table that was unfrozen by hand
        modules = ", ".join(repr(table.module_path.rpartition(".")[2]) for table in found)
        remedy = f"name them in the PEFT config, modules_to_save=[{modules}], with ensure_weight_tying=True if tied"
    return (
        f"PairedOptimizer: no token table of {type(model).__name__} is trainable; found "
        f"{', '.join(table.path for table in found)}, all frozen: {remedy}"
    )
