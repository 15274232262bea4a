"""The authors' own Adam-mini and FlashOptim beside ours in PyTorch: time, scratch, state, agreement, on one GPU.

    pip download --no-deps --only-binary=:all: -d /tmp/whl adam-mini flashoptim
    pip install --no-deps --target /tmp/authors /tmp/whl/*.whl
    PYTHONPATH=.:/tmp/authors python examples/benchmarks/authors_packages.py --out RESULT.json

The packages are called as they are, and are no dependencies of this project; a missing one leaves rows with an
``error``. SinkGD stands alone, and of the author's Ember there is no package. All start from equal weights and get
equal gradients. `way_error` is how far the weights are, after ten steps, from those of the same rule in float64, over
how far these have gone; `from_authors` is the same between the two implementations. Times are of the GPU alone, as in
cuda_table_step.py.
`--smoke` runs every line on a CPU with tiny shapes; its times are null, and FlashOptim has no CPU.
"""

import argparse
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from benchmarking import SEED, at_least_one, in_this_process, machine, write
from cuda_table_step import milliseconds

from cuda_ref import AdamMini, FlashAdamW, SinkGD

SHAPES, TINY = [(4096, 12288), (151_936, 1024)], [(32, 64)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEPS, PASSES = 10, 2
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def their_adam_mini(w):
    from adam_mini import Adam_mini

    return Adam_mini([("layers.0.mlp.up_proj.weight", w)], verbose=False, **OPTIONS)  # by its name: a block a row


def their_flash_adamw(w, bits):
    from flashoptim import FlashAdamW

    return FlashAdamW([w], master_weight_bits=bits, **OPTIONS)


# The package if it is the authors', what makes it, its rule, and which dtypes of weights it is for. Of each rule the
# authors' come first.
OPTIMIZERS = {
    "AdamW, fused": (None, lambda w: torch.optim.AdamW([w], fused=True, **OPTIONS), "AdamW", DTYPES),
    "Adam-mini, authors'": ("adam-mini", their_adam_mini, "Adam-mini", DTYPES),
    "Adam-mini": (None, lambda w: AdamMini([w], **OPTIONS), "Adam-mini", DTYPES),
    "Adam-mini, int8 momentum": (None, lambda w: AdamMini([w], momentum="int8", **OPTIONS), "Adam-mini", DTYPES),
    "FlashAdamW, authors'": ("flashoptim", partial(their_flash_adamw, bits=None), "FlashAdamW", DTYPES),
    "FlashAdamW": (None, lambda w: FlashAdamW([w], **OPTIONS), "FlashAdamW", DTYPES),
    "FlashAdamW 24 bits, authors'": ("flashoptim", partial(their_flash_adamw, bits=24), "24 bits", ["bfloat16"]),
    "FlashAdamW 24 bits": (None, lambda w: FlashAdamW([w], weights="bf16+int8", **OPTIONS), "24 bits", ["bfloat16"]),
    f"SinkGD, {PASSES} passes": (None, lambda w: SinkGD([w], passes=PASSES, **OPTIONS), "SinkGD", DTYPES),
}


def numbers(seed, shape, device):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, generator=generator)


def start(shape, dtype, device):
    return (numbers(SEED, shape, device) * 0.02).to(dtype)


def gradients(shape, dtype, device):
    """Of all steps; rows are of sizes over three decades, as those of tokens are."""
    sizes = torch.logspace(-3, 0, shape[0], device=device)[:, None] * 1e-2
    for step in range(STEPS):
        yield (numbers(SEED + 1 + step, shape, device) * sizes).to(dtype)


def exact_way(rule, shape, dtype, device):
    """How far the weights go in float64, with the sizes of Adam-mini's blocks if that is the rule."""
    w = start(shape, dtype, device).double()
    before, m, v = w.clone(), torch.zeros_like(w), 0.0
    beta1, beta2 = OPTIONS["betas"]
    for t, g in enumerate(gradients(shape, dtype, device), start=1):
        g = g.double()
        if rule == "SinkGD":
            w.mul_(1 - OPTIONS["lr"] * OPTIONS["weight_decay"]).sub_(of_one_size(g), alpha=OPTIONS["lr"])
            continue
        m.lerp_(g, 1 - beta1)
        squares = g.square().mean(dim=1, keepdim=True) if rule == "Adam-mini" else g.square_()
        v = beta2 * v + (1 - beta2) * squares
        w.mul_(1 - OPTIONS["lr"] * OPTIONS["weight_decay"])
        w.addcdiv_(m, (v / (1 - beta2**t)).sqrt() + OPTIONS["eps"], value=-OPTIONS["lr"] / (1 - beta1**t))
    return w.sub_(before).float()


def of_one_size(g):
    """SinkGD's step: rows and columns brought to a root mean square of 1, in turns, in place."""
    for _ in range(PASSES):
        for dim in (1, 0):
            g.mul_(g.shape[dim] ** 0.5 / (g.norm(dim=dim, keepdim=True) + OPTIONS["eps"]))
    return g


def measure(make, shape, dtype, device, exact, theirs, repeats):
    """A row, and how far the weights have gone."""
    w = torch.nn.Parameter(start(shape, dtype, device))
    alone = _allocated(device)
    optimizer = make(w)
    for g in gradients(shape, dtype, device):
        w.grad = g
        optimizer.step()
    state = _allocated(device) - alone - g.nbytes
    way = w.detach().float() - start(shape, dtype, device).float()
    row = {"way_error": _apart(way, exact)}
    if theirs is not None:
        row["from_authors"] = _apart(way, theirs)
    if device == "cuda":
        row["state_bytes_a_weight"] = round(state / w.numel(), 4)
        before = _allocated(device)
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        row["scratch_tables"] = round((torch.cuda.max_memory_allocated() - before) / w.nbytes, 4)
        row["milliseconds"] = round(milliseconds(optimizer.step, repeats), 4)
    return row, way


def _allocated(device):
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _apart(a, b):
    return ((a - b).norm() / b.norm()).item()


def of_shape(shape, dtype, device, repeats):
    """Rows of all optimizers on a matrix of that shape; the authors' way is kept for ours of the same rule."""
    exact, theirs = {}, {}
    for name, (package, make, rule, dtypes) in OPTIMIZERS.items():
        if dtype not in dtypes:
            continue
        if rule not in exact:
            exact = {rule: exact_way(rule, shape, DTYPES[dtype], device)}  # of one rule at a time: they are large
        row = {"optimizer": name, "shape": shape, "dtype": dtype}
        try:
            row["package"] = package and f"{package} {version(package)}"
            found = in_this_process(measure, make, shape, DTYPES[dtype], device, exact[rule], theirs.get(rule), repeats)
        except (ImportError, PackageNotFoundError) as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        if isinstance(found, dict):
            yield row | found
            continue
        measured, way = found
        theirs = {rule: way} if package else theirs
        del way, found
        yield row | measured
        if device == "cuda":
            torch.cuda.empty_cache()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=at_least_one, default=20)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args(argv)
    device = "cpu" if args.smoke else "cuda"
    report = {"machine": machine(device) | {"steps": STEPS, "repeats": args.repeats, **OPTIONS}, "rows": []}
    for shape in TINY if args.smoke else SHAPES:
        for dtype in DTYPES:
            for row in of_shape(shape, dtype, device, args.repeats):
                report["rows"].append(row)
                write(args.out, report)
                said = {name: value for name, value in row.items() if name not in ("shape", "dtype", "optimizer")}
                print(f"{shape[0]:>7} x {shape[1]:<6}{dtype:9} {row['optimizer']:30} {said}", flush=True)


if __name__ == "__main__":
    main()
