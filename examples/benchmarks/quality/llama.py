"""A Llama in 100 lines that trains fast: the names of its weights are those of Hugging Face's, and so is its output."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Llama", "Shape", "mean_loss"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama. A head is ``width / heads`` wide; ``key_value_heads`` is how many keys have (None: as many)."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    tied: bool
    key_value_heads: int | None = None
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5


class Attention(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.heads, self.groups = shape.heads, shape.key_value_heads or shape.heads
        size = shape.width // shape.heads
        self.q_proj = nn.Linear(shape.width, self.heads * size, bias=False)
        self.k_proj = nn.Linear(shape.width, self.groups * size, bias=False)
        self.v_proj = nn.Linear(shape.width, self.groups * size, bias=False)
        self.o_proj = nn.Linear(self.heads * size, shape.width, bias=False)

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
    def __init__(self, shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)


class Llama(nn.Module):
    """The model; ``tables`` are its token tables by name: "embedding" and, if untied, "head"."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        if not shape.tied:
            self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    @property
    def tables(self):
        tables = {"embedding": self.model.embed_tokens.weight}
        return tables if self.shape.tied else {**tables, "head": self.lm_head.weight}

    def body(self):
        """All other parameters, by name."""
        tables = {id(table) for table in self.tables.values()}
        return {name: p for name, p in self.named_parameters() if id(p) not in tables}

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
