"""Long sequences: only every k-th layer's input is kept, and those between are made again, one segment at a time.

It saves a share of 1 - 1/k of the kept inputs for one forward pass more.
"""

from collections.abc import Callable, Container

import mlx.core as mx
import mlx.nn as nn

from ember_mlx.streaming.call_tree import build, flatten, signature
from ember_mlx.streaming.units import Recording, put_back_random_state

__all__ = ["drop_direct", "restore_inputs"]


def drop_direct(
    recording: Recording, i: int, direct: dict[int, tuple[int, int]], needed: Container[tuple[int, int]]
) -> None:
    """Let go of what call ``i`` took from the call before it. In its place stands an array that is never made.

    ``direct`` are its inputs that are outputs of earlier calls, by (call, output); what is ``needed`` of these stays.
    """
    call, before = recording.calls[i], recording.calls[i - 1]
    if signature(call.spec) is None or signature(before.spec) is None:
        return
    for j, source in direct.items():
        if source[0] == i - 1 and source not in needed:
            stand_in = mx.zeros(call.inputs[j].shape, call.inputs[j].dtype)
            call.inputs[j] = before.outputs[source[1]] = stand_in
            call.dropped[j] = source[1]


def restore_inputs(recording: Recording, i: int, units: dict[str, nn.Module], evaluate: Callable) -> None:
    """Make the inputs of call ``i`` again, and those of the calls before it back to one that has its own."""
    first = i
    while recording.calls[first].dropped:
        first -= 1
    for number in range(first, i):
        call, following = recording.calls[number], recording.calls[number + 1]
        put_back_random_state(call.key)
        arguments, keywords = build(call.spec, iter(call.inputs))
        _, outputs, _ = flatten(units[call.path](*arguments, **keywords))
        for j, output in following.dropped.items():
            following.inputs[j] = call.outputs[output] = mx.stop_gradient(outputs[output])
        evaluate(*(following.inputs[j] for j in following.dropped))
        following.dropped = {}
