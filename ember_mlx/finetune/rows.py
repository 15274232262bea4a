"""The rows of a data set: what is wrong with one, its tokens, and how many of these ``--mask-prompt`` masks.

mlx-lm tokenizes a row when a batch needs it, and masks as many tokens as the prompt alone has. Here every row is
tokenized before the first step, so that errors name it in time. The mask ends where the row and its prompt differ.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, ConcatenatedDataset
from mlx_lm.utils import common_prefix_len

from ember_mlx.shared.errors import InputError

__all__ = ["REMEDY", "ChatRows", "TriedRows", "fault_of", "tokenized", "with_compared_prompts"]

REMEDY = "fix or remove that line"
SAYS_SOMETHING = "tool_calls"  # beside it, a message needs no content


def fault_of(
    row: dict[str, Any], keys: tuple[str, ...], messages: str | None = None, *, mask_prompt: bool = False
) -> str | None:
    """What keeps a row from training, in words that follow its name, or None.

    Args:
        row (dict): It has the keys.
        keys (tuple): Of what it is trained on: the text, the prompt and the completion, or the messages.
        messages (str, optional): The key of messages in this data set.
        mask_prompt (bool): Whether only the last message is learned.
    """
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        return f"has tools of type {type(tools).__name__}, which must be a list"
    for key in keys:
        value = row[key]
        if key == messages or len(keys) == 1:
            if not isinstance(value, list if key == messages else str) or not value:
                return f"has no {key} that can be trained on"
        elif fault := _fault_of_content(value):
            return f"has a {key} {fault}"
    return _fault_of_turns(row[messages], mask_prompt) if keys == (messages,) else None


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

    With ``--mask-prompt``, the offset of the answer is the number of tokens that the row and its prompt share. A
    template may begin an answer otherwise in a prompt than in a row, as with an empty think block. mlx-lm's offset, the
    length of the prompt, then lies within the answer.

    Args:
        rows (ChatDataset or CompletionsDataset): mlx-lm's.
    """

    def __init__(self, rows: ChatDataset | CompletionsDataset):
        self.rows = rows
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
            return fault_of(row, (self.rows.chat_key,), self.rows.chat_key, mask_prompt=self.mask_prompt)
        return fault_of(row, (self.rows.prompt_key, self.rows.completion_key))

    def process(self, row: dict[str, Any]) -> tuple[list[int], int]:
        """The tokens of a row, and the number of those at its start that are not learned.

        Raises:
            ValueError: when the template would write a content as Python does, and whatever the template raises.
        """
        turns = self._turns(row)
        tokens = self._templated(row, turns)
        offset = 0
        if self.mask_prompt:
            answered = turns[-1].get("role") == "assistant"
            prompt = self._templated(row, turns[:-1], add_generation_prompt=answered)
            offset = common_prefix_len(tokens, prompt)
            self.unshared += offset < len(prompt)
        return tokens, offset

    def _turns(self, row):
        if isinstance(self.rows, ChatDataset):
            turns = row[self.rows.chat_key]
        else:
            turns = [
                {"role": "user", "content": row[self.rows.prompt_key]},
                {"role": "assistant", "content": row[self.rows.completion_key]},
            ]
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


def with_compared_prompts(rows: Any) -> Any:
    """A data set of mlx-lm's, with :class:`ChatRows` in the place of chats and completions."""
    if isinstance(rows, ConcatenatedDataset):
        rows._data = [with_compared_prompts(each) for each in rows._data]
    return ChatRows(rows) if isinstance(rows, ChatDataset | CompletionsDataset) else rows


def tokenized(rows: Any, index: int, where: str) -> tuple[list[int], int]:
    """What ``rows.process`` makes of a row: its tokens, and the number of those that are not learned.

    Args:
        rows: A data set of mlx-lm's kind.
        index (int): From 0.
        where (str): The name of the row, for errors.

    Raises:
        InputError: for a row of another type, or that the tokenizer or the chat template refuses or makes nothing of.
    """
    row = rows[index]
    part = rows._data[row["_dataset"]] if isinstance(rows, ConcatenatedDataset) else rows
    if isinstance(part, ChatRows):
        if fault := part.fault_of(row):
            raise InputError(f"{where} {fault}: {REMEDY}")
        if not getattr(part.tokenizer, "has_chat_template", True):
            raise InputError(f"{where} needs a chat template, which the model lacks: use rows of text")
    try:
        tokens, offset = rows.process(row)
    # Whatever a tokenizer or a chat template has against it.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where} cannot be tokenized ({reason}): {REMEDY}") from error
    return tokens, offset


class TriedRows:
    """A data set, every row of which was tokenized once.

    ``checksum`` is the SHA-256 of its rows, ``token_checksum`` that of their tokens and masks, in hexadecimal.
    ``unshared`` is the number of rows whose prompt, which ``--mask-prompt`` masks, is no prefix of the row.

    Args:
        rows: A data set of mlx-lm's kind; an empty list where there is none.
        where (callable): Of the number of a row, from 0: its name, for errors.

    Raises:
        InputError: for the first row that cannot be trained on; see :func:`tokenized`.
    """

    def __init__(self, rows: Any, where: Callable[[int], str]):
        self.rows, self.where = rows, where
        content, learned = hashlib.sha256(), hashlib.sha256()
        for i in range(len(rows)):
            tokens, offset = tokenized(rows, i, where(i))
            if not tokens:
                raise InputError(f"{where(i)}: the tokenizer makes nothing of it: {REMEDY}")
            learned.update(json.dumps([tokens, offset]).encode())
            content.update(json.dumps(rows[i], sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
        self.checksum, self.token_checksum = content.hexdigest(), learned.hexdigest()
        parts = rows._data if isinstance(rows, ConcatenatedDataset) else [rows]
        self.unshared = sum(part.unshared for part in parts if isinstance(part, ChatRows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def process(self, row: dict[str, Any]) -> tuple[list[int], int]:
        """As mlx-lm's data sets do: the tokens, and the number of those that are not learned."""
        return self.rows.process(row)
