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

import torch
from torch.optim import Optimizer

from cuda_ref import triton_kernels
from ember_mlx.errors import InputError

__all__ = ["Ember", "denominator_factors", "ember_step", "mean_squares", "update_second_moment", "update_table"]

# A float32 sum down 150,000 rows drifts by 1e-4; sums of blocks, summed, stay within 4e-6.
ROWS_PER_BLOCK = 4096
SMALLEST_NORMAL = 2.0**-126  # float32; GPUs may round anything below to zero


def ember_step(w, g, r, c, t, learning_rate, beta2, eps, weight_decay, shards=None):
    """One step of Ember on one table. All arithmetic is float32, whatever the dtypes of ``w`` and ``g``.

    Args:
        w (Tensor): The table, (V, D).
        g (Tensor): Its gradient, (V, D).
        r (Tensor): Second moment of the rows, (V,) float32.
        c (Tensor): Second moment of the columns, (D,) float32.
        t (Tensor): The number of this step, from 1.
        learning_rate, weight_decay (Tensor or float): :math:`\\eta` and the decoupled :math:`\\lambda`.
        beta2, eps (float): :math:`\\beta_2` and :math:`\\epsilon`.
        shards (RowShards, optional): Of a table whose rows lie on several ranks; ``w``, ``g``, ``r`` are this rank's.

    Returns:
        The new ``w`` in its own dtype, and the new ``r`` and ``c``.
    """
    row_mean, column_mean = mean_squares(g)
    if shards is not None:
        column_mean = shards.mean_over_all_rows(column_mean)
    r = update_second_moment(r, row_mean, beta2)
    c = update_second_moment(c, column_mean, beta2)
    a, b = denominator_factors(r, c, t, beta2)
    return update_table(w, g, a, b, learning_rate, eps, weight_decay), r, c


def mean_squares(g):
    """Means of ``g`` squared: over the columns, (V,), and over the rows, (D,), float32."""
    row_means, column_sums = [], []
    for rows in blocks(g):
        g2 = torch.square(g[rows].to(torch.float32))
        row_means.append(g2.mean(dim=1))
        column_sums.append(g2.sum(dim=0))
    return torch.cat(row_means), torch.stack(column_sums).sum(dim=0) / g.shape[0]


def update_second_moment(moment, mean_square, beta2):
    """``beta2 * moment + (1 - beta2) * mean_square``, as a step towards it: 0.999 has no exact float32, 0 has."""
    return moment + (1 - beta2) * (mean_square - moment)


def denominator_factors(r, c, t, beta2):
    """Factors a, (V,), and b, (D,), with ``outer(a, b) == sqrt(v_hat)``: no square root per element of the table."""
    log_beta2 = math.log(beta2) if beta2 > 0 else -math.inf
    # 1 - beta2 ** t loses four digits in float32 at t = 1; expm1 loses none.
    bias_correction = -torch.expm1(t.to(torch.float32) * log_beta2)
    s = torch.clamp(c.mean(), min=1e-30)
    return torch.sqrt(r / (s * bias_correction)), torch.sqrt(c)


def update_table(w, g, a, b, learning_rate, eps, weight_decay):
    """The step itself, in float32, with one cast at the end to the dtype of ``w``."""
    updated = torch.empty_like(w)
    for rows in blocks(w):
        decayed = (1 - learning_rate * weight_decay) * w[rows].to(torch.float32)
        update = g[rows].to(torch.float32) / (a[rows, None] * b + eps)
        updated[rows] = decayed - learning_rate * update
    return updated


def blocks(table):
    """Slices of its rows, so that their float32 copies stay small. A compiled step makes no copies and needs none."""
    rows = len(table)
    block = rows if torch.compiler.is_compiling() else ROWS_PER_BLOCK
    return [slice(first, first + block) for first in range(0, rows, block)] or [slice(0)]


class Ember(Optimizer):
    r"""The Ember optimizer [1], for embedding tables and LM heads.

    For a table of shape (V, D) in float32, bfloat16 or float16 it keeps ``r`` of shape (V,) and ``c`` of shape (D,),
    float32 always, and the number of steps. The formula stands at the top of this file.

    [1]: Token Geometry. arXiv 2607.01455.

    Args:
        params (iterable): The tables, or groups of them, or named tables, as any PyTorch optimizer takes them.
        lr (float or Tensor): The learning rate :math:`\eta`, about the size of an element's step.
        beta2 (float): The decay :math:`\beta_2` of the second moment. Default: ``0.999``.
        eps (float): The term :math:`\epsilon` added to the denominator. Default: ``1e-8``.
        weight_decay (float): The decoupled weight decay :math:`\lambda`. Default: ``0.0``.
        implementation (str): ``"triton"`` for the kernels, ``"eager"`` for the functions of this file, ``"auto"`` for
            the kernels where a table is on a CUDA device and Triton is installed. Default: ``"auto"``.

    A step reads nothing back from the GPU, so a CUDA graph can hold it: give ``lr`` as a tensor on the GPU if it is to
    change between replays, and do one step before the capture.

    Raises:
        InputError: (a ``ValueError``) for a value out of range, a parameter that is not a 2-D floating table, a
            gradient that is sparse or of another shape or device, and state of another table; nothing is written then.
    """

    def __init__(self, params, lr, beta2=0.999, eps=1e-8, weight_decay=0.0, implementation="auto"):
        if implementation not in ("auto", "eager", "triton"):
            raise InputError(f"Ember(implementation={implementation!r}): must be 'auto', 'eager' or 'triton'")
        if implementation == "triton" and not triton_kernels.available():
            raise InputError("Ember(implementation='triton'): Triton is not installed; 'auto' does without it")
        self.implementation = implementation
        super().__init__(params, {"lr": lr, "beta2": beta2, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except InputError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure=None):
        """One step on every table that has a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, []) for group in self.param_groups]
        for group, tables in groups:  # all of them, before anything is written
            self._init_group(group, tables)
        for group, tables in groups:
            for w in tables:
                self._step_table(w, group)
        return loss

    def _init_group(self, group, tables):
        """Check the group, put its tables that have a gradient into ``tables``, make their state: (V,) and (D,).

        The name is PyTorch's: ``torch.compile`` runs a method of this name as it stands, once.
        """
        _check_group(group)
        for w in group["params"]:
            if w.grad is None:
                continue
            _check_gradient(w)
            tables.append(w)
            if not self.state[w]:
                rows, columns = w.shape
                self.state[w]["step"] = torch.zeros((), dtype=torch.float32, device=w.device)
                self.state[w]["r"] = torch.zeros(rows, dtype=torch.float32, device=w.device)
                self.state[w]["c"] = torch.zeros(columns, dtype=torch.float32, device=w.device)

    def _step_table(self, w, group):
        state = self.state[w]
        state["step"] += 1
        use_triton = self.implementation == "triton" or (
            self.implementation == "auto" and w.is_cuda and triton_kernels.available()
        )
        step = triton_kernels.ember_step if use_triton else ember_step
        old = w, state["r"], state["c"]
        new = step(
            w,
            w.grad,
            state["r"],
            state["c"],
            state["step"],
            group["lr"],
            group["beta2"],
            group["eps"],
            group["weight_decay"],
        )
        for before, after in zip(old, new, strict=True):
            if after is not before:
                before.copy_(after)

    def load_state_dict(self, state_dict):
        """Load what ``state_dict`` gave, into any process; ``r`` and ``c`` stay float32 for tables of 16 bits."""
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [w for group in self.param_groups for w in group["params"]]
        saved = {w: state_dict["state"].get(i, {}) for i, w in zip(saved_ids, parameters, strict=False)}
        for w, state in saved.items():
            _check_state(w, state)
        super().load_state_dict(state_dict)
        for w, state in saved.items():  # PyTorch casts state to the dtype of its parameter
            for name, value in state.items():
                self.state[w][name] = value.to(device=w.device, dtype=torch.float32, copy=True)


def _check_group(group):
    for name, value in {"lr": group["lr"], "weight_decay": group["weight_decay"]}.items():
        if not isinstance(value, torch.Tensor):  # to look at one on the GPU would wait for it
            _check(name, value, 0, math.inf, "a finite number, zero or more")
    _check("beta2", group["beta2"], 0, 1, "at least 0 and below 1, usually 0.999")
    _check("eps", group["eps"], SMALLEST_NORMAL, math.inf, "a positive number, usually 1e-8")
    for number, w in enumerate(group["params"]):
        if w.ndim != 2 or not w.numel() or not w.is_floating_point():
            name = group["param_names"][number] if "param_names" in group else f"parameter {number}"
            raise InputError(
                f"Ember: {name} has shape {tuple(w.shape)} and dtype {w.dtype}; Ember takes 2-D floating token tables "
                "only: give this parameter to another optimizer, for example with cuda_ref.PairedOptimizer"
            )


def _check_gradient(w):
    g = w.grad
    if g.layout != torch.strided:
        raise InputError(f"Ember: the gradient of a table {tuple(w.shape)} is sparse ({g.layout}); "
                         "Ember takes dense ones: make the embedding with sparse=False")  # fmt: skip
    if g.shape != w.shape or g.device != w.device:
        raise InputError(
            f"Ember: a table of shape {tuple(w.shape)} on {w.device} has a gradient of shape {tuple(g.shape)} on "
            f"{g.device}: both must be the same"
        )


def _check_state(w, state):
    for name, shape in {"step": (), "r": (w.shape[0],), "c": (w.shape[1],)}.items() if state else ():
        found = tuple(state[name].shape) if name in state else None
        if found != shape:
            has = f"no {name}" if found is None else f"{name} of shape {found}"
            raise InputError(
                f"Ember.load_state_dict: the state has {has} for a table of shape {tuple(w.shape)}, which needs "
                f"shape {shape}: load the state of this model"
            )


def _check(name, value, least, below, in_words):
    try:
        allowed = least <= value < below
    except TypeError:
        allowed = False
    if not allowed:
        raise InputError(f"Ember({name}={value!r}): must be {in_words}")
