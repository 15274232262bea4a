"""A Llama in 100 lines that trains fast: the names of its weights are those of Hugging Face's, and so is its output.

With ``lora_layers`` it trains as ``ember-mlx train`` with LoRA does, whose body is mlx-lm's: all is frozen but for A
and B of the linear layers of the last blocks, and the token tables.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Llama", "Shape", "mean_loss"]

LORA_RANK, LORA_SCALE = 8, 20.0  # mlx_lm.lora's defaults; its dropout is 0


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama. A head is ``width / heads`` wide; ``key_value_heads`` is how many keys have (None: as many).

    ``lora_layers``: of so many of the last blocks LoRA trains the linear layers, and nothing else of the body trains.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    tied: bool
    key_value_heads: int | None = None
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    lora_layers: int = 0


class LoRALinear(nn.Linear):
    """W x + scale * B A x, with A and B in PyTorch's order, (rank, inputs) and (outputs, rank): mlx-lm's, transposed.

    AdamMini's blocks are rows in PyTorch: of A by rank, of B by output, as in MLX.
    """

    def __init__(self, inputs, outputs, bias=False):
        super().__init__(inputs, outputs, bias=bias)
        self.lora_a = nn.Parameter(torch.zeros(LORA_RANK, inputs))
        self.lora_b = nn.Parameter(torch.zeros(outputs, LORA_RANK))

    def forward(self, x):
        return F.linear(x, self.weight) + LORA_SCALE * F.linear(F.linear(x, self.lora_a), self.lora_b)


class Attention(nn.Module):
    def __init__(self, shape, linear):
        super().__init__()
        self.heads, self.groups = shape.heads, shape.key_value_heads or shape.heads
        self.head_dim = size = shape.width // shape.heads  # AdamMini asks for it
        self.q_proj = linear(shape.width, self.heads * size, bias=False)
        self.k_proj = linear(shape.width, self.groups * size, bias=False)
        self.v_proj = linear(shape.width, self.groups * size, bias=False)
        self.o_proj = linear(self.heads * size, shape.width, bias=False)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        q = rotate(self.q_proj(x).view(batch, length, self.heads, -1).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(batch, length, self.groups, -1).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(batch, length, self.groups, -1).transpose(1, 2)
        repeats = self.heads // self.groups
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


def rotate(x, cos, sin):
    """Rotary positions; x is (batch, heads, length, size), cos and sin (length, size)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class FeedForward(nn.Module):
    def __init__(self, shape, linear):
        super().__init__()
        self.gate_proj = linear(shape.width, shape.hidden, bias=False)
        self.up_proj = linear(shape.width, shape.hidden, bias=False)
        self.down_proj = linear(shape.hidden, shape.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, shape, linear):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.self_attn = Attention(shape, linear)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.mlp = FeedForward(shape, linear)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        kinds = [nn.Linear] * (shape.layers - shape.lora_layers) + [LoRALinear] * shape.lora_layers
        self.layers = nn.ModuleList(Block(shape, linear) for linear in kinds)
        self.norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)


class Llama(nn.Module):
    """The model; ``tables`` are its token tables by name: "embedding" and, if untied, "head"."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        if not shape.tied:
            self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.lora_layers:
            trained = [*self.lora().values(), *self.tables.values()]
            self.requires_grad_(False)
            for p in trained:
                p.requires_grad_(True)

    @property
    def tables(self):
        tables = {"embedding": self.model.embed_tokens.weight}
        return tables if self.shape.tied else {**tables, "head": self.lm_head.weight}

    def body(self):
        """All other parameters that train, by name."""
        tables = {id(table) for table in self.tables.values()}
        return {name: p for name, p in self.named_parameters() if p.requires_grad and id(p) not in tables}

    def lora(self):
        """A and B of all linear layers that have them, by name."""
        return {name: p for name, p in self.named_parameters() if name.endswith(("lora_a", "lora_b"))}

    @torch.no_grad()
    def initialize(self, seed):
        """Fresh weights, in place: normal of deviation 0.02, projections into the residual stream smaller (GPT-2)."""
        device = self.model.norm.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 1:
                p.fill_(1.0)
            else:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                deviation = 0.02 / math.sqrt(2 * self.shape.layers) if into_residual else 0.02
                p.copy_(torch.randn(p.shape, generator=generator, device=device) * deviation)

    @torch.no_grad()
    def load(self, state, seed):
        """Weights to fine-tune, in place. LoRA begins as in mlx-lm: A uniform within 1 / sqrt(inputs), B zero."""
        self.load_state_dict({**state, **self.lora()})
        generator = torch.Generator(self.model.norm.weight.device).manual_seed(seed)
        for name, p in self.lora().items():
            bound = 1 / math.sqrt(p.shape[1]) if name.endswith("lora_a") else 0.0
            drawn = torch.empty(p.T.shape, device=p.device)  # in mlx-lm's order, as in earlier campaigns
            p.copy_(drawn.uniform_(-bound, bound, generator=generator).T)

    def forward(self, ids):
        """Hidden states after the last norm, (batch, length, width), of token ids, (batch, length)."""
        batch, length = ids.shape
        # index_select: its backward can be captured in a CUDA graph on every PyTorch
        x = self.model.embed_tokens.weight.index_select(0, ids.flatten()).float().view(batch, length, -1)
        size = self.shape.width // self.shape.heads
        powers = torch.arange(0, size, 2, device=ids.device, dtype=torch.float32) / size
        angles = torch.outer(torch.arange(length, device=ids.device).float(), self.shape.rope_base**-powers)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.model.norm(x)


def mean_loss(x, head, targets, reduction="mean"):
    """Cross-entropy in nats of hidden states, (batch, length, width), under the head's weight; float32."""
    logits = F.linear(x, head.to(x.dtype))
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)
