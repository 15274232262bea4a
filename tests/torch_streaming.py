"""What the tests of streamed steps in PyTorch share: small models, their batches, an ordinary step, and comparison."""

from functools import partial

import torch
from torch_tables import bits
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from cuda_ref import Ember, PairedOptimizer
from cuda_ref.streaming import next_token_loss

V, D = 190, 32
ADAMW = partial(torch.optim.AdamW, lr=1e-3)


def model_of(kind="llama", tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    options = dict(vocab_size=V, hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                   num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied, pad_token_id=5)  # fmt: skip
    make = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}[kind]
    return make[0](make[1](**options)).to(dtype)


def batch_of(length, seed=1):
    ids = torch.randint(0, V, (2, length), generator=torch.Generator().manual_seed(seed))
    ids[0, 1] = 5  # the padding token
    labels = ids.clone()
    labels[1, :3] = -100
    return ids, labels


def paired(model, rest=ADAMW, **ember):
    return PairedOptimizer(model, tables=partial(Ember, **{"lr": 1e-2} | ember), rest=rest)


def ordinary_step(model, optimizer, batch):
    loss = next_token_loss(model, *batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def assert_alike(model, other, optimizer, other_optimizer, step):
    """Weights to a part of the way that a weight can have gone, and Ember's second moments."""
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3 * step, msg=lambda text, name=name: f"{name}: {text}")
        for moment in {"r", "c"} & optimizer.state[p].keys():
            ours, theirs = optimizer.state[p][moment], other_optimizer.state[q][moment]
            torch.testing.assert_close(ours, theirs, rtol=3e-5, atol=1e-6 * theirs.max().item())


def everything(model, optimizer):
    state = [optimizer.state[p][name] for p in model.parameters() for name in sorted(optimizer.state[p])]
    return bits(*model.parameters(), *state)
