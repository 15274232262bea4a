"""The time that is left, by a clock that the test turns; and how the display shows it."""

import math

import pytest
from mlx_lm.cli_ui import make_console

from ember_mlx.finetune.display import Display, colours_on_a_terminal_alone
from ember_mlx.finetune.history import perplexity
from ember_mlx.finetune.time_left import TimeLeft, in_words


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def foretold(args, last, of_step, of_validation, first_step=0.0):
    """What is foretold after each step, and when it was; the loop's order of events."""
    clock = Clock()
    left = TimeLeft(args, clock)
    left.before_training(None, None, (), ())
    told = {}
    for step in range(1, last + 1):
        if step in (1, args.iters) or step % args.steps_per_eval == 0:
            clock.now += of_validation
            left.after_validation(step, 0.0)
        clock.now += of_step(step) + (first_step if step == 1 else 0)
        left.after_step(step, None)
        told[step] = (clock.now, left.seconds(step))
    return told, clock.now + of_validation  # of the validation after the last step


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("iters", "every"), [(40, 10), (41, 10), (40, 100)])
def test_steady_steps_are_foretold_to_the_second(parse, accumulation, iters, every):
    """The update costs more than the batches before it, a streamed one everything, and the first step is compiled."""
    args = parse("--iters", iters, "--steps-per-eval", every, "--grad-accumulation-steps", accumulation)
    iters -= iters % accumulation
    args |= {"iters": iters}
    of_step = lambda step: 3.0 if step % accumulation == 0 else 0.0  # noqa: E731
    told, end = foretold(args, iters, of_step, 7.0, first_step=50.0)
    assert told[accumulation][1] is None  # the first update compiles, and is not counted
    for step in range(2 * accumulation, iters, accumulation):
        when, seconds = told[step]
        assert when + seconds == pytest.approx(end)


def test_slow_steps_now_and_then_do_not_count(parse):
    args = parse("--iters", 100, "--steps-per-eval", 1000)
    told, _ = foretold(args, 60, lambda step: 90.0 if step % 10 == 0 else 1.0, 0.0)
    assert told[60][1] == pytest.approx(40)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        *((0, "0 s"), (0.2, "1 s"), (59, "59 s"), (59.5, "1 min"), (60, "1 min"), (61, "2 min"), (720, "12 min")),
        *((3600, "1 h"), (3540.5, "1 h"), (7500, "2 h 5 min"), (86400, "1 day"), (2 * 86400 + 3 * 3600, "2 days 3 h")),
    ],
)
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words


def test_perplexity_is_finite_or_infinite_and_never_an_error():
    assert perplexity(0) == 1
    assert perplexity(math.log(20)) == pytest.approx(20)
    assert perplexity(1e4) == perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan))


@pytest.mark.parametrize("on_a_terminal", [False, True])
def test_colours_are_for_a_terminal(capsys, monkeypatch, on_a_terminal):
    monkeypatch.setattr(make_console(), "_force_terminal", on_a_terminal)
    with colours_on_a_terminal_alone():
        Display(20, 0, {}.get).report_val(1, 2.0, 0.5)
    assert ("\x1b" in capsys.readouterr().out) == on_a_terminal


def test_the_display_ends_its_lines_with_time_and_perplexity(capsys):
    display = Display(20, 0, {10: 720.0, 20: 0.0}.get)
    display.report_val(1, math.log(20), 0.5)
    display.report_train(5, 2.0, 100, 1000)  # not known yet
    display.report_train(10, 2.0, 100, 1000)
    display.report_train(20, 2.0, 100, 1000)
    plain = [" ".join(line.split()) for line in _without_colours(capsys.readouterr().out).splitlines()]
    assert plain == [
        "1 val 2.996 0.50s perplexity 20",
        "5 2.000 ▼ 100 1.0k",
        "10 2.000 ▼ 100 1.0k 12 min left",
        "20 2.000 ▼ 100 1.0k",
    ]


def _without_colours(text):
    import re

    return re.sub(r"\x1b\[[0-9;]*m", "", text)
