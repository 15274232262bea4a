"""The arrays of one training step of mlx-lm: forward, loss, backward and update, as MLX makes them."""

from ember_mlx.planner.architecture import Architecture
from ember_mlx.planner.evaluation import Array
from ember_mlx.planner.graph import Graph, Run
from ember_mlx.planner.loss import chunked_loss, loss
from ember_mlx.planner.modules import Backward, attention, heads, joined, linear, norm
from ember_mlx.planner.sharding import gathered, own_part
from ember_mlx.planner.update import judge, update

__all__ = ["build_step", "layer"]


def build_step(model: Architecture, run: Run, backend: str) -> Graph:
    """Forward, loss, backward and update, on "metal", "cuda" or "cpu"."""
    graph = Graph(model, run, backend)
    embedding, head = model.ends(run.tables)
    embedding_trains, head_trains = embedding.role in run.tables, head.role in run.tables
    w_embedding = _table(graph, embedding, embedding_trains)
    x = _looked_up(graph, embedding, w_embedding)
    first_trained = 0 if embedding_trains else max(model.layers - run.layers, 0)
    backs = []
    for i in range(model.layers):
        x, back = _checkpointed(graph, x, i) if run.grad_checkpoint else layer(graph, x, i)
        backs.append(back)
        graph.parts.append([x])
    full = run.fine_tune_type == "full"
    h, back_norm = norm(graph, x, "model.norm", model.hidden, full and bool(run.tables))
    w_head = _table(graph, head, head_trains)
    in_slices = run.chunked_loss or run.is_sharded(head)
    d_h = (chunked_loss if in_slices else loss)(graph, h, head, w_head, head_trains)
    if not in_slices and (not head_trains or graph.tokens >= head.columns):  # as in ember_mlx.finetune.leaving_head
        graph.leaving_head = [d_h] if embedding_trains or first_trained < model.layers else []
        graph.leaving_head += [graph.gradients[head.name]] if head_trains else []
    graph.role = "scratch"
    d_x = back_norm(d_h)
    for i in reversed(range(first_trained, model.layers)):
        d_x = backs[i](d_x, i > first_trained or embedding_trains)
    if embedding_trains:
        if run.is_sharded(embedding):
            d_x = graph.elementwise([gathered(graph, d_x)])
        zeros = graph.make([], w_embedding.numbers, role="gradients")
        graph.add_gradient(embedding.name, graph.make([zeros, d_x], w_embedding.numbers, in_place=True))
    judge(graph)
    update(graph)
    return graph


def _table(graph, table, trained):
    return graph.weight(table.name, (graph.run.rows_here(table), table.columns), trained, nbytes=table.nbytes)


def _looked_up(graph, table, w):
    numbers = graph.tokens * table.columns
    if not graph.run.is_sharded(table):
        return graph.make([w], numbers)
    of_all = graph.elementwise([graph.make([w], numbers * graph.run.workers)])
    return own_part(graph, graph.make([of_all], of_all.numbers))


def _checkpointed(graph, x, i):
    """Only the input is kept; the layer is computed again, at any time after the first."""
    out, _ = layer(graph, x, i)

    def backward(d_out, through):
        role, graph.role = graph.role, "activations"
        _, back = layer(graph, graph.view(x, after=[out]), i)
        graph.role = role
        return back(d_out, through)

    return out, backward


def layer(graph: Graph, x: Array, i: int) -> tuple[Array, Backward]:
    """A decoder layer: x + attention(norm(x)), then the same with the gated feed-forward."""
    model, full = graph.model, graph.run.fine_tune_type == "full"
    trains = i >= model.layers - graph.run.layers
    prefix = f"model.layers.{i}."
    linears = {linear.name: linear for linear in model.linears(i)}

    def kind(name):
        if not trains:
            return None
        if full:
            return "full"
        return graph.run.fine_tune_type if graph.run.lora_keys is None or name in graph.run.lora_keys else None

    def apply(x, name):
        return linear(graph, x, linears[prefix + name], kind(name))

    norm_trained = trains and full
    h, back_norm = norm(graph, x, prefix + "input_layernorm", model.hidden, norm_trained)
    projections = [apply(h, f"self_attn.{name}_proj") for name in "qkv"]
    (q, back_q), (k, back_k) = (
        heads(graph, projections[j][0], f"{prefix}self_attn.{'qk'[j]}_norm", norm_trained) for j in (0, 1)
    )
    o, back_attention = attention(graph, q, k, projections[2][0])
    y, back_o = apply(o, "self_attn.o_proj")
    x1 = graph.elementwise([x, y])
    h1, back_norm1 = norm(graph, x1, prefix + "post_attention_layernorm", model.hidden, norm_trained)
    (gate, back_gate), (up, back_up) = apply(h1, "mlp.gate_proj"), apply(h1, "mlp.up_proj")
    sigmoid = graph.elementwise([gate])
    silu = graph.elementwise([gate, sigmoid])
    product = graph.elementwise([silu, up])
    down, back_down = apply(product, "mlp.down_proj")
    out = graph.elementwise([x1, down])

    def backward(d_out, through):
        before = graph.role
        graph.role = "scratch"
        d_product = joined(graph, back_down(d_out, True))
        d_up = graph.elementwise([d_product, silu])
        d_silu = graph.elementwise([d_product, up])
        d_gate = graph.elementwise([d_silu, sigmoid, gate])
        d_h1 = joined(graph, back_up(d_up, True) + back_gate(d_gate, True))
        d_x1 = graph.elementwise([d_out, back_norm1(d_h1)])
        d_o = joined(graph, back_o(d_x1, True))
        d_q, d_k, d_v = back_attention(d_o)
        inner = through or norm_trained
        d_h = [
            part
            for (_, back), d in zip(projections, (back_q(d_q), back_k(d_k), d_v), strict=True)
            for part in back(d, inner)
        ]
        d_x = None
        if inner:
            d_x = back_norm(joined(graph, d_h))
            d_x = graph.elementwise([d_x1, d_x]) if through else None
        graph.role = before
        return d_x

    return out, backward
