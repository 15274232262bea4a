r"""Ember: a factored second moment for token tables, without momentum.

The rule is from "Token Geometry" (arXiv 2607.01455), as the author's code has it since 2026-07-20. For a table
:math:`w` of V tokens by D features with gradient :math:`g` at step :math:`t = 1, 2, ...`

.. math::

    r_t &= \beta_2 r_{t-1} + (1 - \beta_2) \, \text{mean}_j \, g_{ij}^2 \\
    c_t &= \beta_2 c_{t-1} + (1 - \beta_2) \, \text{mean}_i \, g_{ij}^2 \\
    \hat v_t &= \frac{r_t c_t^\top}{\text{mean}(c_t) \, (1 - \beta_2^t)} \\
    w_t &= (1 - \eta \lambda) w_{t-1} - \eta \frac{g_t}{\sqrt{\hat v_t} + \epsilon}

It is Adafactor's factored second moment with Adam's constant beta2 and bias correction: V + D numbers of state.
The functions are those of ``ember_mlx/optimizers/ember.py``, line against line.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from cuda_ref import sharding, triton_kernels
from cuda_ref.optimizers import checks
from cuda_ref.optimizers.base import CheckedOptimizer, State
from cuda_ref.optimizers.stochastic_rounding import (
    DROPPED_BITS,
    bit_keys,
    random_bits,
    round_stochastically,
    table_seed,
)
from cuda_ref.sharding import RowShards
from ember_mlx.shared.ember_options import BETA2_RANGE, check_rounding, check_row_limit, warn
from ember_mlx.shared.errors import InputError

__all__ = [
    "Ember",
    "bias_correction",
    "blocks",
    "denominator_factors",
    "ember_step",
    "mean_squares",
    "update_rows",
    "update_second_moment",
    "update_table",
]

Real = float | Tensor
Keys = tuple[Tensor, Tensor] | None

# A float32 sum down 150,000 rows drifts by 1e-4; sums of blocks, summed, stay within 4e-6.
ROWS_PER_BLOCK = 4096
# A GPU wants few and large blocks: each operation on one is a kernel to launch. 4 float32 copies of a block are alive
# together, 8 to 12 with stochastic rounding: of one block in 32 that is a quarter of a 16-bit table, a half to 3/4.
MOST_BLOCKS, FEWEST_ROWS = 32, 1024


def ember_step(
    w: Tensor,  # (V, D), the table
    g: Tensor,  # (V, D), its gradient
    r: Tensor,  # (V,) float32, second moment of the rows
    c: Tensor,  # (D,) float32, second moment of the columns
    t: Tensor,  # (), the number of this step, from 1
    *,
    learning_rate: Real,
    beta2: Real,
    eps: float,
    weight_decay: Real,
    q: Tensor | None = None,  # (), the bias correction
    row_clip: float | None = None,
    row_floor: float | None = None,
    seed: Tensor | None = None,  # (), int32
    shards: RowShards | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Ember on one table. All arithmetic is float32, whatever the dtypes of ``w`` and ``g``.

    Args:
        learning_rate, weight_decay: :math:`\\eta` and the decoupled :math:`\\lambda`.
        beta2: :math:`\\beta_2`; on a schedule a tensor, with its bias correction ``q``.
        row_clip: The most learning rates that a row's step may have as its root mean square.
        row_floor: How large a row's gradients must be, over the table's, for whole steps.
        seed: Of the table, for stochastic rounding. Without it: to nearest.
        shards: Of a table whose rows lie on several ranks; ``w``, ``g`` and ``r`` are this rank's.

    Returns:
        ``w``, overwritten, and the new ``r`` and ``c``.
    """
    row_mean, column_mean = mean_squares(g)
    if shards is not None:
        column_mean = shards.mean_over_all_rows(column_mean)
    r = update_second_moment(r, row_mean, beta2)
    c = update_second_moment(c, column_mean, beta2)
    q = bias_correction(t, beta2) if q is None else q
    a, b = denominator_factors(r, c, q, row_mean, row_clip, row_floor)
    first_row = 0 if shards is None else shards.first_row
    keys = bit_keys(seed, t, *w.shape, first_row) if seed is not None and w.dtype in DROPPED_BITS else None
    return update_table(w, g, a, b, learning_rate, eps, weight_decay, keys), r, c


def mean_squares(g: Tensor) -> tuple[Tensor, Tensor]:
    """Means of ``g`` squared: over the columns, (V,), and over the rows, (D,), float32."""
    row_means, column_sums = [], []
    for rows in blocks(g):
        g2 = torch.square(g[rows].to(torch.float32))
        row_means.append(g2.mean(dim=1))
        column_sums.append(g2.sum(dim=0))
    return torch.cat(row_means), torch.stack(column_sums).sum(dim=0) / g.shape[0]


def update_second_moment(moment: Tensor, mean_square: Tensor | float, beta2: Real) -> Tensor:
    """``beta2 * moment + (1 - beta2) * mean_square``, written for both ends of the range from 0 to 1.

    0.999 has no exact float32, and as a step towards the mean square that does not add up; near 0 such a step cancels.
    """
    as_written = beta2 * moment + (1 - beta2) * mean_square
    towards = moment + (1 - beta2) * (mean_square - moment)
    if isinstance(beta2, torch.Tensor):
        return torch.where(beta2 < 0.5, as_written, towards)
    return as_written if beta2 < 0.5 else towards


def bias_correction(t: Tensor, beta2: float) -> Tensor:
    """``1 - beta2 ** t``, which loses four digits in float32 at t = 1; expm1 loses none."""
    log_beta2 = math.log(beta2) if beta2 > 0 else -math.inf
    return -torch.expm1(t.to(torch.float32) * log_beta2)


def denominator_factors(
    r: Tensor,  # (V,)
    c: Tensor,  # (D,)
    q: Tensor,  # ()
    row_mean: Tensor,  # (V,)
    row_clip: float | None,
    row_floor: float | None,
) -> tuple[Tensor, Tensor]:
    """Factors a, (V,), and b, (D,), with ``outer(a, b) == sqrt(v_hat)``: no square root per element of the table."""
    s = torch.clamp(c.mean(), min=1e-30)
    a = torch.sqrt(r / (s * q))
    if row_floor is not None:
        a = torch.maximum(a, row_floor / torch.sqrt(q))  # as if r were at least row_floor ** 2 of its mean, s
    if row_clip is not None:
        # By the factors, row i steps sqrt(row_mean / s) / a learning rates: its root mean square over the columns.
        a = torch.maximum(a, torch.sqrt(row_mean / s) / row_clip)
    return a, torch.sqrt(c)


def update_table(
    w: Tensor,  # (V, D)
    g: Tensor,  # (V, D)
    a: Tensor,  # (V,)
    b: Tensor,  # (D,)
    learning_rate: Real,
    eps: float,
    weight_decay: Real,
    keys: Keys = None,  # (V,) and (D,) int32
) -> Tensor:
    """The table, overwritten block by block, so that no second one is needed."""
    for rows in blocks(w):
        block_keys = None if keys is None else (keys[0][rows], keys[1])
        w[rows] = update_rows(w[rows], g[rows], a[rows], b, learning_rate, eps, weight_decay, block_keys)
    return w


def update_rows(
    w: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    learning_rate: Real,
    eps: float,
    weight_decay: Real,
    keys: Keys = None,
) -> Tensor:
    """The step itself, in float32, with one rounding at the end to the dtype of ``w``: by ``keys``, or to nearest."""
    decayed = (1 - learning_rate * weight_decay) * w.to(torch.float32)
    update = g.to(torch.float32) / (a[:, None] * b + eps)
    new = decayed - learning_rate * update
    return new.to(w.dtype) if keys is None else round_stochastically(new, random_bits(*keys), w.dtype)


def blocks(table: Tensor) -> list[slice]:
    """Slices of its rows, so that their float32 copies stay small. A compiled step makes no copies and needs none."""
    rows = len(table)
    block = rows if torch.compiler.is_compiling() else max(FEWEST_ROWS, min(ROWS_PER_BLOCK, rows // MOST_BLOCKS))
    return [slice(first, first + block) for first in range(0, rows, block)] or [slice(0)]


class Ember(CheckedOptimizer):
    r"""The Ember optimizer (Token Geometry, arXiv 2607.01455), for embedding tables and LM heads.

    For a table of shape (V, D) in float32, bfloat16 or float16 it keeps ``r`` of shape (V,) and ``c`` of shape (D,),
    float32 always, and the number of steps. The formula stands at the top of this file.

    Args:
        params (iterable): The tables, or groups of them, or named tables, as any PyTorch optimizer takes them.
        lr (float or Tensor): The learning rate :math:`\eta`, about the size of an element's step. A tensor is one
            float32 number, ``torch.tensor(1e-3)``, on the CPU or where the tables are.
        beta2 (float or callable): The decay :math:`\beta_2` of the second moment, or a schedule. A schedule gets the
            number of steps done, a float32 tensor beside the table, and returns the value for the next step.
            Adafactor's is ``lambda step: 1 - (step + 1) ** -0.8``, whose exponent is at least -1 and below 0. Default:
            ``0.999``.
        eps (float): The term :math:`\epsilon` added to the denominator. Default: ``1e-8``.
        weight_decay (float): The decoupled weight decay :math:`\lambda`. Default: ``0.0``.
        row_clip (float, optional): The most learning rates that a row's step may have as its root mean square. Without
            it, a token seen late steps by up to 31. Default: ``None``.
        row_floor (float, optional): Rows whose gradients are smaller than this part of the table's (both root mean
            squares) step in proportion to them, so that tokens missing from the data are forgotten less. Use a higher
            learning rate with it. Default: ``None``, whole steps for all.
        rounding (str): ``"nearest"``, or ``"stochastic"`` for 16-bit tables whose steps are too small for them: values
            are then kept on average. Default: ``"nearest"``.
        seed (int): Of stochastic rounding, from 0 to 2^32 - 1; the same seed repeats a run bit for bit. Give two
            optimizers in one run two seeds. Default: ``0``.
        implementation (str): ``"triton"`` for the kernels, ``"eager"`` for the functions of this file, ``"auto"`` for
            the kernels where a table is on a CUDA device and Triton is installed. Default: ``"auto"``.
        row_shard_group (ProcessGroup, optional): Of vocabulary-parallel tables: each rank gives its slice of the rows,
            in the order of the ranks. All ranks make the optimizer together. FSDP2 needs no group.

    A ``state_dict`` holds no schedule, only that there is one: the new optimizer's is used. ``cuda_ref/README.md``
    tells of sharded tables, checkpoints, CUDA graphs, and how exact ``row_clip`` is.

    Raises:
        InputError: (a ``ValueError``) for a value out of range, a parameter that is not a 2-D table of those dtypes,
            a gradient that is sparse or of another shape or device, state of another table; nothing is written then.
            For a schedule that gives anything but one number; other tables may have stepped by then. On every rank
            where ranks that share a table disagree on the step or the options. The value of a learning rate on the GPU
            is not looked at, nor any tensor in a compiled step: that would wait for it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Real,
        beta2: float | Callable[[Tensor], float | Tensor] = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        row_clip: float | None = None,
        row_floor: float | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        implementation: str = "auto",
        row_shard_group: "torch.distributed.ProcessGroup | None" = None,
    ):
        check_rounding(rounding, seed)
        self.row_clip = check_row_limit("row_clip", row_clip)
        self.row_floor = check_row_limit("row_floor", row_floor)
        self.rounding = rounding
        self.seed = seed
        self.row_shard_group = row_shard_group
        self._warned, self._numbers = False, {}
        defaults = {"lr": lr, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, implementation)

    noun = "table"
    options = ("lr", "beta2", "eps", "weight_decay")
    kept = ("implementation", "row_clip", "row_floor", "rounding", "seed", "_warned", "_numbers")
    optional_state: ClassVar[State] = {"seed": ((), torch.int32)}  # a state from before may have none

    def state_of(self, w: Tensor, group: dict) -> State:
        shards = self._shards.get(w)
        rows = w.shape[0] if shards is None else shards.total_rows - shards.rows + len(sharding.local_part(w))
        state = {"r": ((rows,), torch.float32), "c": ((w.shape[1],), torch.float32)}
        return state | ({"q": ((), torch.float32)} if callable(group["beta2"]) else {})

    def whole_state_of(self, w: Tensor) -> tuple[str, ...]:
        return ("c", "q", "seed")

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        self._numbers = {w: number for number, (_, w, _) in enumerate(self._named_weights())}
        if not self._warned and (found := checks.warning_of(self.param_groups[-1], self.rounding)):
            self._warned = True
            warn(found)

    def _init_group(self):
        super()._init_group()
        for number, (_, w, _) in enumerate(self._named_weights()) if self.rounding == "stochastic" else ():
            state = self.state.get(w)
            if state and "seed" not in state:  # SplitWeights and streamed steps show one table at a time
                state["seed"] = table_seed(self.seed, self._numbers.get(w, number)).to(w.device)

    def _facts_of(self, w, group):
        state = self.state.get(w)
        return super()._facts_of(w, group) | {"the sum of c": float(state["c"].sum()) if state else 0.0}

    def _step_weight(self, w, group):
        state = self.state[w]
        t = state["step"] + 1
        options = {"learning_rate": group["lr"], "eps": group["eps"], "weight_decay": group["weight_decay"]}
        options |= {"beta2": group["beta2"], "row_clip": self.row_clip, "row_floor": self.row_floor}
        if callable(group["beta2"]):
            options["beta2"] = checks.as_number("beta2", group["beta2"](state["step"]), state["step"].device)
            options["q"] = state["q"].copy_(update_second_moment(state["q"], 1.0, options["beta2"]))
        if self.rounding == "stochastic":
            options["seed"] = state["seed"]
        step = triton_kernels.ember_step if checks.by_triton(self.implementation, w) else ember_step
        (w, g, r), shards = sharding.parts_here((w, w.grad, state["r"]), self._shards.get(w))
        new = *step(w, g, r, state["c"], t, **options, shards=shards), t
        for before, after in zip((w, r, state["c"], state["step"]), new, strict=True):
            if after is not before:
                before.copy_(after)

    def state_dict(self) -> dict:
        """As PyTorch's, with a word in the place of a schedule."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group["beta2"] = checks.SCHEDULE if callable(group["beta2"]) else group["beta2"]
        return saved

    def __getstate__(self):
        if self.row_shard_group is not None:
            raise InputError(
                "Ember(row_shard_group=...): cannot be copied or pickled, for the group is of this process; make a new "
                "one on every rank, and load the state_dict of this one"
            )
        return super().__getstate__() | {"row_shard_group": None}

    def _group_to_load(self, saved_group, group):
        return checks.with_schedule(saved_group, group)

    def _check_new_group(self, group):
        fault = checks.fault_of(self._check_group, group) or checks.fault_of(checks.check_schedule, group)
        if self.row_shard_group is not None:
            found = sharding.shards_of_slices(group["params"], self.row_shard_group, fault)
            self._shards.update(zip(group["params"], found, strict=True))
        if fault is not None:
            raise fault

    def _check_group(self, group):
        super()._check_group(group)
        if not callable(group["beta2"]):
            checks.check_number("Ember", "beta2", group["beta2"], *BETA2_RANGE)

    def _check_weight(self, name, w):
        # A slice of a table may have no rows.
        is_table = w.ndim == 2 and bool(w.numel() if self.row_shard_group is None else w.shape[1])
        if not is_table or w.dtype not in checks.DTYPES:
            raise InputError(
                f"Ember: {name} has shape {tuple(w.shape)} and dtype {w.dtype}; Ember takes 2-D token tables in "
                "float32, bfloat16 or float16 only: with PairedOptimizer it is tables=, and another optimizer is rest="
            )
        if self.row_shard_group is not None and sharding.is_dtensor(w):
            raise InputError(
                f"Ember(row_shard_group=...): {name} is a DTensor, which says itself how its rows lie: give it to an "
                "Ember without row_shard_group; a slice of rows that is sharded again is not supported"
            )
