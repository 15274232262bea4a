"""One training of the quality benchmark. On a GPU a step, from the batch to the weights, is one CUDA graph.

The weights are float32 (tables of "-bf16" runs: bfloat16) and the matrix products bfloat16 (autocast). Everything a
step needs lies on the GPU before the first: token ids, the order of the data, the schedule of the learning rates. So
2,000 steps are 2,000 replays, and nothing is read back until the end. Sums of the embedding's gradient are atomic:
two runs of one seed differ in the last bits.
"""

import gc
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
from body_rules import BODY_RULES, make_body, restart
from llama import Llama, mean_loss
from plan import Setting
from table_rules import make

__all__ = ["Tokens", "Trainer"]

LARGEST_NORM = 1.0  # of the body's gradient; the tables' is left alone
AGES = 12  # bins of the probe: 1, 2-3, 4-7, ... steps since a row was last seen, and never before
WINDOW = 20  # steps whose mean loss is one number in the results
DECILES = 10


@dataclass(frozen=True)
class Tokens:
    """Token ids of a data set on the device, and in which decile of the vocabulary by training frequency each lies."""

    train: torch.Tensor
    valid: torch.Tensor
    decile: torch.Tensor  # (V,), 0 the most frequent tenth of the tokens

    @classmethod
    def read(cls, folder: Path, name: str, vocabulary: int, device):
        train, valid = (np.fromfile(folder / f"{name}_{part}.u16", np.uint16) for part in ("train", "valid"))
        counts = np.bincount(train, minlength=vocabulary)
        decile = np.empty(vocabulary, np.int64)
        decile[np.argsort(-counts, kind="stable")] = np.arange(vocabulary) * DECILES // vocabulary
        return cls(*(torch.from_numpy(ids.astype(np.int32)).to(device) for ids in (train, valid, decile)))


class Trainer:
    """Trains runs one after the other on one device.

    Models by shape, data, weights to fine-tune and compiled code are kept there in between.
    """

    def __init__(self, device, data: Path, bases: Path, graphs=True):
        self.device, self.data, self.bases = torch.device(device), data, bases
        self.on_gpu = self.device.type == "cuda"
        self.graphs = graphs and self.on_gpu
        self._models, self._tokens, self._starts = {}, {}, {}
        if self.on_gpu:
            torch.cuda.set_device(self.device)
            torch._dynamo.config.recompile_limit = 64  # one set of code for every shape
        self.compiled_loss = torch.compile(mean_loss, dynamic=False) if self.on_gpu else mean_loss

    def train(self, run, setting: Setting, keep: Path | None = None):
        """Train one run; its result as JSON has it. ``keep`` is where the weights are saved to."""
        start = time.perf_counter()
        model, tokens = self._prepare(run, setting)
        losses, probe = self._steps(run, setting, model, tokens)
        if self.on_gpu:
            torch.cuda.synchronize()
        trained = time.perf_counter()
        valid = self._validate(setting, model, tokens)
        others = {name: self._validate(setting, model, self._tokens_of(name, setting))["valid_loss"]
                  for name in setting.others}  # fmt: skip
        if keep:
            torch.save(model.state_dict(), keep.with_suffix(".part"))
            keep.with_suffix(".part").rename(keep)
        gc.collect()  # the graph holds its memory until then
        windows = losses[: len(losses) // WINDOW * WINDOW].view(-1, WINDOW).mean(1)
        return {
            **valid,
            "other_losses": others,
            "losses": [round(loss, 4) for loss in windows.tolist()],
            "probe": probe,
            "seconds": round(time.perf_counter() - start, 2),
            "seconds_training": round(trained - start, 2),
        }

    def _prepare(self, run, setting):
        key = setting.shape
        if key not in self._models:
            with torch.device(self.device):
                self._models[key] = Llama(setting.shape)
            if self.on_gpu:
                for layer in self._models[key].model.layers:
                    layer.compile(dynamic=False)
        model = self._models[key]
        in_bf16 = "-bf16" in run.optimizer
        for table in model.tables.values():
            table.data = table.data.to(torch.bfloat16 if in_bf16 else torch.float32)
        if setting.start is None:
            model.initialize(run.seed)
        else:
            if setting.start not in self._starts:
                path = self.bases / f"{setting.start}.pt"
                self._starts[setting.start] = torch.load(path, map_location=self.device, weights_only=True)
            model.load(self._starts[setting.start], run.seed)
        return model, self._tokens_of(setting.data, setting)

    def _tokens_of(self, name, setting):
        if name not in self._tokens:
            self._tokens[name] = Tokens.read(self.data, name, setting.shape.vocabulary, self.device)
        return self._tokens[name]

    def _steps(self, run, setting, model, tokens):
        device, shape = self.device, (setting.steps, setting.batch)
        starts = torch.from_numpy(order(len(tokens.train), setting, run.seed)).to(device).view(shape)
        within = torch.arange(setting.length + 1, device=device)
        multiplier = torch.tensor([schedule(setting, i) for i in range(setting.steps)], device=device)
        losses = torch.zeros(setting.steps, device=device)
        i = torch.zeros((), dtype=torch.int64, device=device)

        rates, optimizers = self._optimizers(run, setting, model)
        body = list(model.body().values())
        probes = {}
        if run.probe:
            tables = zip(model.tables.items(), rates[1:], strict=False)
            probes = {name: Probe(table, rate) for (name, table), (_, rate) in tables}

        def step():
            here = i.view(1)
            window = tokens.train[starts[here].view(-1, 1) + within].long()
            inputs, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
            for base, rate in rates:
                rate.copy_((base * multiplier[here]).view(()))
            with torch.autocast(device.type, torch.bfloat16, enabled=self.on_gpu):
                head = list(model.tables.values())[-1]
                loss = self.compiled_loss(model(inputs), head, targets)
            loss.backward()
            if BODY_RULES[run.body].clipped:
                torch.nn.utils.clip_grad_norm_(body, LARGEST_NORM, foreach=True)
            for probe in probes.values():
                probe.before()
            for optimizer in optimizers:
                optimizer.step()
            for name, probe in probes.items():
                seen = inputs if name == "embedding" else targets
                probe.after(i, torch.cat((inputs, targets)) if setting.shape.tied else seen)
            losses[here] = loss.detach()
            i.add_(1)

        replay = self._capture(step, model, optimizers, (i, *(t for p in probes.values() for t in p.state)))
        for _ in range(setting.steps):
            replay()
        model.zero_grad(set_to_none=True)
        return losses.cpu(), {name: probe.result() for name, probe in probes.items()} or None

    def _optimizers(self, run, setting, model):
        """(rate at its peak, the rate as a tensor) of body, embedding and head, and the optimizers."""
        names = [name.strip() for name in run.optimizer.split("|")]
        peaks = [run.body_rate, run.rate, run.rate if run.head_rate is None else run.head_rate]
        rates = [(10 ** (peak / 2), torch.zeros((), device=self.device)) for peak in peaks]
        optimizers = [make_body(run.body, model, rates[0][1], setting.weight_decay)]
        for table, name, (_, rate) in zip(model.tables.values(), [names[0], names[-1]], rates[1:], strict=False):
            optimizers.append(make(name, [table], rate))
        return rates, [optimizer for optimizer in optimizers if optimizer is not None]

    def _capture(self, step, model, optimizers, counters):
        """The step as a CUDA graph, and everything as it was before; on a CPU the step with the gradients cleared."""
        if not self.graphs:

            def plain():
                model.zero_grad(set_to_none=True)
                step()

            return plain
        trained = [p for p in model.parameters() if p.requires_grad]
        weights = [p.detach().clone() for p in trained]
        before = [counter.clone() for counter in counters]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and makes the optimizers' state
                model.zero_grad(set_to_none=True)
                step()
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        with torch.no_grad():
            for p, weight in zip(trained, weights, strict=True):
                p.copy_(weight)
            for counter, value in zip(counters, before, strict=True):
                counter.copy_(value)
            for optimizer in optimizers:
                restart(optimizer)
        return graph.replay

    @torch.no_grad()
    def _validate(self, setting, model, tokens):
        """Mean loss of the validation text, all of it, and sums and counts by the decile of the token to predict."""
        ids = tokens.valid.long()
        count = (len(ids) - 1) // setting.length
        inputs = ids[: count * setting.length].view(count, setting.length)
        targets = ids[1 : count * setting.length + 1].view(count, setting.length)
        head = list(model.tables.values())[-1]
        sums = torch.zeros(DECILES, dtype=torch.float64, device=self.device)
        counts = torch.zeros(DECILES, dtype=torch.int64, device=self.device)
        with torch.compiler.set_stance("force_eager"), torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.on_gpu
        ):  # fmt: skip
            for rows in torch.arange(count, device=self.device).split(32):
                losses = mean_loss(model(inputs[rows]), head, targets[rows], reduction="none")
                decile = tokens.decile[targets[rows].flatten()].long()
                sums.index_add_(0, decile, losses.double())
                counts.index_add_(0, decile, torch.ones_like(decile))
        sums, counts = sums.tolist(), counts.tolist()
        loss = sum(sums) / sum(counts)
        deciles = [total / max(1, count) for total, count in zip(sums, counts, strict=True)]
        return {
            "valid_loss": round(loss, 5) if math.isfinite(loss) else None,
            "decile_losses": [round(mean, 5) if math.isfinite(mean) else None for mean in deciles],
            "decile_counts": counts,
        }


class Probe:
    """Sizes of the steps of a table's rows, in learning rates, by the number of steps since the row was last seen."""

    def __init__(self, table, rate):
        self.table, self.rate = table, rate
        device, rows = table.device, table.shape[0]
        self.old = torch.empty_like(table)
        self.last = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.sums, self.counts, self.largest = (torch.zeros(AGES, device=device) for _ in range(3))
        self.state = (self.last, self.sums, self.counts, self.largest)

    @torch.no_grad()
    def before(self):
        self.old.copy_(self.table)

    @torch.no_grad()
    def after(self, i, ids):
        """Step ``i`` is done; ``ids`` are the tokens that were in it."""
        seen = torch.zeros(len(self.last), device=ids.device).index_fill_(0, ids.flatten(), 1.0)
        size = (self.table.detach() - self.old).float().square().mean(dim=1).sqrt() / self.rate
        age = (i - self.last).clamp(min=1)
        bins = age.float().log2().floor().long().clamp(max=AGES - 2)
        bins = torch.where(self.last < 0, AGES - 1, bins)
        self.sums.index_add_(0, bins, size * seen)
        self.counts.index_add_(0, bins, seen)
        self.largest.scatter_reduce_(0, bins, size * seen, "amax")
        self.last.copy_(torch.where(seen > 0, i, self.last))

    def result(self):
        mean = self.sums / self.counts.clamp(min=1)
        return {"mean": mean.tolist(), "largest": self.largest.tolist(), "count": self.counts.long().tolist()}


def order(tokens, setting, seed):
    """First tokens of the sequences of all steps: those of the text in random order, anew whenever all were seen."""
    firsts = np.arange((tokens - 1) // setting.length) * setting.length
    needed, random = setting.steps * setting.batch, np.random.default_rng(seed)
    return np.concatenate([random.permutation(firsts) for _ in range(-(-needed // len(firsts)))])[:needed]


def schedule(setting, i):
    """Of the learning rates, over their peak: up in a straight line, then half a cosine down to a tenth; or 1."""
    if setting.constant:
        return 1.0
    if i < setting.warmup:
        return (i + 1) / setting.warmup
    done = (i - setting.warmup) / max(1, setting.steps - setting.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
