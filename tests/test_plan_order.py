"""The order in which the planner evaluates, and what memory it holds then, by MLX's rules."""

import itertools
from dataclasses import replace

import pytest
from planned_models import LLAMA_1B, QWEN

from ember_mlx.finetune import options
from ember_mlx.planner import plan, read_architecture, run_of
from ember_mlx.planner.evaluation import DEVICES, Array, Operation, evaluation_order, peak_memory


def copy_of(array, in_place=False):
    operation = Operation([array], in_place)
    operation.outputs = [Array(array.numbers, array.width, "scratch", operation)]
    return operation.outputs[0]


def chain_of_copies(first, count):
    chain = [first]
    for _ in range(count):
        chain.append(copy_of(chain[-1]))
    return chain


def test_the_order_is_from_the_results_back_and_at_most_twenty_wide():
    """A long chain, and 30 arrays that depend on its middle: the last of those are computed when the width allows."""
    chain = chain_of_copies(Array(1, 4, "chain"), 5)
    leaves = [copy_of(chain[2]) for _ in range(30)]
    order = evaluation_order([*leaves, chain[-1]])
    assert len(order) == 35
    place = {operation: i for i, operation in enumerate(order)}
    assert all(place[a.made_by] < place[b.made_by] for a, b in itertools.pairwise(chain[1:]))
    assert all(place[chain[2].made_by] < place[leaf.made_by] for leaf in leaves)
    assert place[leaves[0].made_by] == 34  # the nearest to the results is the last


def test_memory_is_handed_on_and_kept_while_it_is_read():
    first = Array(100, 4, "weights")
    second = copy_of(first, in_place=True)
    assert peak_memory([second], [first], DEVICES["cpu"]).total == 400
    assert peak_memory([second, first], [first], DEVICES["cpu"]).total == 800  # still asked for: no donor


def test_a_batch_keeps_what_it_read_until_the_device_is_done_with_it():
    """A chain of copies: where each operation is a batch and the program may be one ahead, three stand at a time."""
    chain = chain_of_copies(Array(100, 4, "weights"), 10)
    device = replace(DEVICES["cpu"], ahead=1, bytes_a_second=1.0)
    peaks = [peak_memory(chain[-1:], chain[:1], replace(device, ahead=ahead)).total for ahead in (1, 3)]
    assert peaks[1] - peaks[0] == 2 * 400


def test_what_is_late_is_free_only_once_it_has_been_waited_for():
    """Two copies of copies, one behind the other: a fast device is done with the first at once."""
    there = [Array(100, 4, "weights") for _ in range(3)]
    results = [copy_of(copy_of(array)) for array in there]
    waits, device = [0, 0, 1], replace(DEVICES["cuda"], bytes_a_second=float("inf"))
    peaks = [peak_memory(results, there, device, [[r] for r in results], waits, late).total for late in ((), range(3))]
    # There are three arrays, and of each pair under way a copy and a copy of that: of one pair, and of two.
    assert peaks == [1200 + 2 * 400, 1200 + 4 * 400]


TOLD = ["--fine-tune-type", "full", "--no-stream", "--batch-size", "1", "--optimizer"]
INT8 = {"optimizer_config": {"adam-mini": {"momentum": "int8"}}}


def planned(config, tokens, *words):
    model = read_architecture(config, "config.json")
    args = options.parse([*TOLD, *words, "--max-seq-length", str(tokens + 1)])
    return plan(model, run_of(args | INT8, model), "cuda")


@pytest.mark.parametrize(
    ("words", "measured"),  # on an H200, in examples/benchmarks/results/recipes_h200.json
    [
        (["adamw", "--table-optimizer", "adamw"], 10_859_668_520),
        (["adam-mini"], 8_366_897_000),
        (["flash-adamw"], 9_865_115_800),
    ],
)
def test_the_update_of_a_gpu_is_planned_as_it_was_measured(words, measured):
    assert planned(LLAMA_1B, 512, *words).peak == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(
    ("words", "of_a_weight"),  # bytes of it that two layers have beside weights, state and all gradients
    [
        (["adamw"], 3 * 2 + 2),  # new: weight and moments; the gradient in rows
        (["adam-mini"], 2 + 1.125 + 4 * 4),  # new: weight and momentum; in float32 old, new, and the gradient twice
        (["flash-adamw"], 2 + 2.25 + 4 * 4),
        (["flash-adamw", "--body-rounding", "nearest"], 2 + 2.25 + 2),
        (["sinkgd"], 2),  # its kernel reads gradients as they lie
    ],
)
def test_two_layers_are_in_the_update_of_a_gpu_at_once(words, of_a_weight):
    wide = QWEN | {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6}
    found = planned(wide, 32, *words)
    of_a_layer = (found.trainable / 2 - 2 * QWEN["vocab_size"] * 1024) / 6
    above = found.peak - found.weights - found.optimizer_state - found.gradients
    assert above / (2 * of_a_layer) == pytest.approx(of_a_weight, rel=0.01)
