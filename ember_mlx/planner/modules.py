"""The modules of a decoder, forward and backward.

What is written here is what the backward of each operation keeps: a product of matrices keeps what it multiplies if
the other factor needs a gradient, and LoRA multiplies in float32, as its matrices are. Each method returns its result,
and a function from the gradient of that to the gradient of its input.
"""

from ember_mlx.planner.architecture import Linear
from ember_mlx.planner.builder import FLOAT32, Builder


class Modules(Builder):
    def norm(self, x, name, size, trained):
        """RMSNorm: one kernel on GPUs; on the CPU plain operations, which keep the input in float32."""
        w = self.weight(name, (size,), trained)
        if self.backend == "cpu":
            x32 = self.float32(x)
            square = self.elementwise([x32])
            scale = self.make([square], x.numbers // size, FLOAT32)
            normal = self.elementwise([x32, scale], width=self.width)
            y = self.elementwise([normal, w])
        else:
            y = self.make([x, w], x.numbers, in_place=True)

        def backward(d_y):
            if self.backend == "cpu":
                if trained:
                    product = self.elementwise([d_y, normal])
                    self.add_gradient(name, self.make([product], size))
                d32 = self.elementwise([d_y, w], width=FLOAT32)
                of_scale = self.make([self.elementwise([d32, x32])], scale.numbers, FLOAT32)
                return self.elementwise([d32, scale, of_scale, x32], width=self.width)
            d_x, d_w = self.several([x, w, d_y], [(x.numbers, self.width), (size, self.width)])
            if trained:
                self.add_gradient(name, d_w)
            return d_x

        return y, backward

    def linear(self, x, linear: Linear, trained):
        """A product with a weight, frozen or trained, and with LoRA beside it if that stands here.

        LoRA: y + (scale * (x @ A) @ B), in float32, as A and B are.
        """
        full, lora = trained == "full", trained in ("lora", "dora")
        w = self.weight(linear.name, (linear.outputs, linear.inputs), full, nbytes=linear.nbytes)
        inputs = [x, self.view(w)]
        if linear.bias:
            inputs.append(self.weight(linear.name + ".bias", (linear.outputs,), full))
        n = self.tokens
        y = self.product(inputs, n * linear.outputs, linear.inputs)
        if lora:
            rank = self.run.rank
            a = self.weight(linear.name + ".lora_a", (linear.inputs, rank), True, FLOAT32)
            b = self.weight(linear.name + ".lora_b", (rank, linear.outputs), True, FLOAT32)
            x32 = self.float32(x)
            low = self.product([x32, a], n * rank, linear.inputs, FLOAT32)
            z = self.product([low, b], n * linear.outputs, rank, FLOAT32)
            y = self.elementwise([y, z], width=self.width)
            if trained == "dora":
                m = self.weight(linear.name + ".m", (linear.outputs,), True, FLOAT32)
                adapted = self.make([w, a, b], w.numbers, FLOAT32)
                y = self.elementwise([y, self.make([adapted, m], linear.outputs, FLOAT32)], width=self.width)

        def backward(d_y, through):
            back = []
            if full:
                self.add_gradient(linear.name, self.product([self.view(d_y), x], w.numbers, n))
                if linear.bias:
                    self.add_gradient(linear.name + ".bias", self.make([d_y], linear.outputs))
            if lora:
                d_z = self.elementwise([d_y], width=FLOAT32)
                d_low = self.product([d_z, self.view(b)], n * rank, linear.outputs, FLOAT32)
                self.add_gradient(linear.name + ".lora_b", self.product([self.view(low), d_z], b.numbers, n, FLOAT32))
                self.add_gradient(linear.name + ".lora_a", self.product([self.view(x32), d_low], a.numbers, n, FLOAT32))
                if trained == "dora":
                    self.add_gradient(linear.name + ".m", self.make([d_z, y], linear.outputs, FLOAT32))
                if through:
                    back.append(self.product([d_low, self.view(a)], x.numbers, rank, FLOAT32))
            if through:
                back.insert(0, self.product([d_y, w], x.numbers, linear.outputs))
            return back

        return y, backward

    def heads(self, x, name, trained):
        """The norm of queries or keys, where a model has it, and the rotation of positions."""
        model, size = self.model, self.model.head_dim
        back = None
        if model.head_norms:
            x, back = self.norm(x, name, size, trained)
        x = self.make([self.view(x)], x.numbers, in_place=True)

        def backward(d_x):
            d_x = self.make([d_x], d_x.numbers, in_place=True)
            return back(d_x) if back else d_x

        return x, backward

    def attention(self, q, k, v):
        """Fused on CUDA (cuDNN) where it can be; else with one number for each pair of tokens and head, kept."""
        model, n, length = self.model, self.tokens, self.run.length
        scores = n * length * model.heads
        fused = self.backend == "cuda" and self.width == 2 and model.head_dim <= 128 and model.head_dim % 8 == 0
        fused_back = fused and length % 128 == 0

        def plain():
            q_scaled = self.elementwise([q])
            s = self.make([q_scaled, k], scores)
            s = self.elementwise([s])  # the causal mask
            p = self.make([s], scores, in_place=True)
            return q_scaled, p

        if fused:
            o, stats = self.several([q, k, v], [(q.numbers, self.width), (n * model.heads, FLOAT32)])
        else:
            q_scaled, p = plain()
            o = self.make([p, v], q.numbers)
        flat = self.elementwise([o])  # tokens before heads

        def backward(d_flat):
            nonlocal q_scaled, p
            sizes = [(a.numbers, self.width) for a in (q, k, v)]
            if fused_back:
                return self.several([q, k, v, o, stats, d_flat], sizes)
            if fused:
                q_scaled, p = plain()
            d_p = self.make([d_flat, v], scores)
            products = self.elementwise([d_p, p])
            d_s = self.elementwise([p, products, self.make([products], n * model.heads)])
            d_s = self.elementwise([d_s])
            d_v = self.grouped(self.make([p, d_flat], q.numbers), v)
            d_q = self.elementwise([self.make([d_s, k], q.numbers)])
            return d_q, self.grouped(self.make([d_s, q_scaled], q.numbers), k), d_v

        if fused:
            q_scaled = p = None
        return flat, backward

    def grouped(self, d, shared):
        """The sum over the query heads that share a key or value head."""
        return d if d.numbers == shared.numbers else self.make([d], shared.numbers)

    def _joined(self, arrays):
        """The sum of what comes back: what is float32 is added up first, and rounded once."""
        wide = [a for a in arrays if a.width != self.width]
        narrow = [a for a in arrays if a.width == self.width]
        if wide and narrow:
            return self.elementwise([self.sum(narrow), self.sum(wide)], width=self.width)
        return self.sum(arrays)
