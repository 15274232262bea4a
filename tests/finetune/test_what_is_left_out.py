"""What takes no part in a run is said: validation rows with nothing to learn, and batches that make no update."""

import re
from types import SimpleNamespace

import mlx.core as mx
import pytest

from ember_mlx.finetune.evaluation import evaluate
from ember_mlx.finetune.loop import Training

GOOD, MASKED, CUT = ([1, 2, 3], 0), ([1] * 12, 12), ([1] * 12, 9)  # prompts that end beyond what is kept
OPTIONS = SimpleNamespace(
    stream=False, batch_size=1, max_seq_length=8, clear_cache_threshold=0, mask_prompt=False, packing=False
)


class Untrained:
    """A model of which ``trainer.evaluate`` asks but that it stops training."""

    def eval(self):
        return self


def loss(_, tokens, lengths):
    """2 nats a token; as mlx-lm's, 0 / 0 where nothing is learned."""
    last = mx.minimum(lengths[:, 1], tokens.shape[1] - 1)
    count = mx.maximum(last - mx.maximum(lengths[:, 0], 1) + 1, 0).sum()
    return mx.where(count > 0, 2.0, mx.nan), count


@pytest.mark.parametrize(
    ("rows", "named"), [([GOOD, GOOD], ""), ([MASKED, GOOD], "1"), ([GOOD, CUT, MASKED], "2, 3")], ids=str
)
def test_validation_names_rows_with_nothing_to_learn_once_and_leaves_them_out(rows, named, capsys):
    class Rows(list):
        def itemlen(self, index):
            return len(self[index][0])

    rows = Rows(rows)
    for _ in range(2):
        assert evaluate(OPTIONS, Untrained(), loss, rows, -1) == 2.0
    said = " ".join(re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).split())
    count = f"{named.count(',') + 1} of {len(rows)}"
    warning = f"{count} rows have nothing to learn; the mean loss leaves them out: {named}"
    assert said.count("nothing to learn") == bool(named)
    assert said == (f"Warning: {warning}" if named else "")


@pytest.mark.parametrize(("iters", "accumulation", "dropped"), [(10, 1, 0), (10, 5, 0), (9, 4, 1), (7, 4, 3)])
def test_batches_that_make_no_update_are_counted(iters, accumulation, dropped, capsys):
    args = SimpleNamespace(iters=iters, grad_accumulation_steps=accumulation)
    loop = SimpleNamespace(args=args, steps_done=iters)
    Training._report_dropped(loop)
    said = " ".join(capsys.readouterr().out.split())
    expected = (
        f"Of --iters {iters} steps the last {'is' if dropped == 1 else f'{dropped} are'} not applied: an update takes "
        f"--grad-accumulation-steps {accumulation}"
    )
    assert said == (expected if dropped else "")
