"""Which parameters of a model are token tables, decided once from the model's modules and never by running it.

A token table has one row a token: the embedding that turns token ids into vectors, the head that turns vectors into
one logit a token, or one weight that does both (tied). The decision:

1. The vocabulary is what the model states: `args.vocab_size` and the like, in the model or in any part of it.
2. Embedding: a lookup module, wherever it is, whose rows are a stated vocabulary or the nearest number above it (tables
   are padded, and tokens are added without telling `args`). Where nothing is stated, the vocabulary is the rows of a
   lookup that a linear outside the layers answers to, else those of the largest lookup.
3. Head: a linear outside the decoder layers with that many outputs, the nearest to the root if there are several. One
   that exists unused, because a flag that the forward pass reads makes the embedding answer, is none.
4. Tied: the first embedding over the largest vocabulary, when there is no head.

Names decide one thing, where structure cannot: a lookup that is called a position table counts only if it has a stated
vocabulary and no other lookup does. Hashed n-gram tables are no token tables: their rows are no tokens, and more than
the vocabulary.
"""

import re
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ember_mlx.errors import InputError

__all__ = ["LOOKED_FOR", "TokenTable", "find_token_tables"]

LOOKED_FOR = (
    "an embedding (nn.Embedding, nn.QuantizedEmbedding, or a module with a two-dimensional weight and `as_linear`) "
    "with one row a token of the vocabulary, or a linear outside the decoder layers with one output a token"
)
"""What `find_token_tables` looks for, in words that fit into an error message."""

_VOCABULARY_FIELDS = ("vocab_size", "n_vocab", "num_vocab", "padded_vocab_size", "vocab_size_per_layer_input")
_TYING_FLAGS = ("tie_word_embeddings", "tie_embeddings", "tie_weights", "weight_tying")
_POSITION_NAME = re.compile(r"(^|_)(wpe|pos|pos_?emb\w*|pos_?enc\w*|position\w*)(_|$)")


@dataclass(frozen=True)
class TokenTable:
    """One token table of a model.

    Attributes:
        path: The parameter's name in `tree_flatten(model.parameters())`, such as "model.embed_tokens.weight".
        role: "embedding", "head", or "tied": both in one weight, which is also said when a model has no head at all.
        shape: (V, D): rows of tokens, features. Of the unpacked weight when quantized.
        dtype: The weight's dtype; when quantized, the one it dequantizes to.
        quantized: Whether the weight is packed, and so cannot be trained as it is.
    """

    path: str
    role: str
    shape: tuple[int, int]
    dtype: mx.Dtype
    quantized: bool

    @property
    def module_path(self) -> str:
        """The module that holds the weight ("model.embed_tokens"); "" for a parameter of the model itself."""
        return self.path.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A two-dimensional weight and what decides about it."""

    table: TokenTable  # its role still open
    kind: str  # "lookup", "linear", or "array": a parameter of no such module
    place: list[str]  # the path of the module (of an array itself), without an adapter that wraps it
    user: nn.Module | None  # the module that holds it there

    @property
    def rows(self) -> int:
        return self.table.shape[0]

    @property
    def width(self) -> int:
        return self.table.shape[1]

    @property
    def in_layers(self) -> bool:
        # What is inside a member of a list is in a layer; a leaf in a list (nn.Sequential, several heads) is not.
        return any(part.isdigit() for part in self.place[:-1])

    @property
    def called_position(self) -> bool:
        return _POSITION_NAME.search(self.place[-1]) is not None


def find_token_tables(model: nn.Module) -> list[TokenTable]:
    """Find a model's token tables. Costs no computation: the model is not run and no weight is read.

    Args:
        model: Any `nn.Module`; plain, quantized, or with mlx-lm's LoRA or DoRA layers in it (the path is then that of
            the wrapped weight).

    Returns:
        The tables, embeddings (or tied) first, then heads, each in the model's order. Empty when there is none.

    Raises:
        InputError: `model` is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"find_token_tables({type(model).__name__}): an mlx.nn.Module is needed. "
            "If this is what mlx_lm.load returned, pass its first item, the model."
        )
    candidates = _candidates(model)
    lookups = [c for c in candidates if c.kind == "lookup"]
    linears = [c for c in candidates if c.kind == "linear" and not c.in_layers]
    arrays = [c for c in candidates if c.kind == "array" and not c.in_layers and not c.called_position]
    stated = _stated_vocabularies(model)

    # Last, and by name, since structure cannot tell: positions may be as many as tokens, or as many as padded tokens.
    others = [c for c in lookups if not c.called_position]
    embeddings = _over_stated(others, stated) or _over_stated(lookups, stated) or _over_inferred(others, linears)
    heads = _heads(linears, arrays, stated | {c.rows for c in embeddings}, {c.width for c in embeddings})
    tied = None if heads or not embeddings else max(embeddings, key=lambda c: c.rows)
    return [replace(c.table, role="tied" if c is tied else "embedding") for c in embeddings] + [
        replace(c.table, role="head") for c in heads
    ]


def _over_stated(lookups: list[_Candidate], stated: set[int]) -> list[_Candidate]:
    """Per vocabulary, the lookups with as many rows, or with the next larger number that any lookup has."""
    rows = {min((c.rows for c in lookups if c.rows >= v), default=None) for v in stated}
    return [c for c in lookups if c.rows in rows]


def _over_inferred(lookups: list[_Candidate], linears: list[_Candidate]) -> list[_Candidate]:
    """The lookups with most rows, among those whose number of rows is a linear's number of outputs if there are any."""
    outputs = {c.rows for c in linears}
    tokens = [c for c in lookups if c.rows in outputs] or lookups
    return [c for c in tokens if c.rows == max(t.rows for t in tokens)]


def _heads(
    linears: list[_Candidate], arrays: list[_Candidate], vocabularies: set[int], widths: set[int]
) -> list[_Candidate]:
    """What maps to the vocabulary: linears, else padded linears, else bare (V, D) parameters, as `talkie` has."""
    matching = (
        [c for c in linears if c.rows in vocabularies]
        or [c for c in linears if c.width in widths and any(_pads(c.rows, v) for v in vocabularies)]
        or [c for c in arrays if c.width in widths and c.rows in vocabularies]
    )
    used = [c for c in matching if not _ties_instead(c.user)]
    return [c for c in used if len(c.place) == min(len(u.place) for u in used)]


def _pads(rows: int, vocabulary: int) -> bool:
    # Published paddings add a few percent or a few hundred rows; allowing much more would take other projections.
    return 0 < rows - vocabulary <= max(256, vocabulary // 8)


def _ties_instead(user: nn.Module | None) -> bool:
    """Whether the module that holds a head was told to let the embedding answer, and does so.

    A flag counts only where the forward pass reads it: `helium` builds a head and then obeys `args`, while several
    models carry the same flag in `args` and always use their head.
    """
    code = getattr(type(user).__call__, "__code__", None)
    read = set(_TYING_FLAGS) & set(code.co_names if code else ())
    sources = (user, getattr(user, "args", None), getattr(user, "config", None))
    return any(getattr(source, flag, False) is True for flag in read for source in sources)


def _candidates(model: nn.Module) -> list[_Candidate]:
    """Every two-dimensional weight of the model, in its order; a module that stands in two places counts once."""
    modules = dict(model.named_modules())
    found, seen = [], set()
    for path, array in tree_flatten(model.parameters()):
        module_path, _, parameter = path.rpartition(".")
        module = modules.get(module_path)  # None: an array in a list or a dict
        if module is None or array.ndim != 2 or (id(module), parameter) in seen:
            continue
        seen.add((id(module), parameter))
        place = module_path
        if parameter == "weight":
            kind = "lookup" if isinstance(module, nn.Embedding) or hasattr(module, "as_linear") else "linear"
            wrapper = module_path.rpartition(".")[0]
            if "lora_a" in modules.get(wrapper, {}):
                place = wrapper
        elif "weight" in module or "lora_a" in module:
            continue  # the scales of a packed weight, the factors of an adapter
        else:
            kind, place = "array", path
        user = modules.get(place.rpartition(".")[0])
        found.append(_Candidate(_undecided(path, module, array), kind, place.split("."), user))
    return found


def _undecided(path: str, module: nn.Module, array: mx.array) -> TokenTable:
    rows, columns = array.shape
    if array.dtype != mx.uint32 or "scales" not in module:
        return TokenTable(path, "", (rows, columns), array.dtype, False)
    # The scales of the 4- and 8-bit float modes are bytes; those modes dequantize to bfloat16.
    dtype = mx.bfloat16 if module.scales.dtype == mx.uint8 else module.scales.dtype
    return TokenTable(path, "", (rows, module.scales.shape[-1] * module.group_size), dtype, True)


def _stated_vocabularies(model: nn.Module) -> set[int]:
    """The sizes that the model, its parts and their `args` or `config` call a vocabulary, nested configs included."""
    sizes, seen, pending = set(), set(), list(model.modules())
    while pending:
        source = pending.pop()
        if id(source) in seen:
            continue
        seen.add(id(source))
        fields = dict(source) if isinstance(source, dict) else {}
        for name, value in (fields | getattr(source, "__dict__", {})).items():
            if name in _VOCABULARY_FIELDS and isinstance(value, int) and value > 0:
                sizes.add(value)
            elif name in ("args", "config") or name.endswith("_config"):
                pending.append(value)
    return sizes
