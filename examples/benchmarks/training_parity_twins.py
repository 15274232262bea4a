"""One training of one Llama in MLX, and the same in PyTorch; training_parity.py compares them."""

import math
import sys
import time
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import torch
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, load_tokenizer
from transformers import LlamaForCausalLM, get_cosine_schedule_with_warmup

import cuda_ref
import ember_mlx
from ember_mlx.demo.corpus import finetuning_pairs

BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass
class Run:
    """What one training left: a loss and two rates a step, and at the end every weight and (r, c) of every table."""

    losses: list
    rates: list  # (of the tables, of the body)
    weights: dict
    moments: dict
    seconds: float


def make_batches(args):
    """Token ids, (steps, batch, length + 1) int32: docstrings cut into rows, in a new order whenever all were seen."""
    tokenizer = load_tokenizer(args.model)
    texts = [f"{pair['prompt']}\n{pair['completion']}" for part in finetuning_pairs() for pair in part]
    stream = [id for text in texts for id in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    width = args.length + 1
    rows = np.array(stream[: len(stream) // width * width], np.int32).reshape(-1, width)
    needed, random = args.steps * args.batch_size, np.random.default_rng(args.seed)
    order = np.concatenate([random.permutation(len(rows)) for _ in range(-(-needed // len(rows)))])[:needed]
    return rows[order].reshape(args.steps, args.batch_size, width)


def load_both(args, inputs):
    """Both models, their weights as float32 NumPy arrays by name, and by how much their first logits differ."""
    mlx_model, _ = load_model(args.model)
    mlx_model.set_dtype(mx.float32)
    torch_model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.torch_device)
    start, other = mlx_weights(mlx_model), torch_weights(torch_model)
    if start.keys() != other.keys() or any(not np.array_equal(start[name], other[name]) for name in start):
        sys.exit(f"{args.model}: mlx-lm and transformers load different weights from it")
    logits = np.array(mlx_model(mx.array(inputs)))
    with torch.no_grad():
        theirs = torch_model(torch.from_numpy(inputs).long().to(args.torch_device)).logits.cpu().numpy()
    difference = float(np.abs(logits - theirs).max() / np.abs(theirs).max())
    if difference > 1e-4:
        sys.exit(f"{args.model}: the first logits differ by {difference:.1e} of the largest: not the same model")
    return mlx_model, torch_model, start, difference


def to_neighbouring_floats(weights, seed):
    """Every weight moved to the next float32, up or down at random: an error of one rounding."""
    random = np.random.default_rng(seed)
    infinity = np.float32(np.inf)
    return {
        name: np.nextafter(weight, random.choice([-infinity, infinity], weight.shape))
        for name, weight in weights.items()
    }


def cross_entropy(logits, targets):
    return nn.losses.cross_entropy(logits, targets, reduction="mean")


def cross_entropy_in_blocks(logits, targets, block=64):
    blocks = logits.reshape(*logits.shape[:-1], -1, math.gcd(block, logits.shape[-1]))
    total = mx.logsumexp(mx.logsumexp(blocks, axis=-1), axis=-1)
    return (total - mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)).mean()


class ExactlyCorrectedAdamW(optim.AdamW):
    """MLX's AdamW with a bias correction that loses no digits: its own 1 - 0.999^t is 1e-5 too small."""

    def apply_single(self, gradient, parameter, state):
        lr, (b1, b2), t = self.learning_rate, self.betas, self.step.astype(mx.float32)
        m = state["m"] = b1 * state["m"] + (1 - b1) * gradient
        v = state["v"] = b2 * state["v"] + (1 - b2) * mx.square(gradient)
        m_hat, v_hat = m / -mx.expm1(t * math.log(b1)), v / -mx.expm1(t * math.log(b2))
        return (1 - lr * self.weight_decay) * parameter - lr * m_hat / (mx.sqrt(v_hat) + self.eps)


def train_mlx(model, weights, batches, args, exact=False, bias_correction=True):
    model.load_weights([(name, mx.array(weight)) for name, weight in weights.items()])
    rates = [mlx_schedule(peak, args) for peak in (args.table_learning_rate, args.learning_rate)]
    tables = ember_mlx.Ember(rates[0], BETAS[1], EPS, args.weight_decay)
    # MLX leaves the bias correction of Adam out unless told; PyTorch has no choice.
    adamw = ExactlyCorrectedAdamW if exact else optim.AdamW
    rest = adamw(rates[1], BETAS, EPS, args.weight_decay, bias_correction=bias_correction)
    optimizer = ember_mlx.PairedOptimizer(model, tables, rest)
    state = [model.state, optimizer.state]

    def loss_of(model, batch):
        return (cross_entropy_in_blocks if exact else cross_entropy)(model(batch[:, :-1]), batch[:, 1:])

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch):
        loss, gradients = nn.value_and_grad(model, loss_of)(model, batch)
        optimizer.update(model, gradients)
        return loss

    losses, rates, begin = [], [], time.perf_counter()
    for batch in batches:
        loss = step(mx.array(batch))
        mx.eval(state, loss)
        losses.append(loss.item())
        rates.append((optimizer.table_learning_rate.item(), optimizer.learning_rate.item()))
    seconds = time.perf_counter() - begin
    paths = [table.path for table in ember_mlx.find_token_tables(model)]
    moments = {path: {name: np.array(tables.state[path][name]) for name in "rc"} for path in paths}
    return Run(losses, rates, mlx_weights(model), moments, seconds)


def train_torch(model, weights, batches, args, table_beta2=BETAS[1]):
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(weights[name]))
    common = {"eps": EPS, "weight_decay": args.weight_decay}
    ember = partial(cuda_ref.Ember, lr=args.table_learning_rate, beta2=table_beta2, **common)
    adamw = partial(torch.optim.AdamW, lr=args.learning_rate, betas=BETAS, **common)
    optimizer = cuda_ref.PairedOptimizer(model, tables=ember, rest=adamw)
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.warmup, args.steps)

    losses, rates, begin = [], [], time.perf_counter()
    for batch in torch.from_numpy(batches).long().to(args.torch_device):
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        rates.append([side.param_groups[0]["lr"] for side in (optimizer.tables, optimizer.rest)])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = time.perf_counter() - begin
    paths = [table.path for table in cuda_ref.find_token_tables(model)]
    moments = {path: {name: optimizer.state[parameters[path]][name].cpu().numpy() for name in "rc"} for path in paths}
    return Run(losses, rates, torch_weights(model), moments, seconds)


def mlx_schedule(peak, args):
    """What get_cosine_schedule_with_warmup of transformers does: from 0 up, then a cosine down to 0."""
    warmup = optim.linear_schedule(0.0, peak, args.warmup)
    return optim.join_schedules([warmup, optim.cosine_decay(peak, args.steps - args.warmup)], [args.warmup])


def mlx_weights(model):
    return {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}


def torch_weights(model):
    return {name: weight.detach().cpu().numpy().copy() for name, weight in model.named_parameters()}
