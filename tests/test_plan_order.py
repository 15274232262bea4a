"""The order in which the planner evaluates, and what memory it holds then, by MLX's rules."""

import itertools
from dataclasses import replace

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
