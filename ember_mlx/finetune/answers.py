"""Where the assistant's turns stand in a whole conversation as the chat template writes it.

A template may write a turn otherwise at the end of a conversation than within: many drop earlier think blocks. So no
prompt is compared with the row. The whole is written once more with a stand-in for one answer; what is left and right
of the stand-in is the template's. An answer begins after what the template writes to ask for one, the opening.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import common_prefix_len

from ember_mlx.finetune.mlx_lm_internals import marked_tokens

__all__ = [
    "Answer",
    "Spans",
    "answers_by_marker",
    "answers_in_text",
    "answers_in_tokens",
    "has_answer",
    "has_empty_answer",
    "opening_of",
]

Spans = list[tuple[int, int]]
"""The first and the one after the last of the tokens of each answer."""
Turns = list[dict[str, Any]]
MOST_ADDED = 64  # characters that a template without an opening adds before an answer
STAND_IN = "qzAnswerzq"  # letters alone, which templates leave as they are
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_answer(turns: Turns) -> bool:
    """Whether a turn is the assistant's."""
    return any(_is_answer(turn) for turn in turns)


def has_empty_answer(turns: Turns) -> bool:
    """Whether a turn is the assistant's and says nothing: no text, no reasoning, no call of a tool."""
    return any(_is_answer(turn) and not any(_says(turn[name]) for name in turn.keys() - {"role"}) for turn in turns)


def _says(value):
    return value.strip() if isinstance(value, str) else value


def opening_of(write: Callable[..., str], turns: Turns) -> str:
    """What a template writes to ask for the first answer, as "<|im_start|>assistant" and a new line."""
    first = next(i for i, turn in enumerate(turns) if _is_answer(turn))
    asked = turns[:first] or [{"role": "user", "content": ""}]
    asking, closed = write(asked, add_generation_prompt=True), write(asked)
    return asking[len(closed) :] if asking.startswith(closed) else ""


class Answer(NamedTuple):
    """Where an answer stands in a text, in characters.

    Attributes:
        start: Its first.
        said: The one after its content.
        end: The one after what the template writes to close a turn, without white space.
    """

    start: int
    said: int
    end: int


def answers_in_text(write: Callable[..., str], turns: Turns, opening: str) -> tuple[str, list[Answer], bool]:
    """The text of a conversation, where its answers stand in it, and whether each begins after the whole opening.

    What closes a turn is what follows it both here and where the conversation ends with it.

    Args:
        write: Of turns the text that the template makes.
        turns: The conversation.
        opening: Of :func:`opening_of`.

    Raises:
        ValueError: for an answer that cannot be found.
    """
    text, answers, whole = write(turns), [], True
    stand_in = STAND_IN
    while stand_in in text:
        stand_in += STAND_IN
    for i in (i for i, turn in enumerate(turns) if _is_answer(turn)):
        for other in _others(turns[i], stand_in):
            before, *after = write([*turns[:i], other, *turns[i + 1 :]]).split(stand_in)
            if len(after) == 1 and text.endswith(after[0]):
                at = _header(write, turns[:i], before, answers[-1].end if answers else 0, opening)
                begins = text.startswith(opening, at)
                start = at + len(opening) if begins else len(before)
                if text.startswith(before[:start]):
                    break
        else:
            raise ValueError(
                f"the chat template does not show where the answer in message {i + 1} stands, as --mask-prompt needs it"
            )
        alone = after if i + 1 == len(turns) else write([*turns[:i], other]).split(stand_in)[1:]
        closing = after[0][: common_prefix_len(after[0], alone[0] if alone else "")]
        said = len(text) - len(after[0])
        answers.append(Answer(start, said, max(start, said + len(closing.rstrip() or closing))))
        whole &= begins
    return text, answers, whole


def _header(write, turns, before, earliest, opening):
    """Where the header of an answer begins, of which the opening is all or a part.

    Args:
        write, opening: As above.
        turns: Those before the answer.
        before: What is left of the stand-in. A think block that the template adds may come after the opening.
        earliest: The end of the answer before.
    """
    places = range(max(earliest, len(before) - max(len(opening), MOST_ADDED)), len(before) + 1)
    if not opening:  # the answer begins where the conversation up to it ends
        asked = write(turns)[::-1] if turns else ""
        return max(places, key=lambda place: (common_prefix_len(asked, before[:place][::-1]), place))
    found = [match.start() for match in re.finditer(re.escape(opening), before[earliest:])]
    if found:  # the first that no other turn has said
        answered = [i for i, turn in enumerate(turns) if _is_answer(turn)]
        said = turns[answered[-1] + 1 if answered else 0 :]
        quoted = sum(text.count(opening) for turn in said for text in _texts(turn))
        return earliest + found[min(quoted, len(found) - 1)]
    return next(place for place in places if opening.startswith(before[place:]))  # it begins otherwise in a prompt


def _others(turn, stand_in) -> Iterator[dict[str, Any]]:
    """The turn with another text in the place of its content, or of the name of a function that it calls."""
    content, calls = turn.get("content"), turn.get("tool_calls")
    said = turn | {"content": [{"type": "text", "text": stand_in}] if isinstance(content, list) else stand_in}
    if not calls:
        yield said
        return
    call = calls[0]
    inner = call.get("function")
    named = call | ({"function": inner | {"name": stand_in}} if isinstance(inner, dict) else {"name": stand_in})
    called = turn | {"tool_calls": [named, *calls[1:]]}
    yield from (said, called) if content else (called, said)


def _is_answer(turn):
    return turn.get("role") == "assistant"


def _texts(turn) -> list[str]:
    content = turn.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return [text for text in texts if isinstance(text, str)]


def answers_in_tokens(tokenizer: TokenizerWrapper, text: str, tokens: list[int], answers: list[Answer]) -> Spans:
    """The tokens of ``text`` that have a character of an answer, or are a part of what closes it.

    Args:
        tokenizer: The one that made the tokens.
        text, tokens: A whole conversation.
        answers: Of the text, one after the other.
    """
    own = tokenizer._tokenizer
    if own.is_fast:
        encoded = own(text, add_special_tokens=False, return_offsets_mapping=True)
        if encoded["input_ids"] == tokens:
            starts, ends = np.array(encoded["offset_mapping"], int).reshape(-1, 2).T
            within = [
                np.flatnonzero((ends > answer.start) & ((starts < answer.said) | (ends <= answer.end)))
                for answer in answers
            ]
            return [(int(found[0]), int(found[-1]) + 1) for found in within if len(found)]

    def before(place):
        return common_prefix_len(tokens, own.encode(text[:place], add_special_tokens=False))

    found = [(before(answer.start), before(answer.end)) for answer in answers]
    return [(start, end) for start, end in found if start < end]


def answers_by_marker(tokenizer: TokenizerWrapper, turns: Turns, tools: Any, tokens: list[int]) -> Spans | None:
    """The spans that the template itself marks by ``{% generation %}``; None for a template that does not.

    Raises:
        ValueError: where the marked tokens are not those of the row.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not (isinstance(template, str) and MARKER.search(template) and tokenizer._tokenizer.is_fast):
        return None
    made, marked = marked_tokens(tokenizer, turns, tools)
    if made != tokens:
        raise ValueError("the chat template marks the answers of other tokens than it makes of the row")
    edges = np.flatnonzero(np.diff([0, *marked, 0])).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
