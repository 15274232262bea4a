"""What will be trained: a data set counted, and single rows with what is learned in them marked."""

from dataclasses import dataclass
from statistics import median

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ember_mlx.finetune.rows import TriedRows, spans_of

__all__ = ["LEARNED", "Counts", "count", "rendered"]

LEARNED = ("⟦", "⟧")
MOST_SHOWN = 1500  # characters of a row's text


@dataclass(frozen=True)
class Counts:
    """Of one set; lengths in tokens, before rows are cut.

    Attributes:
        rows, tokens: How many it has.
        learned: The tokens that have a loss.
        shortest, middle, longest: The lengths of rows: least, median, greatest.
        truncated: Rows that ``--max-seq-length`` cuts.
        masked: Rows of which ``--mask-prompt`` masks a part.
        empty: Rows in which nothing is learned.
    """

    rows: int
    tokens: int
    learned: int
    shortest: int
    middle: float
    longest: int
    truncated: int
    masked: int
    empty: int


def count(rows: TriedRows, max_seq_length: int) -> Counts:
    """Count a set of at least one row. The token of padding that mlx-lm's loss learns after a row is left out."""
    lengths, learned, masked = [], [], 0
    for i in range(len(rows)):
        tokens, spans = rows.process(rows[i])
        lengths.append(len(tokens))
        learned.append(_size(spans_of(tokens, spans, max_seq_length)))
        masked += _size(spans_of(tokens, spans, len(tokens))) < len(tokens) - 1
    return Counts(
        rows=len(rows),
        tokens=sum(lengths),
        learned=sum(learned),
        shortest=min(lengths),
        middle=median(lengths),
        longest=max(lengths),
        truncated=sum(length > max_seq_length for length in lengths),
        masked=masked,
        empty=learned.count(0),
    )


def rendered(rows: TriedRows, index: int, tokenizer: TokenizerWrapper, max_seq_length: int) -> str:
    """The text of a row as it is trained on, with :data:`LEARNED` around what is learned."""
    tokens, learned = rows.process(rows[index])
    text, at, end = "", 0, min(len(tokens), max_seq_length)
    spans = spans_of(tokens, learned, max_seq_length)
    for start, stop in spans:
        before, part = (_shown(tokenizer.decode(part)) for part in (tokens[at:start], tokens[start:stop]))
        text, at = f"{text}{before}{LEARNED[0]}{part}{LEARNED[1]}", stop
    text += _shown(tokenizer.decode(tokens[at:end])) if at < end else ""
    text += "" if spans else " (nothing is learned)"
    return text + (f" (cut: {len(tokens) - end} tokens)" if end < len(tokens) else "")


def _size(spans):
    return sum(end - start for start, end in spans)


def _shown(text):
    if len(text) > MOST_SHOWN:
        half = MOST_SHOWN // 2
        text = f"{text[:half]} ... ({len(text) - 2 * half} characters) ... {text[-half:]}"
    # What would move a terminal's cursor is written out.
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
