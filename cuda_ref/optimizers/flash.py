"""FlashAdamW and FlashLion: AdamW and Lion whose moments take 8 bits, with bfloat16 weights of 24 bits on demand.

From FlashOptim (arXiv 2602.23349, databricks/flashoptim at 8b2d966). The arithmetic stands in ``flash_arithmetic``, the
formats in ``companded`` and ``split_weights``. Two things differ from the authors' code; ``state_format="published"``
gives them up. Scales are float32: their float16 loses gradients under 1e-5, 48 % of the whole step at 1e-6. And no
positive second moment gets the code 0: there it did, and its weight went up to 45,700 learning rates in one step.
"""

import torch
from torch.optim.optimizer import ParamsT

from cuda_ref import flash_triton
from cuda_ref.optimizers.body import BodyOptimizer
from cuda_ref.optimizers.companded import GROUP, grouped, groups_of, ungrouped
from cuda_ref.optimizers.flash_arithmetic import Stored, flash_step, numbers_of
from cuda_ref.optimizers.split_weights import WEIGHTS, check_some_are_bfloat16
from cuda_ref.sharding import groups_on_all_ranks
from ember_mlx.shared.ember_options import check_word

__all__ = ["FlashAdamW", "FlashLion"]

STATE_FORMATS = ("float32", "published")


class _Flash(BodyOptimizer):
    """What FlashAdamW and FlashLion share: everything but the second moment."""

    has_second_moment: bool

    def __init__(self, params, lr, betas, eps, weight_decay, weights, state_format, implementation, decay_vectors):
        check_word(type(self).__name__, "weights", weights, (*WEIGHTS, None))
        check_word(type(self).__name__, "state_format", state_format, STATE_FORMATS)
        if implementation == "triton" and state_format == "published":
            raise self._error(
                "(implementation='triton', state_format='published'): the kernel has the float32 format only: take "
                "'auto' or 'eager'"
            )
        self.weights = weights
        self.state_format = state_format
        super().__init__(params, lr, betas, eps, weight_decay, decay_vectors, implementation)
        if weights:
            check_some_are_bfloat16(type(self).__name__, self.param_groups)

    kept = (*BodyOptimizer.kept, "weights", "state_format")

    def state_of(self, w, group):
        groups = groups_on_all_ranks(w, self._shards.get(w))
        scales = (groups,), torch.float16 if self.state_format == "published" else torch.float32
        state = {"m": ((groups, GROUP), torch.int8), "m_scales": scales}
        if self.has_second_moment:
            state |= {"v": ((groups, GROUP), torch.uint8), "v_scales": scales}
        if self._splits(w.dtype):
            state["rest"] = tuple(w.shape), torch.int8
        return state

    def step_weight(self, w, g, state, group, shards):
        if not w.numel():  # of a sharded weight a rank may have nothing
            return
        options = state["step"], group["lr"], self.weight_decay_of(w, group), group["betas"], group["eps"]
        moments = [state[name][: groups_of(w.numel())] if name in state else None for name in Stored._fields[2:]]
        rest = state.get("rest")
        if self.state_format == "float32" and self.by_triton(w):
            flash_triton.flash_step(Stored(w, rest, *moments), g, *options)
            return
        stored = Stored(grouped(w), None if rest is None else grouped(rest), *moments)
        flash_step(stored, grouped(g), numbers_of(*options), self.state_format == "published")
        if not w.is_contiguous() or w.numel() % GROUP:  # then the groups are copies
            w.copy_(ungrouped(stored.w, w.shape))
            if rest is not None:
                rest.copy_(ungrouped(stored.rest, w.shape))

    def _splits(self, dtype):
        return self.weights is not None and dtype == torch.bfloat16

    def _check_state(self, w, state, wanted):
        if "rest" in state and not self._splits(w.dtype):
            raise self._error(
                f".load_state_dict: the state has a rest for a weight of shape {tuple(w.shape)}, so its run had "
                "weights='bf16+int8': give that option, or start without that state"
            )
        super()._check_state(w, state, wanted)


class FlashAdamW(_Flash):
    r"""AdamW with 8-bit moments [1]: 2.25 bytes of state a weight, 3.25 with the rest of bfloat16 weights.

    Of a parameter of any shape, N weights in groups of 32 neighbours, it keeps the codes ``m`` int8 and ``v`` uint8 of
    shape (groups, 32), and ``m_scales`` and ``v_scales`` of shape (groups,), float32; the last group is padded. Only
    a rest tells a weight's shape. Without one a weight of another shape in as many groups takes the state: load the
    weights first.

    [1]: FlashOptim. arXiv 2602.23349.

    Args:
        params (iterable): As any PyTorch optimizer takes them.
        lr (float or Tensor): :math:`\eta`, as AdamW's.
        betas (tuple): :math:`(\beta_1, \beta_2)`. Default: ``(0.9, 0.999)``.
        eps (float): :math:`\epsilon`. Default: ``1e-8``.
        weight_decay (float): The decoupled :math:`\lambda`. Default: ``0.0``.
        weights (str, optional): ``"bf16+int8"`` keeps an int8 rest of each bfloat16 weight, in the shape of the weight,
            as ``rest``: steps that bfloat16 would round away add up. Other dtypes have no rest. Default: ``None``.
        state_format (str): ``"published"`` for FlashOptim's own: float16 scales, 2.125 bytes, and second moments that
            may round to 0. For comparisons with it only. Default: ``"float32"``.
        implementation (str): ``"triton"`` for the kernel, ``"eager"`` for plain operations, ``"auto"`` for the kernel
            where a parameter is on a CUDA device and Triton is installed. Default: ``"auto"``.
        decay_vectors (bool): Let norms and biases decay too. Default: ``False``.

    A NaN in a gradient makes its weight NaN, and the moments of its whole group.

    Raises:
        InputError: (a ``ValueError``) for a value out of range, for a parameter that is empty or not floating, for
            ``weights`` where no parameter is bfloat16, for state that is not of these parameters and options, for a
            DTensor that is not sharded by rows, and for ranks that disagree.
    """

    has_second_moment = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        weights: str | None = None,
        state_format: str = "float32",
        implementation: str = "auto",
        decay_vectors: bool = False,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, weights, state_format, implementation, decay_vectors)


class FlashLion(_Flash):
    r"""Lion with an 8-bit momentum [1]: 1.125 bytes of state a weight, 2.125 with the rest of bfloat16 weights.

    It keeps ``m`` and ``m_scales`` as :class:`FlashAdamW` does, and takes the same options but for ``eps``. A NaN in a
    gradient makes its weight NaN, as there, though other Lions let the sign of a NaN be 0.

    [1]: FlashOptim. arXiv 2602.23349.

    Args:
        params (iterable): As any PyTorch optimizer takes them.
        lr (float or Tensor): :math:`\eta`, the step of each weight. A third to a tenth of AdamW's.
        betas (tuple): :math:`(\beta_1, \beta_2)`, of the step and of the momentum. Default: ``(0.9, 0.99)``.
        weight_decay, weights, state_format, implementation, decay_vectors: As of :class:`FlashAdamW`.

    Raises:
        InputError: As :class:`FlashAdamW`.
    """

    has_second_moment = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        weights: str | None = None,
        state_format: str = "float32",
        implementation: str = "auto",
        decay_vectors: bool = False,
    ):
        super().__init__(params, lr, betas, 1e-8, weight_decay, weights, state_format, implementation, decay_vectors)
