"""The rows of a data set: what is wrong with one, its tokens, and how many of these ``--mask-prompt`` masks.

mlx-lm tokenizes a row when a batch needs it, and masks as many tokens as the prompt alone has. Here every row is
tokenized before the first step, so that errors name it in time, and the mask is exact.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, ConcatenatedDataset
from mlx_lm.utils import common_prefix_len

from ember_mlx.finetune.answers import (
    Spans,
    answers_by_marker,
    answers_in_text,
    answers_in_tokens,
    has_answer,
    has_empty_answer,
    opening_of,
)
from ember_mlx.finetune.options import Options
from ember_mlx.shared.errors import InputError, reason_of

__all__ = ["REMEDY", "ChatRows", "TriedRows", "fault_of", "spans_of", "tokenized", "with_masked_prompts"]

REMEDY = "fix or remove that line"
SAYS_SOMETHING = "tool_calls"  # beside it, a message needs no content


def fault_of(
    row: dict[str, Any], keys: tuple[str, ...], *, chat: bool = False, mask_prompt: bool = False
) -> str | None:
    """What keeps a row from training, in words that follow its name, or None.

    Args:
        row (dict): It has the keys.
        keys (tuple): Of what it is trained on: the text, the prompt and the completion, or the messages.
        chat (bool): Whether the one key is that of messages.
        mask_prompt (bool): Whether answers alone are learned.
    """
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        return f"has tools of type {type(tools).__name__}, which must be a list"
    for key in keys:
        value = row[key]
        if len(keys) == 1:
            if not isinstance(value, list if chat else str) or not value:
                return f"has no {key} that can be trained on"
        elif fault := _fault_of_content(value):
            return f"has a {key} {fault}"
    return _fault_of_turns(row[keys[0]], mask_prompt) if chat else None


def _fault_of_turns(turns, mask_prompt):
    for turn in turns:
        if not isinstance(turn, dict) or "role" not in turn:
            return "has a message without a role"
        if not isinstance(turn["role"], str):
            return f"has a message whose role is of type {type(turn['role']).__name__}, which must be a text"
        calls = turn.get(SAYS_SOMETHING)
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            return f"has a message whose {SAYS_SOMETHING} are no list of objects"
        content = turn.get("content")
        if not (content is None and calls) and (fault := _fault_of_content(content)):
            return f"has a message of role {turn['role'][:40]!r} with a content {fault}"
    if mask_prompt and len(turns) < 2:
        return "has one message, of which --mask-prompt leaves nothing"
    return None


def _fault_of_content(content):
    """Lists of parts are for the chat template to judge."""
    if isinstance(content, str) or (isinstance(content, list) and content):
        return None
    if content is None or content == []:
        return "of null, which must be a text" if content is None else "of no parts, which must be a text"
    return f"of type {type(content).__name__}, which must be a text"


class ChatRows:
    """mlx-lm's rows of messages, or of a prompt and a completion, with the same tokens.

    With ``--mask-prompt`` every answer is learned, see :mod:`ember_mlx.finetune.answers`. By mlx-lm's rule it is the
    last turn. Its offset is here the number of tokens that the row and its prompt share. A template may begin an answer
    otherwise in a prompt than in a row, as with an empty think block. mlx-lm's offset, the length of the prompt, then
    lies within the answer.

    Args:
        rows (ChatDataset or CompletionsDataset): mlx-lm's.
        last_alone (bool): Whether mlx-lm's rule holds.
    """

    def __init__(self, rows: ChatDataset | CompletionsDataset, last_alone: bool = True):
        self.rows = rows
        self.last_alone = last_alone
        self.tokenizer = rows.tokenizer
        self.mask_prompt = rows.mask_prompt
        self.unshared = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def fault_of(self, row: dict[str, Any]) -> str | None:
        """See :func:`fault_of`."""
        if isinstance(self.rows, ChatDataset):
            key = self.rows.chat_key
            fault = fault_of(row, (key,), chat=True, mask_prompt=self.mask_prompt)
            if fault is None and self.mask_prompt and not self.last_alone and not has_answer(row[key]):
                return "has no message of role assistant, and --mask-prompt learns nothing else"
            return fault
        return fault_of(row, (self.rows.prompt_key, self.rows.completion_key))

    def has_empty_answer(self, row: dict[str, Any]) -> bool:
        """Whether an answer of a row says nothing."""
        return has_empty_answer(self._whole(row))

    def process(self, row: dict[str, Any]) -> tuple[list[int], int | Spans]:
        """The tokens of a row, and what is learned of them: a number of tokens at the start is not, or spans are.

        Raises:
            ValueError: when the template would write a content as Python does, for an answer that cannot be found, and
                whatever the template raises.
        """
        turns = self._turns(row)
        tokens = self._templated(row, turns)
        if self.mask_prompt and not self.last_alone:
            return tokens, self._answers(row, turns, tokens)
        offset = 0
        if self.mask_prompt:
            answered = turns[-1].get("role") == "assistant"
            prompt = self._templated(row, turns[:-1], add_generation_prompt=answered)
            offset = common_prefix_len(tokens, prompt)
            self.unshared += offset < len(prompt)
        return tokens, offset

    def _answers(self, row, turns, tokens):
        marked = answers_by_marker(self.tokenizer, turns, row.get("tools"), tokens)
        if marked is not None:
            return marked
        write = partial(self._templated, row, tokenize=False)
        text, answers, whole = answers_in_text(write, turns, opening_of(write, turns))
        self.unshared += not whole
        return answers_in_tokens(self.tokenizer, text, tokens, answers)

    def _whole(self, row):
        if isinstance(self.rows, ChatDataset):
            return row[self.rows.chat_key]
        return [
            {"role": "user", "content": row[self.rows.prompt_key]},
            {"role": "assistant", "content": row[self.rows.completion_key]},
        ]

    def _turns(self, row):
        """What the template gets: with a text in the place of null, where the template would write "None"."""
        turns = self._whole(row)
        others = [turn["content"] for turn in turns if not isinstance(turn.get("content", ""), str)]
        if not others:
            return turns
        text = self._templated(row, turns, tokenize=False)
        for content in others:
            if content is not None and str(content) in text:
                raise ValueError(f"the chat template takes no content of type {type(content).__name__}")
        empty = [turn | {"content": ""} if turn.get("content", "") is None else turn for turn in turns]
        written = text.count("None") > self._templated(row, empty, tokenize=False).count("None")
        return empty if written else turns

    def _templated(self, row, turns, **options):
        return self.tokenizer.apply_chat_template(turns, tools=row.get("tools"), return_dict=False, **options)


def with_masked_prompts(rows: Any, args: Options) -> Any:
    """A data set of mlx-lm's, with :class:`ChatRows` in the place of chats and completions."""
    if isinstance(rows, ConcatenatedDataset):
        rows._data = [with_masked_prompts(each, args) for each in rows._data]
    last_alone = args.train_tables == "none"  # then the run is mlx-lm's own
    return ChatRows(rows, last_alone) if isinstance(rows, ChatDataset | CompletionsDataset) else rows


def tokenized(rows: Any, index: int, where: str) -> tuple[list[int], int | Spans]:
    """What ``rows.process`` makes of a row: its tokens, and what is learned of them.

    Args:
        rows: A data set of mlx-lm's kind.
        index (int): From 0.
        where (str): The name of the row, for errors.

    Raises:
        InputError: for a row of another type, or that the tokenizer or the chat template refuses or makes nothing of.
    """
    row = rows[index]
    part = _part_of(rows, row)
    if isinstance(part, ChatRows):
        if fault := part.fault_of(row):
            raise InputError(f"{where} {fault}: {REMEDY}")
        if not getattr(part.tokenizer, "has_chat_template", True):
            raise InputError(f"{where} needs a chat template, which the model lacks: use rows of text")
    try:
        return rows.process(row)
    # Whatever a tokenizer or a chat template has against it.
    except Exception as error:
        reason = reason_of(error)
        raise InputError(f"{where} cannot be tokenized ({reason}): {REMEDY}") from error


def _part_of(rows, row):
    """The data set that a row is of."""
    return rows._data[row["_dataset"]] if isinstance(rows, ConcatenatedDataset) else rows


def spans_of(tokens: list[int], learned: int | Spans, max_seq_length: int) -> Spans:
    """The tokens of a row that are learned, as spans; a row without any has none.

    The first token of a row is never predicted.

    Args:
        tokens: The row's.
        learned: Spans, or as mlx-lm has it the number of tokens at the start that are not learned.
        max_seq_length: As the option, which cuts the row.
    """
    spans = [(learned, len(tokens))] if isinstance(learned, int) else learned
    cut = [(max(start, 1), min(end, max_seq_length)) for start, end in spans]
    return [(start, end) for start, end in cut if start < end]


class TriedRows:
    """A data set, every row of which was tokenized once.

    ``lengths`` are the tokens of each row, before it is cut. ``checksum`` is the SHA-256 of the rows and
    ``token_checksum`` that of their tokens and masks, in hexadecimal. ``unshared`` is the number of rows whose prompt,
    which ``--mask-prompt`` masks, is no prefix of the row. ``empty_answers`` are the numbers of rows in which an answer
    says nothing.

    Args:
        rows: A data set of mlx-lm's kind; an empty list where there is none.
        where (callable): Of the number of a row, from 0: its name, for errors.

    Raises:
        InputError: for the first row that cannot be trained on; see :func:`tokenized`.
    """

    def __init__(self, rows: Any, where: Callable[[int], str]):
        self.rows, self.where = rows, where
        content, learned = hashlib.sha256(), hashlib.sha256()
        self.lengths, self.empty_answers = [], []
        for i in range(len(rows)):
            tokens, spans = tokenized(rows, i, where(i))
            if not tokens:
                raise InputError(f"{where(i)}: the tokenizer makes nothing of it: {REMEDY}")
            self.lengths.append(len(tokens))
            part = _part_of(rows, rows[i])
            if isinstance(part, ChatRows) and part.has_empty_answer(rows[i]):
                self.empty_answers.append(i)
            learned.update(json.dumps([tokens, spans]).encode())
            content.update(json.dumps(rows[i], sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
        self.checksum, self.token_checksum = content.hexdigest(), learned.hexdigest()
        parts = rows._data if isinstance(rows, ConcatenatedDataset) else [rows]
        self.unshared = sum(part.unshared for part in parts if isinstance(part, ChatRows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def process(self, row: dict[str, Any]) -> tuple[list[int], int | Spans]:
        """The tokens, and what is learned of them: see :func:`spans_of`."""
        return self.rows.process(row)
