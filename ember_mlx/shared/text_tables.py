"""Tables for a terminal or a file: they fold at the terminal's width, between words. No colours, no markup."""

import shutil
import sys
from collections.abc import Iterable, Sequence
from io import StringIO

__all__ = ["is_narrow", "text_table"]

NO_LIMIT = 1000  # columns, for output that is redirected: a file does not fold
WIDE = 120  # columns
GAPS = (3, 2, 1)  # columns between two columns of a table: the first by which words stay whole


def text_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = (), total: bool = False
) -> str:
    """A header, a line under it and the rows, as text.

    Args:
        header, rows: Cells, as they are to be read: nothing in them is taken for markup.
        right: The columns of numbers, which are aligned to the right and never folded; their headers, to two lines.
        total: Whether the last row is a total, which is set off by a line.
    """
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows, right = [tuple(row) for row in rows], set(right)
    widths, gap = _fitted(list(zip(header, *rows, strict=True)), right, _width_of_output())
    lines = Box("    \n    \n -- \n    \n -- \n    \n    \n    \n", ascii=True)
    # The box's own line is one column of the gap.
    table = Table(box=lines, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0), collapse_padding=True)
    for column, title in enumerate(header):
        justify = "right" if column in right else "left"
        table.add_column(Text(title), justify=justify, width=widths[column], overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(*map(Text, row), end_section=total and number == len(rows) - 2)
    out = StringIO()
    # In a notebook rich would show the table there, and write nothing.
    Console(file=out, width=_width_of_output(), color_system=None, highlight=False, force_jupyter=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def is_narrow() -> bool:
    """Whether a table of words in many columns would fold into many lines: on a terminal of fewer than 120."""
    return _width_of_output() < WIDE


def _width_of_output():
    return max(shutil.get_terminal_size().columns, 40) if sys.stdout.isatty() else NO_LIMIT


def _fitted(columns, right, limit):
    """Widths of columns and the gap between them: rich takes width from the widest, and breaks words for it."""
    whole = [max(_width(line) for cell in column for line in cell.split("\n")) for column in columns]
    words = [max((_width(word) for cell in column for word in cell.split()), default=1) for column in columns]
    for column in right:
        words[column] = max(_in_two_lines(columns[column][0]), *map(_width, columns[column][1:]))
    gaps = len(columns) - 1
    if sum(whole) + gaps * GAPS[0] <= limit:
        return whole, GAPS[0]
    gap = next((gap for gap in GAPS if sum(words) + gaps * gap <= limit), GAPS[-1])
    widths = [words[column] if column in right else width for column, width in enumerate(whole)]
    for least in (words, [1] * len(words)):
        while sum(widths) + gaps * gap > limit:
            spare = [column for column, width in enumerate(widths) if column not in right and width > least[column]]
            if not spare:
                break
            widths[max(spare, key=widths.__getitem__)] -= 1
    return widths, gap


def _in_two_lines(title):
    words = title.split()
    return min(max(_width(" ".join(words[:i])), _width(" ".join(words[i:]))) for i in range(len(words) + 1))


def _width(text):
    from rich.cells import cell_len

    return cell_len(text)
