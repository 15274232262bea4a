"""FlashAdamW and FlashLion: AdamW and Lion whose moments take 8 bits, with bfloat16 weights of 24 bits on demand.

From FlashOptim (arXiv 2602.23349, databricks/flashoptim at 8b2d966). The arithmetic stands in ``flash_arithmetic``, the
formats in ``companded`` and ``split_weights``. Two things differ from the authors' code; ``state_format="published"``
gives them up. Scales are float32: their float16 loses gradients under 1e-5, 48 % of the whole step at 1e-6. And no
positive second moment gets the code 0: there it did, and its weight went up to 45,700 learning rates in one step.
"""

import mlx.core as mx
from mlx.utils import tree_flatten

from ember_mlx import kernels
from ember_mlx.optimizers import flash_kernel
from ember_mlx.optimizers.body import BodyOptimizer, Rate
from ember_mlx.optimizers.companded import GROUP, grouped, groups_of, ungrouped
from ember_mlx.optimizers.ember import LEAST_BETA
from ember_mlx.optimizers.flash_arithmetic import Stored, flash_step, numbers_of
from ember_mlx.optimizers.guarded import applied_if
from ember_mlx.optimizers.split_weights import WEIGHTS, check_some_are_bfloat16
from ember_mlx.shared.ember_options import check_word
from ember_mlx.shared.errors import InputError

__all__ = ["FlashAdamW", "FlashLion"]

STATE_FORMATS = ("float32", "published")
MOST_FLAT = 2**31  # elements of an array that the kernel can take


class _Flash(BodyOptimizer):
    """What FlashAdamW and FlashLion share: everything but the second moment."""

    has_second_moment: bool

    def __init__(self, learning_rate, betas, eps, weight_decay, weights, state_format, decay_vectors):
        super().__init__(learning_rate, betas, eps, weight_decay, decay_vectors)
        name = type(self).__name__
        check_word(name, "weights", weights, (*WEIGHTS, None))
        check_word(name, "state_format", state_format, STATE_FORMATS)
        self.weights = weights
        self.state_format = state_format

    def init(self, parameters):
        flat = tree_flatten(parameters)
        if self.weights:
            check_some_are_bfloat16(type(self).__name__, flat)
        for dtype in {parameter.dtype for _, parameter in flat}:
            self._kernel_takes(dtype, dtype)  # tried now: a first step may be one that MLX traces
        super().init(parameters)

    def state_of(self, path, parameter):
        groups = groups_of(parameter.size)
        scales = (groups,), mx.float16 if self.state_format == "published" else mx.float32
        state = {"m": ((groups, GROUP), mx.int8), "m_scales": scales}
        if self.has_second_moment:
            state |= {"v": ((groups, GROUP), mx.uint8), "v_scales": scales}
        if self._splits(parameter.dtype):
            state["rest"] = parameter.shape, mx.int8
        return state

    def apply_single(self, gradient, parameter, state):
        return self._stepped(gradient, parameter, state)

    def apply_single_if(
        self, finite: mx.array, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        """As ``apply_single`` where ``finite``, a bool array (), else nothing changes; a kernel selects itself."""
        if self._has_kernel_for(gradient, parameter):
            return self._stepped(gradient, parameter, state, finite)
        return applied_if(finite, self.apply_single, gradient, parameter, state)

    def _stepped(self, gradient, parameter, state, finite=None):
        """Plain operations take no heed of ``finite``."""
        decay = self.weight_decay_of(parameter)
        numbers = numbers_of(self.step, self.learning_rate, decay, self.betas, self.eps)
        moments = [state.get(name) for name in Stored._fields[2:]]
        rest = state["rest"] if self._splits(parameter.dtype) else None
        if self._has_kernel_for(gradient, parameter):
            new = flash_kernel.flash_step(Stored(parameter, rest, *moments), gradient, numbers, finite)
        else:
            weights = grouped(parameter), None if rest is None else grouped(rest)
            new = flash_step(Stored(*weights, *moments), grouped(gradient), numbers, self.state_format == "published")
        names = [name for name in Stored._fields[2:] if name in state]
        state.update({name: getattr(new, name) for name in names})
        if rest is not None:
            state["rest"] = ungrouped(new.rest, parameter.shape)
        return ungrouped(new.w, parameter.shape)

    def _splits(self, dtype):
        return self.weights is not None and dtype == mx.bfloat16

    def _has_kernel_for(self, gradient, parameter):
        return parameter.size < MOST_FLAT and self._kernel_takes(parameter.dtype, gradient.dtype)

    def _kernel_takes(self, w_dtype, g_dtype):
        """float16 weights, the published format and small betas are left to plain operations."""
        takes = self.state_format == "float32" and w_dtype != mx.float16 and min(self.betas) >= LEAST_BETA
        return takes and kernels.usable(flash_kernel, w_dtype, g_dtype)

    def _check_state(self, path, parameter, state, wanted):
        if "rest" in state and "rest" not in wanted:
            raise InputError(
                f"{type(self).__name__}: the state has a rest for {path}, so its run had weights='bf16+int8': give "
                "that option, or start without that state"
            )
        super()._check_state(path, parameter, state, wanted)


class FlashAdamW(_Flash):
    r"""AdamW with 8-bit moments [1]: 2.25 bytes of state a weight, 3.25 with the rest of bfloat16 weights.

    Of a parameter of any shape, N weights in groups of 32 neighbours, it keeps the codes ``m`` int8 and ``v`` uint8 of
    shape (groups, 32), and ``m_scales`` and ``v_scales`` of shape (groups,), float32; the last group is padded. Only
    a rest tells a weight's shape. Without one a weight of another shape in as many groups takes the state: load the
    weights first.

    [1]: FlashOptim. arXiv 2602.23349.

    Args:
        learning_rate (float or callable): :math:`\eta`, as AdamW's.
        betas (tuple): :math:`(\beta_1, \beta_2)`. Default: ``(0.9, 0.999)``.
        eps (float): :math:`\epsilon`. Default: ``1e-8``.
        weight_decay (float or callable): The decoupled :math:`\lambda`. Default: ``0.0``.
        weights (str, optional): ``"bf16+int8"`` keeps an int8 rest of each bfloat16 weight, in the shape of the weight,
            as ``rest``: steps that bfloat16 would round away add up. Other dtypes have no rest. Default: ``None``.
        state_format (str): ``"published"`` for FlashOptim's own: float16 scales, 2.125 bytes, and second moments that
            may round to 0. For comparisons with it only. Default: ``"float32"``.
        decay_vectors (bool): Let norms and biases decay too. Default: ``False``.

    A callable is a schedule: it gets the number of steps done and returns the value for the next one. Before
    ``mx.compile``, call ``init``. A NaN in a gradient makes its weight NaN, and the moments of its whole group.

    Raises:
        InputError: (a ``ValueError``) for a value out of range, for a parameter that is empty or not floating, for
            ``weights`` where no parameter is bfloat16, and for state that is not of these parameters and options.
    """

    has_second_moment = True

    def __init__(
        self,
        learning_rate: Rate,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Rate = 0.0,
        *,
        weights: str | None = None,
        state_format: str = "float32",
        decay_vectors: bool = False,
    ):
        super().__init__(learning_rate, betas, eps, weight_decay, weights, state_format, decay_vectors)


class FlashLion(_Flash):
    r"""Lion with an 8-bit momentum [1]: 1.125 bytes of state a weight, 2.125 with the rest of bfloat16 weights.

    It keeps ``m`` and ``m_scales`` as :class:`FlashAdamW` does, and takes the same options but for ``eps``. A NaN in a
    gradient makes its weight NaN, as there, though other Lions let the sign of a NaN be 0.

    [1]: FlashOptim. arXiv 2602.23349.

    Args:
        learning_rate (float or callable): :math:`\eta`, the step of each weight. A third to a tenth of AdamW's.
        betas (tuple): :math:`(\beta_1, \beta_2)`, of the step and of the momentum. Default: ``(0.9, 0.99)``.
        weight_decay, weights, state_format, decay_vectors: As of :class:`FlashAdamW`.

    Raises:
        InputError: As :class:`FlashAdamW`.
    """

    has_second_moment = False

    def __init__(
        self,
        learning_rate: Rate,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: Rate = 0.0,
        *,
        weights: str | None = None,
        state_format: str = "float32",
        decay_vectors: bool = False,
    ):
        super().__init__(learning_rate, betas, 1e-8, weight_decay, weights, state_format, decay_vectors)
