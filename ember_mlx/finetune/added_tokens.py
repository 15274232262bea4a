"""New tokens: the tokenizer learns them, and the token tables get a row for each.

A new row starts at the mean of the rows of what the token was split into before, in the embedding and in the head: to
the model the token means at first what its pieces meant together. Tables with rows to spare, as those that are padded,
give these first; they grow only beyond that, by as many rows as are needed.

An adapter names the tokens and their ids in its config. Loading it does the same again to the same base model, and then
puts the trained rows in; so no second copy of the tokenizer can disagree with the first.
"""

import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.cli_ui import rprint
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken

from ember_mlx.finetune.as_given import as_given
from ember_mlx.finetune.choices import ROLES
from ember_mlx.finetune.options import Options
from ember_mlx.finetune.trainable import dequantize_to_train
from ember_mlx.shared.errors import InputError, did_you_mean_path, reason_of
from ember_mlx.token_tables import find_token_tables

__all__ = ["NewToken", "add_asked_tokens", "add_tokens", "grow_tokenizer", "read_tokens"]


@dataclass(frozen=True)
class NewToken:
    """A token, its id, and the ids of what the tokenizer made of its text before."""

    content: str
    special: bool
    id: int
    pieces: tuple[int, ...]


def add_asked_tokens(
    options: Options, model: nn.Module, tokenizer: TokenizerWrapper, config: dict[str, Any]
) -> tuple[TokenizerWrapper, list[dict[str, Any]] | None]:
    """Add the tokens of ``--add-tokens`` to the model.

    Args:
        options: The run's.
        model: Its tables get the new rows; quantized ones are dequantized.
        tokenizer: The model's.
        config: The model's, of which the vocabulary is changed if the tables grow.

    Returns:
        The new tokenizer, and content, special and id of each token; None without ``--add-tokens``.

    Raises:
        InputError: for a file that cannot be used, a token that is there already, is empty or repeats, and for a
            tokenizer or a model that cannot grow.
    """
    if options.add_tokens is None:
        return tokenizer, None
    where = f"--add-tokens {options.add_tokens}"
    asked = read_tokens(Path(options.add_tokens))
    tables = find_token_tables(model)
    dequantize_to_train(model, [table.module_path for table in tables if table.quantized])
    rows = tables[0].shape[0] if tables else 0
    tokenizer, tokens = add_tokens(model, tokenizer, config, asked, where)
    now = find_token_tables(model)[0].shape[0]
    size = f"the token tables grow from {rows} to {now} rows" if now > rows else f"of {rows} rows, which were to spare"
    rprint(f"Added {len(tokens)} tokens, ids {tokens[0].id} to {tokens[-1].id}; {size}")
    for table in tables:
        if table.role not in ROLES[options.train_tables]:
            line = f"Warning: --train-tables {options.train_tables}: the new rows of {table.path} are not trained"
            rprint(as_given(line, options.given))
    return tokenizer, [{"content": t.content, "special": t.special, "id": t.id} for t in tokens]


def read_tokens(path: Path) -> list[tuple[str, bool]]:
    """The tokens in a file and whether they are special: lines of a text, or a list of special ones in a .json file.

    Raises:
        InputError: when this file does not exist, for an empty token and for one that is there twice.
    """
    where = f"--add-tokens {path}"
    try:
        text = path.read_bytes().decode("utf-8-sig")  # Windows' editors put a mark before the first token
        special = path.suffix.lower() == ".json"
        tokens = json.loads(text) if special else text.splitlines()
    except (OSError, RecursionError, ValueError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise InputError(
            f"{where}: cannot be read ({reason}){did_you_mean_path(path)}; give a text of one token a line, or JSON"
        ) from error
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise InputError(f'{where}: must hold a list of special tokens, such as ["<think>", "</think>"]')
    if not tokens:
        raise InputError(f"{where}: holds no token; put one a line")
    for number, token in enumerate(tokens, 1):
        if not token.strip():
            raise InputError(f"{where}: token {number} is empty; remove that line")
        if token != token.strip() and not special:
            raise InputError(f"{where}: token {number}, {token!r}, begins or ends with a space; remove the space")
    token, count = Counter(tokens).most_common(1)[0]
    if count > 1:
        raise InputError(f"{where}: {token!r} appears {count} times; keep one")
    return [(token, special) for token in tokens]


def add_tokens(
    model: nn.Module, tokenizer: TokenizerWrapper, config: dict[str, Any], asked: list[tuple[str, bool]], where: str
) -> tuple[TokenizerWrapper, list[NewToken]]:
    """Add ``asked``, pairs of text and whether it is special, to the model and its config.

    Args:
        config (dict): The model's, of which the vocabulary is changed if the tables grow.
        where (str): What errors begin with.

    Returns:
        The new tokenizer in the place of ``tokenizer``, and a NewToken for each.

    Raises:
        InputError: for a token that is there already, and a tokenizer or a model that cannot grow.
    """
    tokenizer, tokens = grow_tokenizer(tokenizer, asked, where)
    _grow_tables(model, config, tokens, where)
    return tokenizer, tokens


def grow_tokenizer(
    wrapper: TokenizerWrapper, asked: list[tuple[str, bool]], where: str
) -> tuple[TokenizerWrapper, list[NewToken]]:
    """What :func:`add_tokens` does to the tokenizer alone: no model is needed for that."""
    tokenizer = wrapper._tokenizer
    pieces = {}
    vocabulary = tokenizer.get_vocab()
    taken = set(vocabulary.values())
    for content, _ in asked:
        try:
            content.encode()  # JSON can hold half of a surrogate pair
            pieces[content] = tuple(tokenizer.encode(content, add_special_tokens=False))
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: {content!r} holds half of a surrogate pair; leave it out") from error
        except Exception as error:  # whatever a tokenizer refuses
            reason = reason_of(error)
            raise InputError(f"{where}: the tokenizer refuses {content!r} ({reason}); leave it out") from error
        if not pieces[content]:
            raise InputError(f"{where}: the tokenizer makes nothing of {content!r}; leave it out")
    known = {
        content: vocabulary.get(content, split[0])
        for content, split in pieces.items()
        if content in vocabulary or (len(split) == 1 and split[0] != tokenizer.unk_token_id)
    }
    if known:
        shown = _some(f"{content!r} (id {known[content]})" for content in known)
        raise InputError(f"{where}: tokens already: {shown}; leave them out")
    try:
        added = [
            AddedToken(content, normalized=not special and _survives(tokenizer, content), special=special)
            for content, special in asked
        ]
        tokenizer.add_tokens(added, special_tokens=any(special for _, special in asked))
        ids = tokenizer.convert_tokens_to_ids([content for content, _ in asked])
        found = [tokenizer.encode(content, add_special_tokens=False) for content, _ in asked]
    # Whatever a tokenizer of its own kind raises.
    except Exception as error:
        raise InputError(f"{where}: this model's tokenizer cannot grow: {reason_of(error)}") from error
    spoilt = {}
    for (content, _), number, encoded in zip(asked, ids, found, strict=True):
        if encoded != [number] or number in taken:
            raise InputError(
                f"{where}: this model's tokenizer cannot grow: {content!r} is {len(encoded)} tokens even when added"
            )
        written = tokenizer.decode([number])
        if written.strip() != content.strip():
            spoilt[content] = written
    if spoilt:
        # A byte-level decoder takes the letters of an added token for bytes if each of them can stand for one.
        shown = _some(f"{content!r} as {written!r}" for content, written in spoilt.items())
        raise InputError(
            f"{where}: this model's tokenizer would write {shown}: byte-level ones do so with letters such as é, ß and "
            "ł in an added token; leave them out"
        )
    tokens = [
        NewToken(content, special, number, pieces[content])
        for (content, special), number in zip(asked, ids, strict=True)
    ]
    return _wrapped_anew(wrapper), tokens


def _survives(tokenizer, content):
    """Whether a token is still itself when the tokenizer has normalized its text, all but spaces.

    Such words are looked for in the normalized text, as transformers itself does: looked for before, each would get a
    second space behind it from tokenizers of SentencePiece's kind. A tokenizer of lower case would never find them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normalizer = backend.normalizer if backend else None
    return normalizer is None or normalizer.normalize_str(content).replace("▁", " ").split() == content.split()


def _some(words):
    first, *rest = words
    return f"{first} and {len(rest)} more" if rest else first


def _wrapped_anew(wrapper):
    """As mlx-lm wraps a tokenizer that it loads: it keeps a list of all tokens, and looks for those of thinking."""
    detokenizer = wrapper._detokenizer
    keywords = {"trim_space": detokenizer.trim_space} if hasattr(detokenizer, "trim_space") else {}
    return TokenizerWrapper(
        wrapper._tokenizer,
        partial(type(detokenizer), **keywords),
        eos_token_ids=wrapper._eos_token_ids,
        chat_template=wrapper._chat_template,
        tool_call_start=wrapper._tool_call_start,
        tool_call_end=wrapper._tool_call_end,
        tool_parser=wrapper._tool_parser,
        response_format=wrapper._response_format,
    )


def _grow_tables(model, config, tokens, where):
    tables = find_token_tables(model)
    sizes = {table.shape[0] for table in tables}
    if len(sizes) != 1:
        sizes = ", ".join(f"{table.path} of {table.shape[0]} rows" for table in tables) or "no token table"
        raise InputError(f"{where}: this model has {sizes}: new tokens need tables of one size; train without them")
    rows = sizes.pop()
    needed = max(rows, *(token.id + 1 for token in tokens))
    modules = dict(model.named_modules())
    for table in tables:
        module, name = modules[table.module_path], table.path.rpartition(".")[2]
        for key in {name, "bias"} & module.keys():
            module[key] = _with_new_rows(module[key], tokens, needed)
        mx.eval(module.parameters())
    if needed > rows:
        _state_vocabulary(model, config, rows, needed)
        _refuse_unloadable(model, config, where)


def _with_new_rows(array, tokens, needed):
    """``array``, (V, D) or (V,), with ``needed`` rows; those of the tokens are the means of their pieces' rows."""
    means = [array[mx.array(token.pieces)].astype(mx.float32).mean(axis=0) for token in tokens]
    more = mx.zeros((needed - len(array), *array.shape[1:]), array.dtype)
    grown = mx.concatenate([array, more])
    grown[mx.array([token.id for token in tokens])] = mx.stack(means).astype(array.dtype)
    return grown


def _state_vocabulary(model, config, rows, needed):
    """Everything that names the number of rows as the vocabulary: modules, their args, and the config."""
    for module in model.modules():
        for owner in (module, getattr(module, "args", None), getattr(module, "config", None)):
            if getattr(owner, "vocab_size", None) == rows:
                owner.vocab_size = needed
    stated = False
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        if part.get("vocab_size") == rows:
            part["vocab_size"] = needed
            stated = True
    if not stated:
        config["vocab_size"] = needed


def _refuse_unloadable(model, config, where):
    """A fused model is made from its config alone, which must give its tables all rows. No weight is drawn for that."""
    args = getattr(model, "args", None) or model.config
    try:
        made = type(model)(type(args).from_dict(config))
        shapes = [{table.path: table.shape for table in find_token_tables(each)} for each in (made, model)]
    # Whatever a model's constructor checks.
    except Exception as error:
        reason = reason_of(error)
        raise InputError(f"{where}: this model cannot have more tokens: {type(error).__name__} {reason}") from error
    if shapes[0] != shapes[1]:
        raise InputError(f"{where}: this model cannot have more tokens: its config does not say how many there are")
