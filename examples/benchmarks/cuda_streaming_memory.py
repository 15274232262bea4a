"""Peak memory and time of a step on all weights of Qwen3-0.6B (untied, bf16, random weights), streamed and ordinary.

    python examples/benchmarks/cuda_streaming_memory.py --out examples/benchmarks/results/cuda_streaming_h100.json

Both take Ember on the tables and the same optimizer on the body. Beside them stand PyTorch's fused AdamW on all
weights, and the same with the model compiled by ``torch.compile``, of which the first step takes a minute. All rows run
in one process, the most important first, and each is written as soon as it is measured; ``--only '1x512/*'`` takes some
of them. The peak is ``torch.cuda.max_memory_allocated`` of the steps after the second. ``--smoke`` runs every line on
the CPU with a tiny model; its peaks are null.
"""

import argparse
import gc
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
from benchmarking import SEED, at_least_one, in_this_process, machine, median_seconds, write

from cuda_ref import AdamMini, Ember, FlashAdamW, PairedOptimizer, SinkGD, StreamedBackward
from cuda_ref.streaming import next_token_loss

SHAPES = {"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
          "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
          "rms_norm_eps": 1e-6}  # fmt: skip
TINY = SHAPES | {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
BODIES = {
    "SGD": partial(torch.optim.SGD, lr=1e-4),
    "AdamW": partial(torch.optim.AdamW, lr=1e-6),
    "SinkGD": partial(SinkGD, lr=1e-6, passes=2),
    "AdamMini int8": partial(AdamMini, lr=1e-6, momentum="int8"),
    "FlashAdamW": partial(FlashAdamW, lr=1e-6),
}
# Batch and tokens of a step, body, how, and whether layers are checkpointed. Accumulated: a sequence at a time.
ROWS = (
    ("1x512", "SGD", "streamed", True),
    ("1x512", "AdamW", "streamed", True),
    ("4x1024", "SGD", "streamed", True),
    ("1x512", "SGD", "ordinary", True),
    ("1x512", "AdamW", "ordinary", True),
    ("4x1024", "SGD", "ordinary", True),
    ("4x1024", "SGD", "accumulated", True),
    ("1x512", "SGD", "streamed", False),
    ("1x512", "SGD", "ordinary", False),
    ("1x512", "AdamW", "streamed", False),
    ("1x512", "AdamW", "ordinary", False),
    ("1x512", "SinkGD", "streamed", True),
    ("1x512", "AdamMini int8", "streamed", True),
    ("1x512", "FlashAdamW", "streamed", True),
    ("4x1024", "AdamW", "streamed", True),
    ("4x1024", "AdamW", "ordinary", True),
    ("1x512", "AdamW everywhere", "ordinary", False),
    ("1x512", "AdamW everywhere", "ordinary", True),
    ("4x1024", "AdamW everywhere", "ordinary", True),
    ("1x512", "AdamW everywhere", "compiled", False),
)


def measure(device, tokens, body, how, checkpoints, repeats):
    """One row: bytes of the weights and of the optimizers' state, the peak of a step, and its median seconds."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    on_gpu = device == "cuda"
    torch.manual_seed(SEED)
    config = Qwen3Config(**(SHAPES if on_gpu else TINY))
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16).train()
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if body in BODIES:
        optimizer = PairedOptimizer(model, tables=partial(Ember, lr=1e-4), rest=BODIES[body])
        streamed = StreamedBackward(model, optimizer)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=on_gpu)
    forward = torch.compile(model) if how == "compiled" else model
    ids = torch.randint(0, config.vocab_size, tuple(map(int, tokens.split("x"))), device=device)

    def step():
        if how == "streamed":
            loss = streamed(ids)
        elif how == "accumulated":
            loss = streamed.accumulate([(sequence[None],) for sequence in ids])
        else:
            loss = next_token_loss(forward, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if not torch.isfinite(loss):  # waits for the device
            raise RuntimeError(f"the loss is {loss.item()}")
        if on_gpu:
            torch.cuda.synchronize()

    step()
    step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(step, repeats)
    state = [tensor for of_one in optimizer.state.values() for tensor in of_one.values() if torch.is_tensor(tensor)]
    return {
        "weights_bytes": sum(p.nbytes for p in model.parameters()),
        "state_bytes": sum(tensor.nbytes for tensor in state),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "seconds": seconds,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="*", help="rows whose name, such as 1x512/SGD/streamed/checkpoints, is like it"
    )
    parser.add_argument("--repeats", type=at_least_one, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    args = parser.parse_args(argv)
    device = "cpu" if args.smoke else "cuda"
    repeats = 2 if args.smoke else args.repeats
    report = {
        **machine(device),
        "model": "tiny" if args.smoke else "Qwen3-0.6B, untied",
        "repeats": repeats,
        "rows": [],
    }
    write(args.out, report)
    for tokens, body, how, checkpoints in ROWS:
        name = f"{tokens}/{body}/{how}/{'checkpoints' if checkpoints else 'plain'}"
        if fnmatch(name, args.only):
            size = "2x16" if args.smoke else tokens
            row = {"name": name, **in_this_process(measure, device, size, body, how, checkpoints, repeats)}
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
                row["left_bytes"] = torch.cuda.memory_allocated()  # of the row before, in the next one's peak
            print(row, flush=True)
            report["rows"].append(row)
            write(args.out, report)
    return int(not report["rows"] or any("error" in row for row in report["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
