"""Memory and time of a step on all weights of Qwen3-0.6B (bf16, random weights) in unsloth, beside plain transformers.

    pip install unsloth  # in an environment of its own
    PYTHONPATH=. python examples/benchmarks/unsloth_rows.py --out RESULT.json

unsloth is called from its package and is no dependency of this project: its files are under Apache, LGPL and AGPL, and
nothing of it is copied or kept. Where it is missing its rows have an ``error``. Its loader, its loss and its gradient
checkpointing are as it sets them: norms in float32, and inputs of layers from 2 MB on in the host's memory, which is
not counted here. The 8-bit AdamW is bitsandbytes' own, with 8 bits for the tables too. Both libraries load one folder
and get the same tokens, so that their losses tell whether they compute the same.

The peak is of the steps after the warm-up; held is what is allocated between steps, weights and all. A library has a
process of its own for each model, and its rows run there one after another. ``--smoke`` is a tiny model on the CPU;
its bytes are null.
"""

import argparse
import gc
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarking import SEED, at_least_one, in_this_process, machine, write
from training_memory_rows import MODELS, TINY

from ember_mlx.shared.environment import version_of

TYINGS = ("untied", "tied")
TOKENS = ("1x512", "4x1024")
OPTIMIZERS = {"unsloth": ("fused AdamW", "8-bit AdamW"), "transformers": ("fused AdamW",)}
WARM_UP = 3
LONGEST = 2048  # below 512 unsloth keeps the inputs of layers on the device
OFFLINE = {  # there is nothing to download; unsloth sets the flags of transformers and datasets by the first
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}
CACHES = ("UNSLOTH_COMPILE_LOCATION", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # deleted with the models
PACKAGES = ("unsloth", "unsloth_zoo", "trl", "peft", "bitsandbytes", "xformers", "torchao")


def make_folder(folder, config, device):
    """A model with random weights and a tokenizer of few words, as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(SEED)
    config = Qwen3Config(**config, dtype="bfloat16", bos_token_id=0, eos_token_id=1, pad_token_id=2)
    with torch.device(device):
        Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    words = {word: i for i, word in enumerate([*special.values(), "Hello", "!"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def load(library, folder, device):
    """The model of a folder in training, with gradient checkpointing."""
    import torch

    if library == "unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            str(folder), full_finetuning=True, dtype=torch.bfloat16, load_in_4bit=False, max_seq_length=LONGEST,
            use_gradient_checkpointing="unsloth",
        )  # fmt: skip
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def optimizer_of(name, model, device):
    """AdamW of PyTorch or bitsandbytes on every weight."""
    import torch

    if name == "8-bit AdamW":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-5)
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")


def measure(library, folder, tokens, optimizer, device, steps):
    """One row."""
    try:
        return _measure(library, folder, tokens, optimizer, device, steps)
    except Exception as error:  # of whatever kind: it comes from packages that are not ours
        traceback.print_exc()
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _measure(library, folder, tokens, optimizer, device, steps):
    if library == "unsloth":
        import unsloth  # noqa: F401 - first of all: it sets PyTorch's allocator, and changes transformers
    import torch

    on_gpu = device == "cuda"
    gc.collect()  # of the row before
    torch.cuda.empty_cache()
    left = torch.cuda.memory_allocated()
    model = load(library, folder, device)
    optimizer = optimizer_of(optimizer, model, device)
    torch.manual_seed(SEED)
    ids = torch.randint(3, model.config.vocab_size, tuple(map(int, tokens.split("x")))).to(device)
    losses, times, held = [], [], []
    for step in range(WARM_UP + steps):
        if on_gpu and step == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        output = model(input_ids=ids, labels=ids, use_cache=False)
        loss, logits = output.loss, output.logits
        whole_logits = torch.is_tensor(logits) and logits.numel() > 0
        del output, logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        del loss
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        held.append(torch.cuda.memory_allocated())
    seconds = statistics.median(times[WARM_UP:])
    return {
        "weights_bytes": sum(p.nbytes for p in model.parameters()),
        "weights_dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}),
        "frozen": sum(not p.requires_grad for p in model.parameters()),
        "left_bytes": left if on_gpu else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "held_bytes": max(held[WARM_UP:]) if on_gpu else None,
        "seconds": round(seconds, 5),
        "tokens_a_second": round(ids.numel() / seconds, 1),
        "first_seconds": round(times[0], 2),
        "whole_logits": whole_logits,  # or chunks, inside the loss
        "attention": model.config._attn_implementation,
        "losses": [round(loss, 4) for loss in losses],
    }


def rows_of(library, folder, tokens, device, steps):
    """The rows of a library on one model, each as soon as it is measured."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for size in tokens:
            for optimizer in OPTIMIZERS[library]:
                found = pool.submit(measure, library, folder, size, optimizer, device, steps)
                yield {"tokens": size, "optimizer": optimizer} | in_this_process(found.result)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=at_least_one, default=9, help="timed, after three")
    parser.add_argument("--models", nargs="+", choices=TYINGS, default=TYINGS)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    args = parser.parse_args(argv)
    import torch  # not above, for a row's process imports this file, too

    if not args.smoke and not torch.cuda.is_available():
        parser.exit(2, "unsloth_rows.py: error: no CUDA device here; --smoke runs on the CPU\n")
    device = "cpu" if args.smoke else "cuda"
    config, tokens = MODELS["qwen3-0.6b"], TOKENS
    if args.smoke:
        config, tokens = config | TINY, ("2x16",)
    here = machine(device) | {"steps": args.steps}
    here["versions"] |= {package: version_of(package) for package in PACKAGES}
    report = {"machine": here, "rows": []}
    write(args.out, report)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update(OFFLINE | {name: f"{scratch}/{name.lower()}" for name in CACHES})
        for tying in args.models:
            folder = Path(scratch) / tying
            make_folder(folder, config | {"tie_word_embeddings": tying == "tied"}, device)
            for library in OPTIMIZERS:
                for row in rows_of(library, folder, tokens, device, args.steps):
                    row = {"library": library, "model": tying} | row
                    report["rows"].append(row)
                    write(args.out, report)
                    print(row, flush=True)


if __name__ == "__main__":
    main()
