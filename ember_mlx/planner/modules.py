"""The modules of a decoder, forward and backward.

What is written here is what the backward of each operation keeps: a product of matrices keeps what it multiplies if
the other factor needs a gradient, and LoRA multiplies in float32, as its matrices are. Each method returns its result,
and a function from the gradient of that to the gradient of its input.
"""

from collections.abc import Callable
from typing import Any

from ember_mlx.planner.architecture import Linear
from ember_mlx.planner.evaluation import Array
from ember_mlx.planner.graph import FLOAT32, Graph

__all__ = ["Backward", "attention", "heads", "joined", "linear", "norm"]

Backward = Callable[..., Any]
"""From the gradient of a result, and whether the gradient of the input is asked for, to the gradients of the inputs."""


def norm(graph: Graph, x: Array, name: str, size: int, trained: bool) -> tuple[Array, Backward]:
    """RMSNorm: one kernel on GPUs; on the CPU plain operations, which keep the input in float32."""
    w = graph.weight(name, (size,), trained)
    if graph.backend == "cpu":
        x32 = graph.float32(x)
        square = graph.elementwise([x32])
        scale = graph.make([square], x.numbers // size, FLOAT32)
        normal = graph.elementwise([x32, scale], width=graph.width)
        y = graph.elementwise([normal, w])
    else:
        y = graph.make([x, w], x.numbers, in_place=True)

    def backward(d_y):
        if graph.backend == "cpu":
            if trained:
                product = graph.elementwise([d_y, normal])
                graph.add_gradient(name, graph.make([product], size))
            d32 = graph.elementwise([d_y, w], width=FLOAT32)
            of_scale = graph.make([graph.elementwise([d32, x32])], scale.numbers, FLOAT32)
            return graph.elementwise([d32, scale, of_scale, x32], width=graph.width)
        d_x, d_w = graph.several([x, w, d_y], [(x.numbers, graph.width), (size, graph.width)])
        if trained:
            graph.add_gradient(name, d_w)
        return d_x

    return y, backward


def linear(graph: Graph, x: Array, linear: Linear, trained: str | None) -> tuple[Array, Backward]:
    """A product with a weight, frozen or trained, and with LoRA beside it if that stands here.

    LoRA: y + (scale * (x @ A) @ B), in float32, as A and B are.
    """
    full, lora = trained == "full", trained in ("lora", "dora")
    w = graph.weight(linear.name, (linear.outputs, linear.inputs), full, nbytes=linear.nbytes)
    inputs = [x, graph.view(w)]
    if linear.bias:
        inputs.append(graph.weight(linear.name + ".bias", (linear.outputs,), full))
    n = graph.tokens
    y = graph.product(inputs, n * linear.outputs, linear.inputs)
    if lora:
        rank = graph.run.rank
        a = graph.weight(linear.name + ".lora_a", (linear.inputs, rank), True, FLOAT32)
        b = graph.weight(linear.name + ".lora_b", (rank, linear.outputs), True, FLOAT32)
        x32 = graph.float32(x)
        low = graph.product([x32, a], n * rank, linear.inputs, FLOAT32)
        z = graph.product([low, b], n * linear.outputs, rank, FLOAT32)
        y = graph.elementwise([y, z], width=graph.width)
        if trained == "dora":
            m = graph.weight(linear.name + ".m", (linear.outputs,), True, FLOAT32)
            adapted = graph.make([w, a, b], w.numbers, FLOAT32)
            y = graph.elementwise([y, graph.make([adapted, m], linear.outputs, FLOAT32)], width=graph.width)

    def backward(d_y, through):
        back = []
        if full:
            graph.add_gradient(linear.name, graph.product([graph.view(d_y), x], w.numbers, n))
            if linear.bias:
                graph.add_gradient(linear.name + ".bias", graph.make([d_y], linear.outputs))
        if lora:
            d_z = graph.elementwise([d_y], width=FLOAT32)
            d_low = graph.product([d_z, graph.view(b)], n * rank, linear.outputs, FLOAT32)
            graph.add_gradient(linear.name + ".lora_b", graph.product([graph.view(low), d_z], b.numbers, n, FLOAT32))
            graph.add_gradient(linear.name + ".lora_a", graph.product([graph.view(x32), d_low], a.numbers, n, FLOAT32))
            if trained == "dora":
                graph.add_gradient(linear.name + ".m", graph.make([d_z, y], linear.outputs, FLOAT32))
            if through:
                back.append(graph.product([d_low, graph.view(a)], x.numbers, rank, FLOAT32))
        if through:
            back.insert(0, graph.product([d_y, w], x.numbers, linear.outputs))
        return back

    return y, backward


def heads(graph: Graph, x: Array, name: str, trained: bool) -> tuple[Array, Backward]:
    """The norm of queries or keys, where a model has it, and the rotation of positions."""
    model, size = graph.model, graph.model.head_dim
    back = None
    if model.head_norms:
        x, back = norm(graph, x, name, size, trained)
    x = graph.make([graph.view(x)], x.numbers, in_place=True)

    def backward(d_x):
        d_x = graph.make([d_x], d_x.numbers, in_place=True)
        return back(d_x) if back else d_x

    return x, backward


def attention(graph: Graph, q: Array, k: Array, v: Array) -> tuple[Array, Backward]:
    """Fused on CUDA (cuDNN) where it can be; else with one number for each pair of tokens and head, kept."""
    model, n, length = graph.model, graph.tokens, graph.run.length
    scores = n * length * model.heads
    fused = graph.backend == "cuda" and graph.width == 2 and model.head_dim <= 128 and model.head_dim % 8 == 0
    fused_back = fused and length % 128 == 0

    def plain():
        q_scaled = graph.elementwise([q])
        s = graph.make([q_scaled, k], scores)
        s = graph.elementwise([s])  # the causal mask
        p = graph.make([s], scores, in_place=True)
        return q_scaled, p

    kept = None if fused else plain()
    if fused:
        o, stats = graph.several([q, k, v], [(q.numbers, graph.width), (n * model.heads, FLOAT32)])
    else:
        o = graph.make([kept[1], v], q.numbers)
    flat = graph.elementwise([o])  # tokens before heads

    def backward(d_flat):
        sizes = [(a.numbers, graph.width) for a in (q, k, v)]
        if fused_back:
            return graph.several([q, k, v, o, stats, d_flat], sizes)
        q_scaled, p = kept or plain()
        d_p = graph.make([d_flat, v], scores)
        products = graph.elementwise([d_p, p])
        d_s = graph.elementwise([p, products, graph.make([products], n * model.heads)])
        d_s = graph.elementwise([d_s])
        d_v = _grouped(graph, graph.make([p, d_flat], q.numbers), v)
        d_q = graph.elementwise([graph.make([d_s, k], q.numbers)])
        return d_q, _grouped(graph, graph.make([d_s, q_scaled], q.numbers), k), d_v

    return flat, backward


def _grouped(graph, d, shared):
    """The sum over the query heads that share a key or value head."""
    return d if d.numbers == shared.numbers else graph.make([d], shared.numbers)


def joined(graph: Graph, arrays: list[Array]) -> Array:
    """The sum of what comes back: what is float32 is added up first, and rounded once."""
    wide = [a for a in arrays if a.width != graph.width]
    narrow = [a for a in arrays if a.width == graph.width]
    if wide and narrow:
        return graph.elementwise([graph.sum(narrow), graph.sum(wide)], width=graph.width)
    return graph.sum(arrays)
