"""The rules that decide which weights are token tables, without a framework: MLX and PyTorch models go through them.

A token table has one row a token: the embedding that turns token ids into vectors, the head that turns vectors into
one logit a token, or one weight that does both (tied). The decision:

1. The vocabulary is what the model states: `args.vocab_size` and the like, in the model or in any part of it.
2. Embedding: a lookup module, wherever it is, whose rows are a stated vocabulary or the nearest number above it (tables
   are padded, and tokens are added without telling `args`). Where nothing is stated, the vocabulary is the rows of a
   lookup that a linear outside the layers answers to, else those of the largest lookup.
3. Head: a linear outside the decoder layers with that many outputs, the nearest to the root if there are several. One
   that exists unused, because a flag that the forward pass reads makes the embedding answer, is none.
4. Tied: the embedding that is a linear's weight too; without such a one and without a head, the first embedding over
   the largest vocabulary.

Names decide one thing, where structure cannot: a lookup that is called a position table counts only if it has a stated
vocabulary and no other lookup does. Hashed n-gram tables are no token tables: their rows are no tokens, and more than
the vocabulary.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Candidate", "TokenTable", "decide", "stated_vocabularies"]

_VOCABULARY_FIELDS = ("vocab_size", "n_vocab", "num_vocab", "padded_vocab_size", "vocab_size_per_layer_input")
_POSITION_NAME = re.compile(r"(^|_)(wpe|pos|pos_?emb\w*|pos_?enc\w*|position\w*)(_|$)")


@dataclass(frozen=True)
class TokenTable:
    """One token table of a model.

    Attributes:
        path: The parameter's name, such as "model.embed_tokens.weight": in MLX that of
            `tree_flatten(model.parameters())`, in PyTorch that of `model.named_parameters()`.
        role: "embedding", "head", or "tied": both in one weight, which is also said when a model has no head at all.
        shape: (V, D): rows of tokens, features. Of the unpacked weight when quantized.
        dtype: The weight's dtype, of its framework; when quantized in MLX, the one it dequantizes to.
        quantized: Whether the weight is packed, and so cannot be trained as it is.
    """

    path: str
    role: str
    shape: tuple[int, int]
    dtype: Any
    quantized: bool

    @property
    def module_path(self) -> str:
        """The module that holds the weight ("model.embed_tokens"); "" for a parameter of the model itself."""
        return self.path.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A two-dimensional weight and what decides about it."""

    table: TokenTable  # its role still open
    kind: str  # "lookup", "linear", or "array": a parameter of no such module
    place: list[str]  # the path of the module (of an array itself), without an adapter that wraps it
    is_also_linear: bool = False  # a lookup whose weight stands in a linear too
    is_unused: bool = False  # a linear that the forward pass leaves aside

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


def decide(candidates: list[Candidate], stated: set[int]) -> list[TokenTable]:
    """The token tables among all 2-D weights of a model, in its order, which states these vocabularies.

    Embeddings (or tied) come first, then heads.
    """
    lookups = [c for c in candidates if c.kind == "lookup"]
    linears = [c for c in candidates if c.kind == "linear" and not c.in_layers]
    arrays = [c for c in candidates if c.kind == "array" and not c.in_layers and not c.called_position]

    # Last, and by name, since structure cannot tell: positions may be as many as tokens, or as many as padded tokens.
    others = [c for c in lookups if not c.called_position]
    embeddings = _over_stated(others, stated) or _over_stated(lookups, stated) or _over_inferred(others, linears)
    heads = _heads(linears, arrays, stated | {c.rows for c in embeddings}, {c.width for c in embeddings})
    tied = [c for c in embeddings if c.is_also_linear]
    if not tied and not heads and embeddings:
        tied = [max(embeddings, key=lambda c: c.rows)]
    return [replace(c.table, role="tied" if c in tied else "embedding") for c in embeddings] + [
        replace(c.table, role="head") for c in heads
    ]


def _over_stated(lookups: list[Candidate], stated: set[int]) -> list[Candidate]:
    """Per vocabulary, the lookups with as many rows, or with the next larger number that any lookup has."""
    rows = {min((c.rows for c in lookups if c.rows >= v), default=None) for v in stated}
    return [c for c in lookups if c.rows in rows]


def _over_inferred(lookups: list[Candidate], linears: list[Candidate]) -> list[Candidate]:
    """The lookups with most rows, among those whose number of rows is a linear's number of outputs if there are any."""
    outputs = {c.rows for c in linears}
    tokens = [c for c in lookups if c.is_also_linear or c.rows in outputs] or lookups
    return [c for c in tokens if c.rows == max(t.rows for t in tokens)]


def _heads(
    linears: list[Candidate], arrays: list[Candidate], vocabularies: set[int], widths: set[int]
) -> list[Candidate]:
    """What maps to the vocabulary: linears, else padded linears, else bare (V, D) parameters, as `talkie` has."""
    matching = (
        [c for c in linears if c.rows in vocabularies]
        or [c for c in linears if c.width in widths and any(_pads(c.rows, v) for v in vocabularies)]
        or [c for c in arrays if c.width in widths and c.rows in vocabularies]
    )
    used = [c for c in matching if not c.is_unused]
    return [c for c in used if len(c.place) == min(len(u.place) for u in used)]


def _pads(rows: int, vocabulary: int) -> bool:
    # Published paddings add a few percent or a few hundred rows; allowing much more would take other projections.
    return 0 < rows - vocabulary <= max(256, vocabulary // 8)


def stated_vocabularies(modules: Iterable[Any]) -> set[int]:
    """The sizes that a model's modules and their `args` or `config` call a vocabulary, nested configs included."""
    sizes, seen, pending = set(), set(), list(modules)
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
