"""Two ranks: they agree, refuse together, wait for nobody for ever, and take one streamed step together.

Where each can have a GPU they meet by NCCL, otherwise on the CPU by gloo.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
LIMIT = 120  # seconds; 6 where nobody else uses the machine
WAITED, LOST = "worker 0: waited 2 s for another worker", "worker 0: another worker is lost ("
BACKEND = "nccl" if torch.cuda.device_count() > 1 else "gloo"


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Case -> exit codes, the errors that the ranks printed, and what they returned."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join(str(each) for each in (HERE.parents[1], HERE.parent))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, HERE / "rank_cases.py", folder, BACKEND], env=environment, check=True, timeout=LIMIT
    )
    codes = json.loads((folder / "found.json").read_text())

    def of(case):
        texts = [(folder / f"{case}{rank}.txt").read_text().splitlines() for rank in range(2)]
        returned = [folder / f"{case}{rank}.json" for rank in range(2)]
        assert not [line for text in texts for line in text if "Traceback" in line], texts
        lines = [[line for line in text if "error:" in line.lower()] for text in texts]
        return codes[case], lines, [json.loads(path.read_text()) if path.exists() else None for path in returned]

    return of


def test_ranks_that_agree_meet(cases):
    """A NaN is equal to a NaN; a meeting brings the largest number."""
    assert cases("alike") == ([0, 0], [[], []], [[1, 0], [1, 0]])


@pytest.mark.parametrize(
    ("case", "named"), [("other_data", "the data"), ("refused_by_one", "rank 1 stopped: no such folder")]
)
def test_a_refusal_is_one_line_and_exit_code_2_on_all(cases, case, named):
    codes, (told, others), _ = cases(case)
    assert codes == [2, 2]
    assert len(told) == 1
    assert told[0].startswith("train.py: error: ")
    assert named in told[0]
    assert not others


@pytest.mark.parametrize(
    ("case", "other", "lines"),
    [
        ("killed", -signal.SIGKILL, [{"gloo": LOST, "nccl": WAITED}[BACKEND]]),
        ("stands_still", 75, [WAITED, LOST]),  # its own alarm ends it, at times before the other's
        ("never_comes", 0, ["worker 0: the others did not come (Timed out"]),
    ],
)
def test_a_lost_rank_ends_the_other_in_one_line(cases, case, other, lines):
    codes, (told, _), _ = cases(case)
    assert codes == [75, other]
    assert [each.startswith(tuple(f"train.py: error: {line}" for line in lines)) for each in told] == [True], told


@pytest.mark.parametrize("case", ["untied", "tied", "accumulated", "whole_logits"])
def test_two_ranks_take_the_streamed_steps_of_one_with_the_whole_batch(cases, case):
    """And end with the same bits. Sums in another order are a few eps of weights below 1, after three steps."""
    codes, lines, (found, _) = cases(case)
    assert codes == [0, 0], lines
    assert found["losses"] == pytest.approx(found["one rank's"], rel=1e-6)
    assert found["worst"] < 1e-6
    assert not found["refused"]


def test_what_is_not_finite_on_one_rank_is_refused_on_all(cases):
    codes, lines, returned = cases("not_finite")
    assert codes == [0, 0], lines
    assert returned == [["model.layers.1.mlp.up_proj.weight"]] * 2


def test_labels_out_of_range_on_one_rank_end_all(cases):
    codes, (first, second), _ = cases("bad_labels")
    assert codes == [2, 2]
    assert "1 of the other ranks refused their batch" in first[0]
    assert "must be token ids from 0 to 189" in second[0]
