"""An MLX training loop of one's own, with Ember on the token tables and AdamW on the rest.

    python examples/01_swap_ember_into_a_training_loop.py

Trains a small Llama from nothing on the characters of this file, for some ten seconds on two CPU cores.
"""

from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from ember_mlx import Ember, PairedOptimizer

STEPS, BATCH, LENGTH = 100, 8, 32

text = Path(__file__).read_text()
characters = sorted(set(text))
ids = mx.array([characters.index(character) for character in text])
model = llama.Model(
    llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        vocab_size=len(characters),
        tie_word_embeddings=False,
    )
)

# The three lines. The loop did say: optimizer = optim.AdamW(1e-3)
body = optim.AdamW(1e-3, bias_correction=True)
tables = Ember(learning_rate=optim.cosine_decay(1e-2, STEPS))
optimizer = PairedOptimizer(model, tables=tables, rest=body)


def loss(model, batch):
    return nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:], reduction="mean")


state = [model.state, optimizer.state]


@partial(mx.compile, inputs=state, outputs=state)
def step(batch):
    value, gradients = nn.value_and_grad(model, loss)(model, batch)
    optimizer.update(model, gradients)
    return value


mx.random.seed(0)
for i in range(1, STEPS + 1):
    starts = mx.random.randint(0, ids.size - LENGTH - 1, (BATCH, 1))
    value = step(ids[starts + mx.arange(LENGTH + 1)])
    mx.eval(state, value)
    if i % 20 == 0:
        rates = [rate.item() for rate in (optimizer.learning_rate, optimizer.table_learning_rate)]
        print(f"step {i:3}  loss {value.item():.3f}  learning rate {rates[0]:.4f}, of the tables {rates[1]:.4f}")

for side in (optimizer.tables, optimizer.rest):
    kept = sum(array.nbytes for _, array in tree_flatten(side.state))
    print(f"{type(side).__name__} keeps {kept:,} bytes")
