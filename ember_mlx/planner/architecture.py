"""What a config.json says of a model's shapes: weights by module, and the sizes that activations follow."""

import itertools
from dataclasses import dataclass, field, replace

from ember_mlx.finetune.choices import GROUP_SIZE, Shapes
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.token_table_rules import TokenTable

__all__ = ["Architecture", "Linear", "Table", "read_architecture"]

# The keys of Hugging Face's Llama, and what other families call the same.
NAMES = {
    "hidden_size": ("n_embd", "d_model", "dim", "model_dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("n_kv_heads", "num_kv_heads", "multi_query_group_num"),
    "head_dim": ("attention_head_dim",),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim", "mlp_hidden_size"),
    "vocab_size": ("padded_vocab_size", "n_vocab"),
}
# Far above any model there is; beyond, the plan itself would take minutes.
LARGEST = dict.fromkeys(NAMES, 10**6) | {"num_hidden_layers": 1000, "vocab_size": 4 * 10**6}
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
# Families whose layers are Llama's, and what they add to them: the biases of attention, norms of queries and keys.
BIASES = {"qwen2"}
HEAD_NORMS = {"qwen3"}
EXACT = {"llama", "mistral", "smollm3"} | BIASES | HEAD_NORMS
ALWAYS_TIED = {"gemma", "gemma2", "gemma3_text", "gpt2"}
# mlx-lm's default where config.json is silent.
TIED_BY_DEFAULT = {"llama", "cohere", "cohere2", "olmo", "gemma3"} | ALWAYS_TIED
# Heads that are no module that a forward pass calls once: their logits are whole (tests/architectures).
WHOLE_HEADS = {"olmo", "phi3small", "talkie"}
PLAIN_TABLES = ("awq", "gptq")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Linear:
    """A product with a weight of ``outputs`` x ``inputs``; ``nbytes`` if that is quantized."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    nbytes: int | None = None


@dataclass(frozen=True)
class Table:
    """A token table of ``rows`` tokens by ``columns`` features; role as in ember_mlx.token_tables."""

    name: str
    role: str
    rows: int
    columns: int
    nbytes: int | None = None


@dataclass(frozen=True)
class Architecture:
    """The shapes of a decoder. Widths are bytes of a number.

    ``notes`` say, in words, where the plan rests on less than it should.
    """

    model_type: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    width: int
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norms: bool
    quantization: dict | None = None
    notes: list = field(default_factory=list)

    @property
    def whole_head(self) -> bool:
        """Whether its logits cannot be had a slice of the vocabulary at a time."""
        return self.model_type in WHOLE_HEADS

    def linears(self, layer: int) -> list[Linear]:
        """The linears of a decoder layer, in mlx-lm's order."""
        if not self.heads:
            return []
        q, kv, d, m = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.intermediate
        shapes = {
            "self_attn.q_proj": (d, q, self.attention_bias),
            "self_attn.k_proj": (d, kv, self.attention_bias),
            "self_attn.v_proj": (d, kv, self.attention_bias),
            "self_attn.o_proj": (q, d, self.output_bias),
            "mlp.gate_proj": (d, m, self.mlp_bias),
            "mlp.down_proj": (m, d, self.mlp_bias),
            "mlp.up_proj": (d, m, self.mlp_bias),
        }
        prefix = f"model.layers.{layer}."
        return [
            Linear(prefix + name, inputs, outputs, bias, self._quantized(prefix + name, outputs, inputs))
            for name, (inputs, outputs, bias) in shapes.items()
        ]

    def tables(self, dequantized: tuple = ()) -> list[Table]:
        """The token tables; those whose role is in ``dequantized`` as plain weights."""
        names = {"tied": "model.embed_tokens"} if self.tied else {"embedding": "model.embed_tokens", "head": "lm_head"}
        return [
            Table(
                name,
                role,
                self.vocabulary,
                self.hidden,
                None if role in dequantized else self._quantized(name, self.vocabulary, self.hidden),
            )
            for role, name in names.items()
        ]

    def ends(self, dequantized: tuple = ()) -> tuple[Table, Table]:
        """The embedding and the head: of a tied model the same table twice."""
        tables = self.tables(dequantized)
        return tables[0], tables[-1]

    @property
    def is_exact(self) -> bool:
        """Whether its layers are of a family that is planned to the last weight."""
        return self.model_type in EXACT and self.layers > 0

    def shapes(self) -> Shapes:
        """What the choice of what trains depends on."""
        dtype = {width: name for name, width in WIDTHS.items()}[self.width]
        tables = [
            TokenTable(f"{table.name}.weight", table.role, (table.rows, table.columns), dtype, table.nbytes is not None)
            for table in self.tables()
        ]
        linears = [self.linears(layer) for layer in range(self.layers)]
        modules = [*self.tables(), *itertools.chain.from_iterable(linears)]
        return Shapes(
            looked_for="config.json",
            layers=self.layers or None,
            tables=tuple(tables),
            quantized=min((module.name for module in modules if module.nbytes is not None), default=None),
            layer_modules=tuple(
                frozenset(linear.name.removeprefix(f"model.layers.{layer}.") for linear in each)
                for layer, each in enumerate(linears)
            )
            if self.is_exact  # other families may call the modules of their layers otherwise
            else None,
            modules=frozenset(module.name for module in modules),
        )

    def with_rows(self, rows: int) -> "Architecture":
        """The same with token tables of so many rows, all of them plain weights: what ``--add-tokens`` makes of it."""
        quantization = self.quantization and self.quantization | self._plain_tables()
        return replace(self, vocabulary=rows, quantization=quantization)

    def with_layers_of(self, bits: int) -> "Architecture":
        """The same with layers of so many bits, and plain token tables: what ``--quantize`` makes of it."""
        return replace(self, quantization={"bits": bits, "group_size": GROUP_SIZE} | self._plain_tables())

    def _plain_tables(self):
        return dict.fromkeys((table.name for table in self.tables()), False)

    def _quantized(self, name, rows, columns):
        """Bytes of a packed weight with its scales, or None where it is not packed."""
        own = (self.quantization or {}).get(name, self.quantization)
        if not own:
            return None
        if not isinstance(own, dict):  # true: as all others
            own = self.quantization
        bits, group = own["bits"], own["group_size"]
        if columns % group:
            return None
        # Affine groups have a scale and a bias of the model's type; the float modes a scale of one byte.
        of_group = 2 * self.width if own.get("mode", "affine") == "affine" else 1
        return rows * columns * bits // 8 + rows * (columns // group) * of_group


def read_architecture(config: dict, where: str) -> Architecture:
    """The architecture that a config.json describes; ``where`` names it in errors.

    Raises:
        InputError: for sizes that cannot be, and when the keys are missing without which nothing can be planned.
    """
    if isinstance(config.get("text_config"), dict):
        config = config | config["text_config"]
    sizes, notes = {}, []
    for name, others in NAMES.items():
        key = next((key for key in (name, *others) if config.get(key) is not None), None)
        if key is not None:
            sizes[name] = _whole(config[key], LARGEST[name], f"{where}: {key}")
    missing = [name for name in ("vocab_size", "hidden_size") if name not in sizes]
    if missing:
        raise InputError(
            f"{where}: {' and '.join(missing)} missing, and nothing can be planned without; give the config.json of "
            "a language model"
        )
    missing = [name for name in ("num_hidden_layers", "num_attention_heads", "intermediate_size") if name not in sizes]
    if missing:
        notes.append(
            f"{where} has no {', '.join(missing)}: the layers are left out, and only token tables, logits and loss are "
            "planned; the run takes more"
        )
    model_type = str(config.get("model_type", "unknown"))
    if model_type not in EXACT and not missing:
        notes.append(f"{model_type} is planned as if its layers were Llama's of these sizes; it may differ in detail")
    if any(config.get(key) for key in EXPERTS):
        notes.append("this is a mixture of experts; the experts are not planned, and the run takes far more")
    heads = 0 if missing else sizes["num_attention_heads"]
    if heads % sizes.get("num_key_value_heads", 1):
        raise InputError(
            f"{where}: {heads} attention heads cannot share {sizes['num_key_value_heads']} key and value heads: the "
            "first must be a multiple of the second"
        )
    return Architecture(
        model_type=model_type,
        hidden=sizes["hidden_size"],
        layers=0 if missing else sizes["num_hidden_layers"],
        intermediate=sizes.get("intermediate_size", 0),
        heads=heads,
        kv_heads=sizes.get("num_key_value_heads", heads),
        head_dim=sizes.get("head_dim", max(sizes["hidden_size"] // max(heads, 1), 1)),
        vocabulary=sizes["vocab_size"],
        tied=_tied(config, model_type),
        width=WIDTHS.get(str(config.get("torch_dtype") or config.get("dtype")), 2),
        attention_bias=bool(config.get("attention_bias", model_type in BIASES)),
        output_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        head_norms=model_type in HEAD_NORMS,
        quantization=_quantization(config, where),
        notes=notes,
    )


def _tied(config, model_type):
    if model_type in ALWAYS_TIED:
        return True
    stated = config.get("tie_word_embeddings")
    return model_type in TIED_BY_DEFAULT if stated is None else bool(stated)


def _quantization(config, where):
    found = config.get("quantization") or config.get("quantization_config")
    if not found:
        return None
    if not isinstance(found, dict) or "bits" not in found:
        raise InputError(f"{where}: quantization {found}: mlx-lm's has bits and group_size; convert the model first")
    where = f"{where}: quantization"
    of_modules = {name: _packing(own, f"{where}: {name}") for name, own in found.items() if isinstance(own, dict)}
    # Others' methods, which mlx-lm reads too, leave the tables as they are.
    plain = {"model.embed_tokens": False, "lm_head": False} if found.get("quant_method") in PLAIN_TABLES else {}
    return _packing(found, where) | of_modules | plain


def _packing(stated, where):
    """How a module is packed, or all that say nothing of their own; what is not stated is as MLX has it."""
    bits = _whole(stated.get("bits", 4), 8, f"{where}: bits")
    return stated | {"bits": bits, "group_size": _whole(stated.get("group_size", 64), 1024, f"{where}: group_size")}


def _whole(value, largest, where):
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or not 1 <= value <= largest:
        raise InputError(f"{where}: {value!r} must be a whole number from 1 to {largest:,}")
    if int(value) != value:
        raise InputError(f"{where}: {value!r} must be a whole number")
    return int(value)
