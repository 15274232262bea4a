"""A PyTorch reference run of a Hugging Face model, with Ember on the token tables and AdamW on the rest.

    python examples/03_cuda_reference_run.py                                             # the bundled tiny model
    python examples/03_cuda_reference_run.py --model Qwen/Qwen3-0.6B --text my_text.txt  # one of your own

Trains on a GPU where there is one, else on the CPU, where the tiny model takes ten seconds.
"""

import argparse
from functools import partial
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from cuda_ref import Ember, PairedOptimizer, find_token_tables

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(files("ember_mlx") / "demo/model"), help="name or folder of a causal LM")
parser.add_argument("--text", type=Path, default=Path(__file__), help="what to train on (default: this file)")
parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--length", type=int, default=64, help="tokens of a row")
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--table-learning-rate", type=float, default=2e-3)
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).to(device).train()
tokenizer = AutoTokenizer.from_pretrained(options.model)
ids = torch.tensor(tokenizer(options.text.read_text(), verbose=False)["input_ids"])
if len(ids) <= options.length:
    parser.error(f"--text {options.text} has {len(ids)} tokens: more than --length {options.length} are needed")

# The three lines. The loop did say: optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
tables = partial(Ember, lr=options.table_learning_rate)
body = partial(torch.optim.AdamW, lr=options.learning_rate, fused=True)
optimizer = PairedOptimizer(model, tables=tables, rest=body)

# One schedule scales both learning rates, each from its own peak.
scheduler = get_linear_schedule_with_warmup(optimizer, options.steps // 10, options.steps)

generator = torch.Generator().manual_seed(0)
for i in range(1, options.steps + 1):
    starts = torch.randint(0, len(ids) - options.length, (options.batch, 1), generator=generator)
    batch = ids[starts + torch.arange(options.length)].to(device)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    rates = [side.param_groups[0]["lr"] for side in (optimizer.rest, optimizer.tables)]
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if i % max(1, options.steps // 8) == 0:
        print(f"step {i:3}  loss {loss.item():.3f}  learning rate {rates[0]:.2e}, of the tables {rates[1]:.2e}")

for table in find_token_tables(model):
    print(f"{table.path}: {table.role}, {table.shape[0]:,} x {table.shape[1]:,}, {table.dtype}")
kept = sum(tensor.nbytes for state in optimizer.tables.state.values() for tensor in state.values())
of_adamw = sum(2 * w.nbytes for w in optimizer.tables.state)
print(f"for the tables Ember keeps {kept:,} bytes; AdamW would keep {of_adamw:,}")
if device == "cuda":
    print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
