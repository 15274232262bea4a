"""The keys of a data set's rows: which of them are trained on, and the row that mlx-lm takes for it.

mlx-lm knows a prompt and its completion, messages, and text. Alpaca's and ShareGPT's rows become these, and so do
questions with their answers.
"""

import json
import shlex
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, TextDataset

from ember_mlx.finetune.options import Options, defaults
from ember_mlx.finetune.rows import REMEDY, fault_of
from ember_mlx.shared.command_line import flag
from ember_mlx.shared.errors import InputError, did_you_mean

__all__ = ["Layout", "layout_of", "mlx_lm_row"]

ALPACA = ("instruction", "output")  # and often an input
QUESTIONS = ("question", "answer")
FEATURES = ("prompt_feature", "completion_feature", "chat_feature", "text_feature")
"""The options that name keys."""
SHAREGPT = "conversations"
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""The role of a message, by ShareGPT's ``from``."""


@dataclass(frozen=True)
class Layout:
    """What a data set's rows are trained on.

    Attributes:
        keys: Of a prompt and a completion, of messages, or of text.
        chat: Whether the key is that of messages.
        mask_prompt: As the option.
    """

    keys: tuple[str, ...]
    chat: bool
    mask_prompt: bool

    def data_set(
        self, rows: list[dict[str, Any]], tokenizer: TokenizerWrapper
    ) -> ChatDataset | CompletionsDataset | TextDataset:
        """mlx-lm's data set of rows of :func:`mlx_lm_row`."""
        if self.chat:
            return ChatDataset(rows, tokenizer, *self.keys, self.mask_prompt)
        if len(self.keys) == 2:
            keys = ("prompt", "completion") if self.keys == ALPACA else self.keys
            return CompletionsDataset(rows, tokenizer, *keys, self.mask_prompt)
        return TextDataset(rows, tokenizer, *self.keys)


def layout_of(args: Options, row: Any, where: str) -> Layout:
    """The layout of a data set, which its first row decides: mlx-lm's kinds in its order, then the others.

    With ``--mask-prompt``, text comes last.

    Args:
        args: The run's options.
        row: The first of the data set.
        where: Its name, for errors.

    Raises:
        InputError: for a row that has none of these keys, for text with ``--mask-prompt``, and for a key that is named
            and not taken.
    """
    completions, chat = (args.prompt_feature, args.completion_feature), args.chat_feature
    kinds = [completions, (chat,), ALPACA, QUESTIONS, (SHAREGPT,)]
    kinds.insert(len(kinds) if args.mask_prompt else 2, (args.text_feature,))
    keys = next((kind for kind in kinds if isinstance(row, dict) and row.keys() >= set(kind)), None)
    if keys is None:
        flags = ", ".join(flag(f"{name}_feature") for name in ("prompt", "completion", "chat"))
        found = f"it has {', '.join(map(str, row))}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
        raise InputError(
            f"{where} is of no kind that mlx-lm trains on: it needs the keys {' and '.join(completions)}, or {chat}, "
            f"or {args.text_feature}, or {' and '.join(ALPACA)}, or {' and '.join(QUESTIONS)}, or {SHAREGPT}; {found}; "
            f"name its own keys by {flags} or --text-feature{_as_flags(row)}"
        )
    if args.mask_prompt and keys == (args.text_feature,):
        raise InputError(
            f"--mask-prompt: {where} has {keys[0]} and so no prompt; leave --mask-prompt out, or use rows of "
            f"{' and '.join(completions)}"
        )
    usual = defaults()
    for name in FEATURES:
        named = getattr(args, name)
        if named not in (usual[name], *keys, *row):
            near = did_you_mean(named, map(str, row)) or f"; it has {', '.join(map(str, row))}"
            raise InputError(f"{flag(name)} {named}: {where} has no such key{near}; write one as is, or leave it out")
        if named not in (usual[name], *keys):
            raise InputError(
                f"{flag(name)} {named}: no effect: {where} is trained on by its {' and '.join(keys)}; leave it out, or "
                "take these keys out of the rows"
            )
    return Layout(keys, keys in ((chat,), (SHAREGPT,)), args.mask_prompt)


def _as_flags(row):
    """The flags to type, where there are two keys that can be no other."""
    if not isinstance(row, dict) or len(row) != 2:
        return ""
    prompt, completion = (shlex.quote(str(key)) for key in row)
    return f", such as --prompt-feature {prompt} --completion-feature {completion}"


def mlx_lm_row(row: Any, layout: Layout, where: str) -> dict[str, Any]:
    """The row that mlx-lm takes for this one: the same, unless it is Alpaca's, ShareGPT's or holds messages as JSON.

    Raises:
        InputError: for a row that cannot be trained on.
    """
    for key in layout.keys:
        if not isinstance(row, dict) or key not in row:
            raise InputError(f"{where} has no {key}, which the first line has: {REMEDY}")
    if layout.chat:
        row, fault = _with_messages(row, layout.keys[0])
    else:
        fault = _fault_of_input(row) if layout.keys == ALPACA else None
    fault = fault or fault_of(row, layout.keys, chat=layout.chat, mask_prompt=layout.mask_prompt)
    if fault:
        raise InputError(f"{where} {fault}: {REMEDY}")
    return _completion(row) if layout.keys == ALPACA else row


def _fault_of_input(row):
    given = row.get("input")
    return None if given is None or isinstance(given, str) else f"has an input of type {type(given).__name__}"


def _completion(row):
    instruction, output = (row[key] for key in ALPACA)
    given = row.get("input")
    return {"prompt": f"{instruction}\n\n{given}" if given else instruction, "completion": output}


def _with_messages(row, key):
    """The row with a list of messages, and what is wrong with it or None."""
    turns = row[key]
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # a cell of a table
        try:
            turns = json.loads(turns)
        except (RecursionError, ValueError) as error:
            return row, f"has {key} that are not JSON ({error})"
        row = row | {key: turns}
    if not isinstance(turns, list) or not any(isinstance(turn, dict) and "from" in turn for turn in turns):
        return row, None
    messages = []
    for turn in turns:
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in ROLES:
            return row, f"has a turn from {str(speaker)[:40]!r}, which must be one of {', '.join(ROLES)}"
        if not isinstance(turn.get("value"), str):
            return row, f"has a turn from {speaker} without a value that is text"
        messages.append({"role": ROLES[speaker], "content": turn["value"]})
    if row.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    return row | {key: messages}, None
