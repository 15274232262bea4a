"""FlashAdamW beside the 8-bit AdamW of torchao and of bitsandbytes: 20 steps from equal weights by equal gradients.

    python -m venv /tmp/eight && /tmp/eight/bin/pip install torch torchao bitsandbytes numpy
    PYTHONPATH=. /tmp/eight/bin/python examples/benchmarks/eight_bit_agreement.py --out agreement.json

Neither library is a dependency of this project. A missing one leaves rows with an ``error``.

What can be compared. torchao and bitsandbytes have one format: blocks of 256, each with its largest magnitude, and
codes of one dynamic map. So their codes are compared one by one, but for those that both stand for zero. FlashAdamW has
another: groups of 32, codes on a companding curve. No code of one means anything in the other. So each is compared with
AdamW in float64: its decoded moments, and how far its weights have gone. There is no weight decay, since bitsandbytes
decays last on a GPU.
"""

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from benchmarking import SEED, in_this_process, machine, write
from torch import nn

from cuda_ref import FlashAdamW
from cuda_ref.optimizers.companded import decode_momentum, decode_second_moment

SHAPE = (128, 256)  # whole blocks of 256, and enough elements for both libraries to take 8 bits
STEPS, LR, BETAS, EPS = 20, 1e-3, (0.9, 0.999), 1e-8
STREAMS = ("dense", "dense, 1e-6 as large", "columns over four decades", "rows seen in a fifth of the steps")


def gradients_of(stream):
    """The gradients of all steps, float32."""
    random = np.random.RandomState(SEED)
    for _ in range(STEPS):
        g = random.normal(0, 1e-2, size=SHAPE)
        if stream == "dense, 1e-6 as large":
            g *= 1e-6
        elif stream == "columns over four decades":
            g *= 10.0 ** -(np.arange(SHAPE[1]) % 5)
        elif stream == "rows seen in a fifth of the steps":
            g *= random.uniform(size=(SHAPE[0], 1)) < 0.2
        yield torch.tensor(g, dtype=torch.float32)


def exact_run(stream):
    """AdamW in float64: how far the weights have gone, and both moments."""
    way, m, v = (np.zeros(SHAPE) for _ in range(3))
    for t, g in enumerate(gradients_of(stream), start=1):
        g = g.double().numpy()
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g**2
        way -= LR * (m / (1 - BETAS[0] ** t)) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
    return way, m, v


def flash(w, **options):
    return FlashAdamW([w], lr=LR, betas=BETAS, eps=EPS, **options)


def decoded_flash(state):
    m, v = (state["m"], state["m_scales"], SHAPE), (state["v"], state["v_scales"], SHAPE)
    return (decode_momentum(*m), decode_second_moment(*v)), None


def torchao_adamw(w):
    from torchao.optim import AdamW8bit

    torch.compiler.set_stance("force_eager")  # it compiles its step
    return AdamW8bit([w], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)


def decoded_torchao(state):
    moments = state["exp_avg"], state["exp_avg_sq"]
    return [moment.dequantize() for moment in moments], [moment.codes.reshape(SHAPE) for moment in moments]


def bitsandbytes_adamw(w):
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit([w], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, min_8bit_size=1)


def decoded_bitsandbytes(state):
    codes = state["state1"].reshape(SHAPE), state["state2"].reshape(SHAPE)
    moments = []
    for number, of_moment in enumerate(codes, start=1):
        values = state[f"qmap{number}"][of_moment.int()].reshape(-1, 256) * state[f"absmax{number}"][:, None]
        moments.append(values.reshape(SHAPE))
    return moments, codes


OPTIMIZERS = {
    "FlashAdamW": (flash, decoded_flash),
    "FlashAdamW, published format": (lambda w: flash(w, state_format="published"), decoded_flash),
    "torchao": (torchao_adamw, decoded_torchao),
    "bitsandbytes": (bitsandbytes_adamw, decoded_bitsandbytes),
}


def run(name, stream, device):
    """How far the weights have gone, the decoded moments, and the codes of those that share a format."""
    make, decoded = OPTIMIZERS[name]
    w = nn.Parameter(torch.zeros(SHAPE, device=device))
    optimizer = make(w)
    for g in gradients_of(stream):
        w.grad = g.to(device)
        optimizer.step()
    (m, v), codes = decoded(optimizer.state[w])
    moments = [moment.detach().double().cpu().numpy() for moment in (m, v)]
    return w.detach().double().cpu().numpy(), moments, codes and [code.cpu().numpy().astype(int) for code in codes]


def beside_exact(way, moments, exact):
    """A row: errors of the moments and of the way, over those in float64; the furthest way in learning rates."""
    exact_way, *exact_moments = exact
    row = {
        f"{name}_error": float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
        for name, found, wanted in zip("mv", moments, exact_moments, strict=True)
    }
    m, v = moments
    return row | {
        "v_at_zero_where_m_is_not": float(np.mean((v == 0) & (m != 0))),
        "way_error": float(np.linalg.norm(way - exact_way) / np.linalg.norm(exact_way)),
        "furthest_in_lr": float(np.abs(way).max() / LR),
        "furthest_exact_in_lr": float(np.abs(exact_way).max() / LR),
    }


def of_one_format(ours, theirs):
    """A row of two runs: codes that differ and do not both stand for zero, and how far all is apart."""
    row = {}
    for number, name in enumerate("mv"):
        (a, b), (codes, others) = ((run[part][number] for run in (ours, theirs)) for part in (1, 2))
        counts = (a != 0) | (b != 0)
        apart = np.abs(codes - others)[counts]
        row[f"{name}_codes_differ"] = float(np.mean(apart > 0))
        row[f"{name}_largest_difference"] = int(apart.max())
        row[f"{name}_least_codes"] = [int(codes[counts].min()), int(others[counts].min())]
        row[f"{name}_distance"] = float(np.linalg.norm(a - b) / np.linalg.norm(a))
    way, other = ours[0], theirs[0]
    return row | {"way_distance": float(np.linalg.norm(way - other) / np.linalg.norm(way))}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    libraries = {}
    for name in ("torchao", "bitsandbytes"):
        try:
            libraries[name] = version(name)
        except PackageNotFoundError:
            libraries[name] = None
    report = {**machine(args.device), "libraries": libraries, "steps": STEPS, "shape": SHAPE, "rows": []}
    for stream in STREAMS:
        exact, alike = exact_run(stream), []
        for name in OPTIMIZERS:
            row = {"stream": stream, "optimizer": name}
            if name in libraries and libraries[name] is None:
                row["error"] = f"{name} is not installed"
            else:
                found = in_this_process(run, name, stream, args.device)
                row |= found if isinstance(found, dict) else beside_exact(*found[:2], exact)
                if not isinstance(found, dict) and found[2]:
                    alike.append(found)
            report["rows"].append(row)
            print(row, flush=True)
        if len(alike) == 2:
            row = {"stream": stream, "optimizer": "torchao against bitsandbytes", **of_one_format(*alike)}
            report["rows"].append(row)
            print(row, flush=True)
        write(args.out, report)
    return int(any("error" in row for row in report["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
