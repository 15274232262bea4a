"""All weights of a model in little more memory than the weights: each is stepped inside the backward pass.

    python examples/05_train_every_weight_in_little_memory.py

Trains a small Llama from nothing on the characters of this file, for some ten seconds on two CPU cores.
"""

from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
from mlx_lm.models import llama

from ember_mlx import Ember, PairedOptimizer
from ember_mlx.streaming import StreamedStep

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

# Here value_and_grad, the optimizer's update and mx.eval would stand. Call it by itself, never inside mx.compile.
optimizer = PairedOptimizer(model, tables=Ember(1e-2), rest=optim.AdamW(1e-3, bias_correction=True))
step = StreamedStep(model.train(), optimizer)
for i in range(1, 51):
    starts = mx.random.randint(0, ids.size - 33, (8, 1))
    loss, tokens = step(ids[starts + mx.arange(33)])
    if i in (1, 50):
        print(f"step {i}: loss {loss:.3f} on {tokens} tokens, peak {mx.get_peak_memory() / 1e6:.1f} MB")
