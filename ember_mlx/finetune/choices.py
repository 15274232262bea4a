"""What a run trains, decided once from its options and its model's shapes, by rules that need no model and no MLX.

``train`` applies the choices to a model (:mod:`ember_mlx.finetune.trainable`), ``plan`` counts them, and the adapter's
config records them. So ``plan`` refuses what ``train`` refuses.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ember_mlx.finetune.optimizer_names import canonical, settings
from ember_mlx.shared.errors import InputError, did_you_mean
from ember_mlx.shared.token_table_rules import TokenTable

__all__ = [
    "BITS",
    "DEFAULT_LAYERS",
    "GROUP_SIZE",
    "LORA_KEYS",
    "ROLES",
    "SHARDABLE",
    "Choices",
    "Shapes",
    "choose",
    "refuse_frozen_rows",
    "rounding",
    "streams_by_default",
]

DEFAULT_LAYERS = 16  # of LoRA, as mlx_lm.lora has it
BITS = (2, 3, 4, 5, 6, 8)
"""What a weight can be quantized to; ``--quantize`` groups GROUP_SIZE of a row, the default of mlx_lm.convert."""
GROUP_SIZE = 64
ROLES = {
    "auto": ("embedding", "head", "tied"),
    "embedding": ("embedding", "tied"),
    "head": ("head",),
    "none": (),
}
"""The roles of token tables that each value of ``--train-tables`` means."""
SHARDABLE = ("ember", "adamw", "sgd")
"""The optimizers whose step of a row needs none of the other rows, or, as Ember's, only their column means."""
LORA_KEYS = ("rank", "scale", "dropout")


@dataclass(frozen=True)
class Shapes:
    """What the choices depend on in a model, loaded or only described.

    Attributes:
        looked_for: Where token tables were looked for, and what for, in words for the error when there is none.
        layers: How many decoder layers it has; None where that is not known.
        tables: All its token tables.
        quantized: The path of a quantized module, if there is one.
        layer_modules: For each layer the names of the modules in it, which LoRA's keys may name; None where they are
            not known.
        modules: The names of all modules, seen from the model, which LoRA's keys may name too.
    """

    looked_for: str
    layers: int | None
    tables: tuple[TokenTable, ...]
    quantized: str | None = None
    layer_modules: tuple[frozenset[str], ...] | None = None
    modules: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Choices:
    """What trains in a run.

    Attributes:
        tables: The token tables that train, none of them quantized any more.
        dequantize: The paths of the modules that must be dequantized for that.
        num_layers: How many of the last layers train.
        lora_parameters: Rank, scale, dropout and keys; None for ``full``.
        table_rounding: "nearest" or "stochastic".
        body_in_float32: Whether the body's optimizer computes in float32 for bfloat16 weights. Without tables it does
            not: the run is stock mlx-lm's, to the bit. For float16, whose numbers end at 65504, it does always.
        body_rounding: "nearest" or "stochastic", of 16-bit weights that are no table.
        stream: Whether every weight is stepped inside the backward pass.
        not_streamed: Why a run that would stream by default does not, in words; None for all others.
        warning: A line on those of LoRA's keys that no module has, though another has one; "" for all others.
        added_tokens: Content, special and id of each new token; None without ``--add-tokens``.
    """

    tables: tuple[TokenTable, ...]
    dequantize: tuple[str, ...]
    num_layers: int
    lora_parameters: dict[str, Any] | None
    table_rounding: str
    body_in_float32: bool
    body_rounding: str
    stream: bool
    not_streamed: str | None = None
    warning: str = ""
    added_tokens: list[dict[str, Any]] | None = None

    def as_options(self) -> dict[str, Any]:
        """The choices by the names that options and the adapter's config have for them."""
        return {
            "token_tables": [table.path for table in self.tables],
            "num_layers": self.num_layers,
            "lora_parameters": self.lora_parameters,
            "table_rounding": self.table_rounding,
            "body_rounding": self.body_rounding,
            "stream": self.stream,
            "added_tokens": self.added_tokens,
        }


def choose(options: Any, shapes: Shapes, added_tokens: list[dict[str, Any]] | None = None, workers: int = 1) -> Choices:
    """Decide what trains.

    Args:
        options: The run's, from :func:`ember_mlx.finetune.options.parse`.
        shapes: The model's, with the rows of new tokens.
        added_tokens: What ``--add-tokens`` has added.
        workers: How many train together.

    Raises:
        InputError: for options that ask this model for what it does not have, or for nothing at all.
    """
    full = options.fine_tune_type == "full"
    if full and shapes.quantized is not None:
        raise InputError(
            f"--fine-tune-type full: {shapes.quantized} is quantized, and quantized weights cannot be trained: use "
            "--fine-tune-type lora, or a model that is not quantized"
        )
    tables = _tables(options, shapes)
    if options.shard_tables:
        _check_sharding(options, tables)
    num_layers = _number_of_layers(options, shapes.layers, bool(tables))
    nothing_left = num_layers == 0 and (shapes.layers is not None or options.num_layers == 0)
    if nothing_left and not tables:
        raise InputError("--num-layers 0 --train-tables none: nothing is left to train; ask for layers or for tables")
    if shapes.layers and (options.keep_inputs or 1) > shapes.layers:
        raise InputError(f"--keep-inputs {options.keep_inputs}: the model has {shapes.layers} layers; use at most that")
    streams = streams_by_default(options.fine_tune_type, bool(tables))
    not_streamed = None
    if options.stream is None and streams:
        not_streamed = _reason_not_to_stream(workers, options.clip_grad_norm is not None)
    warning = "" if full else _check_lora(options.lora_parameters, tables, num_layers, shapes)
    return Choices(
        tables=tuple(replace(table, quantized=False) for table in tables),
        dequantize=tuple(table.module_path for table in tables if table.quantized),
        num_layers=num_layers,
        lora_parameters=None if full else options.lora_parameters,
        table_rounding=rounding(options, [table.dtype for table in tables]),
        body_in_float32=bool(tables),
        body_rounding=_body_rounding(options, shapes, bool(tables)),
        stream=_streams(options, streams and not_streamed is None),
        not_streamed=not_streamed,
        warning=warning,
        added_tokens=added_tokens,
    )


def rounding(options: Any, dtypes: Iterable[Any]) -> str:
    """What ``--table-rounding`` asks for; by default 16-bit tables are rounded stochastically where Ember trains them.

    To nearest they lose a part of what training them brings, up to half (examples/benchmarks/quality).
    """
    stochastic = options.table_optimizer == "ember" and _any_narrow(dtypes)
    return options.table_rounding or ("stochastic" if stochastic else "nearest")


def _body_rounding(options, shapes, with_tables):
    """Without tables the run is mlx-lm's, to the bit. An int8 rest keeps by itself what rounding would lose."""
    split = settings(options, canonical(options.optimizer)).get("weights") is not None
    if options.body_rounding is None:
        narrow = _any_narrow(table.dtype for table in shapes.tables)
        return "stochastic" if options.fine_tune_type == "full" and with_tables and narrow and not split else "nearest"
    if split and options.body_rounding == "stochastic":
        raise InputError(
            "--body-rounding stochastic: optimizer_config keeps a rest of each weight (weights: bf16+int8), so that "
            "nothing is lost: leave one of the two out"
        )
    return options.body_rounding


def _any_narrow(dtypes):
    return any(str(dtype).rpartition(".")[2] != "float32" for dtype in dtypes)


def streams_by_default(fine_tune_type: str, with_tables: bool, workers: int = 1, clipped: bool = False) -> bool:
    """Whether a run streams without being told to: ``full`` does, with tables; without, it is mlx-lm's, to the bit.

    Args:
        fine_tune_type: As ``--fine-tune-type``.
        with_tables: Whether a token table trains.
        workers: How many train together.
        clipped: Whether gradients are clipped by their global norm.
    """
    return fine_tune_type == "full" and with_tables and _reason_not_to_stream(workers, clipped) is None


def _reason_not_to_stream(workers, clipped):
    if workers > 1:
        return f"{workers} workers: add --stream to do so, in less memory; a head's gradient is then sent twice"
    if clipped:
        return "--clip-grad-norm: add --stream to have both, slower, in less memory"
    return None


def _streams(options, by_default):
    if by_default if options.stream is None else options.stream:
        return True
    for name, instead in {"clip_layer_norm": "use --clip-grad-norm", "keep_inputs": "use --grad-checkpoint"}.items():
        if getattr(options, name) is not None:
            shown = f"--{name.replace('_', '-')} {getattr(options, name)}"
            raise InputError(f"{shown}: is for a run that streams; add --stream, or {instead}")
    if options.shard_optimizer:
        raise InputError("--shard-optimizer: is for a run that streams; add --stream, or leave it out")
    return False


def refuse_frozen_rows(options: Any) -> None:
    """Raises InputError for options under which the rows of new tokens would never train."""
    if options.add_tokens is not None and options.train_tables == "none":
        what = "the new tokens would learn nothing with --train-tables none"
        raise InputError(f"--add-tokens {options.add_tokens}: {what}: remove that flag")


def _tables(options, shapes):
    asked = options.train_tables
    if asked == "none":
        return []
    if not shapes.tables:
        raise InputError(f"--train-tables {asked}: no token table in {shapes.looked_for}; use --train-tables none")
    chosen = [table for table in shapes.tables if table.role in ROLES[asked]]
    if not chosen:
        tied = next((table for table in shapes.tables if table.role == "tied"), None)
        found = ", ".join(f"{table.path} ({table.role})" for table in shapes.tables)
        reason = f"the head is the embedding, {tied.path}" if tied else f"the model has {found}"
        raise InputError(f"--train-tables {asked}: {reason}; use --train-tables {'embedding' if tied else 'auto'}")
    return chosen


def _check_sharding(options, tables):
    without = "leave --shard-tables out"
    if not tables:
        raise InputError(f"--shard-tables: no table trains with --train-tables none: {without}")
    if options.stream:
        raise InputError("--shard-tables: --stream steps whole tables: leave out one of the two")
    if options.table_optimizer not in SHARDABLE:
        raise InputError(
            f"--shard-tables: --table-optimizer {options.table_optimizer} needs whole tables: use one of "
            f"{', '.join(SHARDABLE)}, or {without}"
        )
    if len({table.shape[0] for table in tables}) > 1:
        rows = " and ".join(f"{table.path} {table.shape[0]:,}" for table in tables)
        raise InputError(f"--shard-tables: all tables must have as many rows, but {rows}: {without}, or train one")


def _number_of_layers(options, layers, with_tables):
    """mlx-lm takes 0 for all layers, as ``layers[-0:]`` is; here 0 trains none, so that tables can train alone."""
    asked = options.num_layers
    if layers is None:
        return 0
    if asked is None:
        return layers if options.fine_tune_type == "full" and with_tables else min(DEFAULT_LAYERS, layers)
    if asked > layers:
        raise InputError(f"--num-layers {asked}: the model has {layers} layers; use at most that, or -1 for all")
    return layers if asked < 0 else asked


def _check_lora(parameters, tables, num_layers, shapes):
    """A warning of keys that no module has: of a file for several architectures some may be idle, but not all."""
    keys = parameters.get("keys")
    for table in tables:
        if table.module_path in (keys or ()):
            raise InputError(
                f"lora_parameters: keys names {table.module_path}, which is to train as a whole: take it out of keys, "
                "or leave the tables to LoRA with --train-tables none"
            )
    if not num_layers:
        return ""
    missing = next((key for key in LORA_KEYS if key not in parameters), None)
    if missing:
        raise InputError(f"lora_parameters {parameters}: missing required key '{missing}'")
    if keys is not None and shapes.layer_modules is not None:
        reachable = shapes.modules.union(*shapes.layer_modules[-num_layers:])
        idle = [key for key in keys if key not in reachable]
        if len(idle) == len(keys):
            raise InputError(f"lora_parameters: keys {keys}: no layer has such a module; name one, as self_attn.q_proj")
        if idle:
            near = did_you_mean(idle[0], reachable)
            return f"Warning: lora_parameters: keys: {', '.join(idle)}: no effect: no layer that trains has it{near}"
    return ""
