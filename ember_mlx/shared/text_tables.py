"""Tables for a terminal or a file: rich lays them out and folds them at the terminal's width. No colours, no markup."""

import shutil
import sys
from collections.abc import Iterable, Sequence
from io import StringIO

__all__ = ["text_table"]

NO_LIMIT = 1000  # columns, for output that is redirected: a file does not fold


def text_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = (), total: bool = False
) -> str:
    """A header, a line under it and the rows, as text.

    Args:
        header, rows: Cells, as they are to be read: nothing in them is taken for markup.
        right: The columns of numbers, which are aligned to the right and never folded.
        total: Whether the last row is a total, which is set off by a line.
    """
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows, right = list(rows), set(right)
    lines = Box("    \n    \n -- \n    \n -- \n    \n    \n    \n", ascii=True)
    table = Table(box=lines, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True)
    for column, title in enumerate(header):
        is_number = column in right
        table.add_column(
            Text(title), justify="right" if is_number else "left", no_wrap=is_number, overflow="fold", vertical="bottom"
        )
    for number, row in enumerate(rows):
        table.add_row(*map(Text, row), end_section=total and number == len(rows) - 2)
    out = StringIO()
    # In a notebook rich would show the table there, and write nothing.
    Console(file=out, width=_width(), color_system=None, highlight=False, force_jupyter=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _width():
    return max(shutil.get_terminal_size().columns, 40) if sys.stdout.isatty() else NO_LIMIT
