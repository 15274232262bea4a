"""What will be trained: a data set counted, and single rows with what is learned in them marked."""

from dataclasses import dataclass
from statistics import median

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ember_mlx.finetune.rows import TriedRows

__all__ = ["LEARNED", "Counts", "count", "learned_part", "rendered"]

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


def learned_part(length: int, offset: int, max_seq_length: int) -> tuple[int, int]:
    """The first token of a row that is learned, and the one after the last; equal where none is.

    As in ``mlx_lm.tuner.trainer.default_loss``, the first token of a row is never predicted. The token of padding after
    a shorter row, which that loss counts too, is left out here.

    Args:
        length: Tokens of the row.
        offset: Tokens at its start that are not learned.
        max_seq_length: As the option.
    """
    end = min(length, max_seq_length)
    return min(max(offset, 1), end), end


def count(rows: TriedRows, max_seq_length: int) -> Counts:
    """Count a set of at least one row."""
    sizes = [(len(tokens), offset) for tokens, offset in map(rows.process, (rows[i] for i in range(len(rows))))]
    lengths = [length for length, _ in sizes]
    learned = [end - start for start, end in (learned_part(*size, max_seq_length) for size in sizes)]
    return Counts(
        rows=len(sizes),
        tokens=sum(lengths),
        learned=sum(learned),
        shortest=min(lengths),
        middle=median(lengths),
        longest=max(lengths),
        truncated=sum(length > max_seq_length for length in lengths),
        masked=sum(offset > 0 for _, offset in sizes),
        empty=learned.count(0),
    )


def rendered(rows: TriedRows, index: int, tokenizer: TokenizerWrapper, max_seq_length: int) -> str:
    """The text of a row as it is trained on, with :data:`LEARNED` around what is learned."""
    tokens, offset = rows.process(rows[index])
    start, end = learned_part(len(tokens), offset, max_seq_length)
    before, learned = (_shown(tokenizer.decode(part)) for part in (tokens[:start], tokens[start:end]))
    marked = f"{before}{LEARNED[0]}{learned}{LEARNED[1]}" if start < end else f"{before} (nothing is learned)"
    return marked + (f" (cut: {len(tokens) - end} tokens)" if end < len(tokens) else "")


def _shown(text):
    if len(text) > MOST_SHOWN:
        half = MOST_SHOWN // 2
        text = f"{text[:half]} ... ({len(text) - 2 * half} characters) ... {text[-half:]}"
    # What would move a terminal's cursor is written out.
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
