"""Peak memory and time of a step on all weights of Qwen3-0.6B (untied, bf16, random weights), ordinary and streamed.

    python examples/benchmarks/cuda_streaming_memory.py --out examples/benchmarks/results/cuda_streaming_h100.json

Both take Ember on the tables and the same optimizer on the body, with gradient checkpointing and without. Each row is a
process of its own. The peak is ``torch.cuda.max_memory_allocated`` of the steps after the first. ``--smoke`` runs every
line on the CPU with a tiny model; its peaks are null.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from benchmarking import SEED, at_least_one, in_fresh_process, machine, median_seconds, write

from cuda_ref import Ember, PairedOptimizer, StreamedBackward
from cuda_ref.streaming import next_token_loss

SHAPES = {"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
          "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
          "rms_norm_eps": 1e-6}  # fmt: skip
TINY = SHAPES | {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
BODIES = {"SGD": partial(torch.optim.SGD, lr=1e-4), "AdamW": partial(torch.optim.AdamW, lr=1e-6)}


def measure(device, body, streams, checkpoints, batch, tokens, repeats):
    """One row: bytes of the weights, the peak of a step, and its median seconds."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(SEED)
    config = Qwen3Config(**(SHAPES if device == "cuda" else TINY))
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16).train()
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = PairedOptimizer(model, tables=partial(Ember, lr=1e-4), rest=BODIES[body])
    streamed = StreamedBackward(model, optimizer)
    ids = torch.randint(0, config.vocab_size, (batch, tokens), device=device)

    def step():
        if streams:
            loss = streamed(ids)
        else:
            loss = next_token_loss(model, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if not torch.isfinite(loss):  # waits for the device
            raise RuntimeError(f"the loss is {loss.item()}")
        if device == "cuda":
            torch.cuda.synchronize()

    step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(step, repeats)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"weights_bytes": weights, "peak_bytes": peak, "seconds": seconds}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=at_least_one, default=1)
    parser.add_argument("--tokens", type=at_least_one, default=512)
    parser.add_argument("--repeats", type=at_least_one, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    args = parser.parse_args(argv)
    device = "cpu" if args.smoke else "cuda"
    options = {"batch": args.batch_size, "tokens": 16 if args.smoke else args.tokens}
    options["repeats"] = 2 if args.smoke else args.repeats
    report = {**machine(device), "model": "tiny" if args.smoke else "Qwen3-0.6B, untied", **options, "rows": []}
    write(args.out, report)
    for body in BODIES:
        for streams, checkpoints in ((False, False), (False, True), (True, False), (True, True)):
            what = {"body": body, "streamed": streams, "checkpoints": checkpoints}
            row = what | in_fresh_process(measure, device, body, streams, checkpoints, *options.values())
            print(row, flush=True)
            report["rows"].append(row)
            write(args.out, report)
    return int(any("error" in row for row in report["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
