"""What a step computes, for its time."""

from ember_mlx.planner.architecture import Architecture
from ember_mlx.planner.graph import Run
from ember_mlx.shared.sizes_in_memory import blocks_of_a_head

__all__ = ["operations", "sizes_of_a_layer"]


def sizes_of_a_layer(model: Architecture, run: Run) -> dict[str, int]:
    """What :func:`~ember_mlx.shared.sizes_in_memory.blocks_of_a_head` asks of the layers, by name."""
    outputs = sum(linear.outputs for linear in model.linears(0)) if _gone_back_through(model, run) else 0
    return {"tokens_of_a_layer": run.batch_size * run.length, "outputs_of_a_layer": outputs}


def operations(model: Architecture, run: Run, backend: str = "cpu") -> float:
    """Multiplications of a step's products of matrices, for one token; a streamed head's logits are kept on a CPU."""
    layer = sum(linear.inputs * linear.outputs for linear in (model.linears(0) if model.layers else ()))
    weights = model.width * (layer * model.layers + sum(table.rows * table.columns for table in model.tables()))
    layer += run.length * model.heads * model.head_dim  # queries by keys and scores by values, half of them masked
    head, full = model.vocabulary * model.hidden, run.fine_tune_type == "full"
    tokens = run.micro_batches * run.batch_size * run.length
    below = _gone_back_through(model, run)
    trained = run.layers if full else 0
    head_trains = "head" in run.tables or "tied" in run.tables
    backward = below + trained + (below if run.stream or run.grad_checkpoint else 0)
    if not run.stream:
        return layer * (model.layers + backward) + head * (2 + head_trains + run.chunked_loss)
    backward += below * (1 - 1 / run.keep_inputs)
    passes = 2  # logits, and the gradient by the hidden states
    if head_trains:
        on_a_gpu = backend != "cpu"
        shape = model.vocabulary, model.hidden, model.width, tokens, weights, on_a_gpu
        once = run.workers == 1 and blocks_of_a_head(*shape, **sizes_of_a_layer(model, run)).keeps_gradient
        passes += 1 if once else min(2 * tokens / model.hidden, 1) + 1  # statistics, and the rows' gradient
        passes += on_a_gpu * (1 if once else 2)  # the logits again, for each of these
    return layer * (model.layers + backward * (1 + run.norm_pass)) + head * passes


def _gone_back_through(model, run):
    return model.layers if "embedding" in run.tables or "tied" in run.tables else run.layers
