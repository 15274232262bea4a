"""Ctrl-C, SIGTERM, SIGHUP and the loss of its reader as a wish to stop, which the run grants between two steps."""

import os
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

from ember_mlx.finetune.broken_pipes import outliving_its_readers

__all__ = ["SIGNALS", "Interrupted", "StopSignals"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """The run was stopped by SIGINT, SIGTERM, SIGHUP or SIGPIPE, after it was saved; the message says where.

    Args:
        number (int): The signal. ``exit_code`` is what a shell makes of it: 130, 143, 129 or 141.
        message (str): What to tell.
        checkpoint (Path, optional): Where the run can go on, if it can.
        resume_words (list): The options that go on from there, beside those of the run.
    """

    def __init__(self, number: int, message: str, checkpoint: Path | None, resume_words: list[str]):
        super().__init__(message)
        self.exit_code = 128 + number
        self.checkpoint = checkpoint
        self.resume_words = resume_words


class StopSignals:
    """Within ``with``, the first SIGINT, SIGTERM or SIGHUP only sets ``number``; the second ends the process at once.

    But for SIGHUP: when a terminal is closed, both it and its shell send that. A pipe that nobody reads any more sets
    ``number`` to SIGPIPE, which Python itself ignores; nothing that is told raises. In any thread but the main one this
    does nothing, as Python hears of signals there alone, and a signal that was ignored (nohup) stays so. The handlers
    of before are put back at the end; ``number`` then still tells what was announced, 0 for nothing.

    Args:
        saves (bool): Whether the run then writes a checkpoint.
    """

    def __init__(self, saves: bool = True):
        self.number = 0
        self._saves = saves
        self._before = {}
        self._thread = None
        self._output = ExitStack()

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self
        self._output.enter_context(outliving_its_readers(lambda: self._wish(signal.SIGPIPE)))
        # Python runs a handler when the main thread is back from MLX, which can take a whole step. The byte that the
        # signal leaves in a pipe is read at once, by a thread.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._wish) or signal.SIG_DFL
        return self

    def __exit__(self, *error):
        if self._thread is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)
        self._output.close()

    def _wish(self, number, frame=None):
        self.number = self.number or number

    def _watch(self):
        heard = False
        while (number := os.read(self._read, 1)[0]) != 0:
            if number not in SIGNALS or (heard and number == signal.SIGHUP):
                continue
            name = signal.Signals(number).name
            if heard:
                # No print: the main thread may hold the lock of stderr.
                os.write(2, f"{name}: left at once; what was saved before is kept\n".encode())
                if os.isatty(1):
                    os.write(1, b"\x1b[?25h\n")  # the cursor, which the progress bar hides
                os._exit(128 + number)
            heard = True
            self._wish(number)
            then = "then saving" if self._saves else "saving no checkpoint (--keep-checkpoints 0)"
            print(f"{name}: finishing this step, {then}; once more leaves at once", file=sys.stderr, flush=True)
