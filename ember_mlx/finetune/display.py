"""mlx-lm's display of a run, with the time that is left and the perplexity of each validation at the ends of lines."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlx_lm.cli_ui import TrainUI, make_console
from rich.console import Console

from ember_mlx.finetune.history import perplexity
from ember_mlx.finetune.time_left import in_words
from ember_mlx.shared.replacing import replaced

__all__ = ["Display", "colours_on_a_terminal_alone"]


@contextmanager
def colours_on_a_terminal_alone() -> Iterator[None]:
    """mlx-lm's console writes colours into files and pipes too; within this, to a terminal alone."""
    console = make_console()
    with replaced(console, "_color_system", console._color_system if console.is_terminal else None):
        yield


class Display(TrainUI):
    """What mlx-lm shows of a run, and more.

    Args:
        iters (int): Steps of the run.
        rank (int): Of this worker; the first alone shows anything.
        seconds_left (callable): Of the steps that are done, or None where that cannot be told.
    """

    def __init__(self, iters: int, rank: int, seconds_left: Callable[[int], float | None]):
        super().__init__(iters, rank=rank)
        self.iters = iters
        self.seconds_left = seconds_left
        self._console = _LongerLines(self._console)  # TrainUI prints each of its lines by it

    def report_train(self, it: int, train_loss: float, tokens_sec: float, trained_tokens: float) -> None:
        """The training loss since the report before, and the time that is left after step ``it``."""
        seconds = self.seconds_left(it) if it < self.iters else None
        self._console.more = "" if seconds is None else f"{in_words(seconds)} left"
        super().report_train(it, train_loss, tokens_sec, trained_tokens)

    def report_val(self, it: int, val_loss: float, val_time: float) -> None:
        """The validation loss after step ``it``."""
        self._console.more = f"perplexity {perplexity(val_loss):,.4g}"
        super().report_val(it, val_loss, val_time)


class _LongerLines:
    """A console that ends its next line with ``more``."""

    def __init__(self, console: Console):
        self.console = console
        self.more = ""

    def print(self, line: str) -> None:
        self.console.print(f"{line}    [ui.muted]{self.more}[/ui.muted]" if self.more else line)
        self.more = ""
