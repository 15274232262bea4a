"""Where streaming pays: what it saves, and what it costs in time."""

from dataclasses import dataclass

from ember_mlx.finetune.choices import streams_by_default
from ember_mlx.planner.architecture import Architecture
from ember_mlx.planner.graph import Run
from ember_mlx.planner.plan import Plan, plan
from ember_mlx.planner.streaming import streamed_runs

__all__ = ["Recommendation", "operations", "recommendations"]

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
    found, now, before = [], planned.peak, run
    fixed = planned.weights + planned.optimizer_state
    usual = streams_by_default(run.fine_tune_type, bool(run.tables), run.workers, run.norm_pass)
    for flags, other in streamed_runs(model, run):
        after = plan(model, other, backend).peak
        fits_well = now <= (1 - ROOM) * memory and not (usual and other.stream != before.stream)
        if fits_well or now - after < WORTH * (now - fixed):
            break
        time = operations(model, other, backend) / operations(model, before, backend)
        found.append(Recommendation(flags, after, now - after, time))
        now, before = after, other
    return found


def operations(model: Architecture, run: Run, backend: str = "cpu") -> float:
    """Multiplications of a step's products of matrices, for one token; a streamed head's logits are kept on a CPU."""
    layer = sum(linear.inputs * linear.outputs for linear in (model.linears(0) if model.layers else ()))
    layer += run.length * model.heads * model.head_dim  # queries by keys and scores by values, half of them masked
    head, full = model.vocabulary * model.hidden, run.fine_tune_type == "full"
    tokens = run.micro_batches * run.batch_size * run.length
    below = model.layers if "embedding" in run.tables or "tied" in run.tables else run.layers
    trained = run.layers if full else 0
    head_trains = "head" in run.tables or "tied" in run.tables
    backward = below + trained + (below if run.stream or run.grad_checkpoint else 0)
    if not run.stream:
        return layer * (model.layers + backward) + head * (2 + head_trains + run.chunked_loss)
    backward += below * (1 - 1 / run.keep_inputs)
    passes = 2  # logits, and the gradient by the hidden states
    if head_trains:
        passes += min(2 * tokens / model.hidden, 1) + 1  # statistics, and the rows' gradient
        passes += 0 if backend == "cpu" else 2  # the logits again, for each of these
    return layer * (model.layers + backward * (1 + run.norm_pass)) + head * passes
