"""Where streaming pays: what it saves, and what it costs in time."""

from dataclasses import dataclass

from ember_mlx.finetune.choices import streams_by_default
from ember_mlx.planner.architecture import Architecture
from ember_mlx.planner.graph import Run
from ember_mlx.planner.plan import Plan, plan
from ember_mlx.planner.streaming import streamed_runs

__all__ = ["Recommendation", "recommendations"]

WORTH = 0.1  # of what a run takes above weights and state
ROOM = 0.1  # of the memory: with less to spare a run fits tightly, since plans are within about 10 %


@dataclass(frozen=True)
class Recommendation:
    """Flags that save memory and change no result.

    Args:
        flags (str): What to add.
        peak, saves (int): Bytes with them, and how many fewer that are.
        time (float): What a step takes then, as a multiple of now; by its operations alone.
    """

    flags: str
    peak: int
    saves: int
    time: float


def recommendations(model: Architecture, run: Run, backend: str, planned: Plan, memory: int) -> list[Recommendation]:
    """``--stream`` and ``--keep-inputs``, one on top of the other, where that pays.

    It saves a tenth of all above the weights, and the run does not fit without it, or fits tightly. A run that would
    stream by default, were it not told otherwise, is told so in any memory.

    Args:
        model, run, backend: What is planned.
        planned: The plan of the run as it is.
        memory: Bytes that it may take.
    """
    found, now, before = [], planned, run
    fixed = planned.weights + planned.optimizer_state
    usual = streams_by_default(run.fine_tune_type, bool(run.tables), run.workers, run.norm_pass)
    for flags, other in streamed_runs(model, run):
        after = plan(model, other, backend)
        fits_well = now.peak <= (1 - ROOM) * memory and not (usual and other.stream != before.stream)
        saves = now.peak - after.peak
        if fits_well or saves < WORTH * (now.peak - fixed):
            break
        found.append(Recommendation(flags, after.peak, saves, after.operations / now.operations))
        now, before = after, other
    return found
