"""The arrays of one training step of mlx-lm: forward, loss, backward and update, as MLX makes them."""

from ember_mlx.planner.loss import Loss
from ember_mlx.planner.modules import Modules
from ember_mlx.planner.update import Update


class Step(Modules, Loss, Update):
    """Builds the arrays of a step; ``results`` is what it is computed for, ``there`` what exists before it.

    ``losses`` are the results that validation asks for too.
    """

    def build(self):
        """Forward, loss, backward and update; then ``results`` and ``there`` are complete."""
        model, run = self.model, self.run
        tables = {table.name: table for table in model.tables(run.tables)}
        of_role = {table.role: table for table in tables.values()}
        embedding = of_role.get("tied") or of_role["embedding"]
        head = of_role.get("tied") or of_role["head"]
        trained = {table.name for table in tables.values() if table.role in run.tables}
        w_embedding = self._table(embedding, embedding.name in trained)
        x = self.make([w_embedding], self.tokens * model.hidden)
        first_trained = 0 if embedding.name in trained else max(model.layers - run.layers, 0)
        backs = []
        for i in range(model.layers):
            x, back = self._checkpointed(x, i) if run.grad_checkpoint else self.layer(x, i)
            backs.append(back)
        full = run.fine_tune_type == "full"
        h, back_norm = self.norm(x, "model.norm", model.hidden, full)
        w_head = self._table(head, head.name in trained)
        loss = self.chunked_loss if run.chunked_loss else self.loss
        d_h = loss(h, head, w_head, head.name in trained)
        self.losses = list(self.results)
        self._role = "scratch"
        d_x = back_norm(d_h)
        for i in reversed(range(first_trained, model.layers)):
            d_x = backs[i](d_x, i > first_trained or embedding.name in trained)
        if embedding.name in trained:
            zeros = self.make([], w_embedding.numbers, role="gradients")
            self.add_gradient(embedding.name, self.make([zeros, d_x], w_embedding.numbers, in_place=True))
        self.update()
        return self

    def _table(self, table, trained):
        return self.weight(table.name, (table.rows, table.columns), trained, nbytes=table.nbytes)

    def _checkpointed(self, x, i):
        """Only the input is kept; the layer is computed again, at any time after the first."""
        out, _ = self.layer(x, i)

        def backward(d_out, through):
            role, self._role = self._role, "activations"
            _, back = self.layer(self.view(x, after=[out]), i)
            self._role = role
            return back(d_out, through)

        return out, backward

    def layer(self, x, i):
        """A decoder layer: x + attention(norm(x)), then the same with the gated feed-forward."""
        model, full = self.model, self.run.fine_tune_type == "full"
        trains = i >= model.layers - self.run.layers
        prefix = f"model.layers.{i}."
        linears = {linear.name: linear for linear in model.linears(i)}

        def kind(name):
            if not trains:
                return None
            if full:
                return "full"
            return self.run.fine_tune_type if self.run.lora_keys is None or name in self.run.lora_keys else None

        def apply(x, name):
            return self.linear(x, linears[prefix + name], kind(name))

        norm_trained = trains and full
        h, back_norm = self.norm(x, prefix + "input_layernorm", model.hidden, norm_trained)
        projections = [apply(h, f"self_attn.{name}_proj") for name in "qkv"]
        (q, back_q), (k, back_k) = (
            self.heads(projections[j][0], f"{prefix}self_attn.{'qk'[j]}_norm", norm_trained) for j in (0, 1)
        )
        o, back_attention = self.attention(q, k, projections[2][0])
        y, back_o = apply(o, "self_attn.o_proj")
        x1 = self.elementwise([x, y])
        h1, back_norm1 = self.norm(x1, prefix + "post_attention_layernorm", model.hidden, norm_trained)
        (gate, back_gate), (up, back_up) = apply(h1, "mlp.gate_proj"), apply(h1, "mlp.up_proj")
        sigmoid = self.elementwise([gate])
        silu = self.elementwise([gate, sigmoid])
        product = self.elementwise([silu, up])
        down, back_down = apply(product, "mlp.down_proj")
        out = self.elementwise([x1, down])

        def backward(d_out, through):
            before = self._role
            self._role = "scratch"
            d_product = self._joined(back_down(d_out, True))
            d_up = self.elementwise([d_product, silu])
            d_silu = self.elementwise([d_product, up])
            d_gate = self.elementwise([d_silu, sigmoid, gate])
            d_h1 = self._joined(back_up(d_up, True) + back_gate(d_gate, True))
            d_x1 = self.elementwise([d_out, back_norm1(d_h1)])
            d_o = self._joined(back_o(d_x1, True))
            d_q, d_k, d_v = back_attention(d_o)
            inner = through or norm_trained
            d_h = [
                part
                for (_, back), d in zip(projections, (back_q(d_q), back_k(d_k), d_v), strict=True)
                for part in back(d, inner)
            ]
            d_x = None
            if inner:
                d_x = back_norm(self._joined(d_h))
                d_x = self.elementwise([d_x1, d_x]) if through else None
            self._role = before
            return d_x

        return out, backward
