"""What is to be run, in which order: worked out from the results that are there, so that it can stop at any moment.

For every setting the body's learning rate is tuned first, with AdamW on everything at that one rate. Then every table
optimizer gets the same treatment: half decades around a first guess, on and on until the best has a worse one on either
side, with seed 0; then the best rate with other seeds. A seed is the weights to start from and the order of the data,
the same for all optimizers, so that their runs can be compared in pairs.
"""

import math
from dataclasses import asdict, dataclass

from llama import Shape
from table_rules import TABLE_RULES

__all__ = ["PHASES", "SETTINGS", "Phase", "Run", "Setting", "best_rate", "tuned_rates", "wanted"]

TUNING_SEED = 0
MOST_RATES = 12  # an optimizer that is best when it does next to nothing would go on for ever


@dataclass(frozen=True)
class Setting:
    """One task. ``start`` is None for fresh weights, or what is fine-tuned: the name of a setting or of a folder."""

    shape: Shape
    data: str  # NAME_train.u16 and NAME_valid.u16 in the data folder
    batch: int  # sequences a step
    length: int  # tokens a sequence
    steps: int
    warmup: int
    body_guess: int  # the body's learning rate to try first, as a power of sqrt(10)
    start: str | None = None
    weight_decay: float = 0.1


@dataclass(frozen=True)
class Run:
    """One training. Learning rates are powers of sqrt(10): -4 is 0.01, -5 is 0.0032."""

    setting: str
    optimizer: str  # of the tables, or "A | B": A on the embedding, B on the head
    rate: int  # of the tables; of the embedding
    body_rate: int
    seed: int
    head_rate: int | None = None  # where it differs
    probe: bool = False  # also measure the steps of rows by the time since they were last seen

    def key(self):
        return tuple(asdict(self).values())


@dataclass(frozen=True)
class Phase:
    """Settings and optimizers of about the same importance, and the seeds of the reported runs."""

    settings: tuple[str, ...]
    optimizers: tuple[str, ...]
    seeds: tuple[int, ...] = (1, 2, 3)
    apart: bool = False  # also Ember and AdamW on one table each
    probes: tuple[str, ...] = ()  # optimizers that are run once more, with the probe


def _pretraining(tied, batch):
    shape = Shape(vocabulary=32768, width=384, layers=6, heads=6, hidden=1024, tied=tied)
    return Setting(shape, "text", batch=batch, length=256, steps=2000, warmup=100, body_guess=-5)


def _finetuning(data, steps, shape=None, start="untied-16k"):
    shape = shape or _pretraining(False, 64).shape
    # weight decay 0: a short run from good weights
    return Setting(shape, data, 8, 256, steps, warmup=steps // 10, body_guess=-7, start=start, weight_decay=0.0)


SMOLLM2 = Shape(49152, 576, 30, 9, 1536, tied=True, key_value_heads=3, rope_base=100_000.0)
SETTINGS = {
    "untied-4k": _pretraining(tied=False, batch=16),
    "tied-4k": _pretraining(tied=True, batch=16),
    "untied-16k": _pretraining(tied=False, batch=64),
    "tied-16k": _pretraining(tied=True, batch=64),
    "own-wikisql": _finetuning("wikisql", 100),
    "own-shakespeare": _finetuning("shakespeare", 400),
    "own-rasbt": _finetuning("rasbt", 50),
    "smollm2-wikisql": _finetuning("smollm2_wikisql", 100, SMOLLM2, "smollm2"),
    "smollm2-shakespeare": _finetuning("smollm2_shakespeare", 400, SMOLLM2, "smollm2"),
    "smollm2-rasbt": _finetuning("smollm2_rasbt", 50, SMOLLM2, "smollm2"),
}
RIVALS = ("ember", "adamw", "adafactor", "rows", "columns", "sgd", "frozen")
VARIANTS = ("ember-0.99", "ember-0.95", "ember-clip3", "ember-clip1", "ember-growing", "ember-tableclip", "adamw-0.999")
MORE_VARIANTS = (
    "ember-0.9999", "ember-0.99-clip3", "ember-growing-clip3", "adamw-b1=0",
    "ember-bf16", "ember-bf16-stochastic", "adamw-bf16",
)  # fmt: skip
PROBES = ("ember", "adamw", "adafactor", "ember-clip3")
OWN = ("own-wikisql", "own-shakespeare", "own-rasbt")
LARGE = ("smollm2-wikisql", "smollm2-shakespeare", "smollm2-rasbt")
IN_BF16 = ("ember", "adamw", "ember-bf16", "ember-bf16-stochastic", "adamw-bf16")
PHASES = {
    "rivals": [Phase(("untied-4k", "tied-4k"), RIVALS), Phase(("untied-16k", "tied-16k"), RIVALS[:3])],
    "variants": [Phase(("untied-4k", "tied-4k"), VARIANTS, apart=True, probes=PROBES)],
    "finetune": [Phase(OWN, RIVALS)],
    "rivals-16k": [Phase(("untied-16k", "tied-16k"), RIVALS)],
    "more": [
        Phase(("untied-4k",), MORE_VARIANTS),
        Phase(("untied-16k", "tied-16k"), VARIANTS[:4]),
        Phase(("tied-4k",), MORE_VARIANTS),
        Phase(("untied-4k", "tied-4k"), RIVALS[:3], seeds=(1, 2, 3, 4, 5, 6)),
    ],
    "finetune-variants": [Phase(OWN, (*IN_BF16, *VARIANTS), apart=True)],
    "smollm2": [Phase(LARGE, RIVALS), Phase(LARGE, (*IN_BF16, *VARIANTS))],
}


def best_rate(losses, guess):
    """Where the search for a learning rate stands.

    Args:
        losses (dict): rate -> validation loss; infinity or NaN for a run that blew up.
        guess (int): The rate to begin with.

    Returns:
        The best rate, or None while there is none with a worse one on either side, and the rates to run next.
    """
    losses = {rate: loss if math.isfinite(loss) else math.inf for rate, loss in losses.items()}
    if not losses:
        return None, [guess, guess - 1, guess + 1]
    best = min(losses, key=losses.get)
    missing = [rate for rate in (best - 1, best + 1) if rate not in losses]
    if len(losses) >= MOST_RATES:
        missing = []
    return (None if missing else best), missing


def wanted(results, phases, settings=SETTINGS):
    """Runs that are not in ``results`` and can be done now, the most important first.

    Args:
        results (dict): ``Run.key()`` -> validation loss.
        phases (list of Phase): The most important first.
    """
    for phase in phases:
        reported = []
        for name in phase.settings:
            body, missing = _body_rate(name, results, settings[name].body_guess)
            yield from missing
            for optimizer in phase.optimizers if body is not None else ():
                rate, missing = _table_rate(name, optimizer, body, results)
                yield from missing
                if rate is not None:
                    reported += [Run(name, optimizer, rate, body, seed) for seed in phase.seeds]
                    reported += [Run(name, optimizer, rate, body, 1, probe=True)] * (optimizer in phase.probes)
            if body is not None and phase.apart and not settings[name].shape.tied:
                rates = [_table_rate(name, optimizer, body, results)[0] for optimizer in ("ember", "adamw")]
                if None not in rates:
                    ember, adamw = rates
                    reported += [Run(name, "ember | adamw", ember, body, s, head_rate=adamw) for s in phase.seeds]
                    reported += [Run(name, "adamw | ember", adamw, body, s, head_rate=ember) for s in phase.seeds]
        yield from (run for run in reported if run.key() not in results)


def tuned_rates(name, optimizer, results, settings=SETTINGS):
    """The best rates of the body and of the tables with that optimizer; None for what is not known yet."""
    body, _ = _body_rate(name, results, settings[name].body_guess)
    return body, None if body is None else _table_rate(name, optimizer, body, results)[0]


def _body_rate(name, results, guess):
    def run(rate):
        return Run(name, "adamw", rate, rate, TUNING_SEED)

    losses = {rate: results[run(rate).key()] for rate in range(-20, 10) if run(rate).key() in results}
    best, missing = best_rate(losses, guess)
    return best, [run(rate) for rate in missing]


def _table_rate(name, optimizer, body, results):
    if optimizer == "frozen":
        return 0, []

    def run(rate):
        return Run(name, optimizer, rate, body, TUNING_SEED)

    losses = {rate: results[run(rate).key()] for rate in range(-30, 30) if run(rate).key() in results}
    best, missing = best_rate(losses, TABLE_RULES[optimizer][1])
    return best, [run(rate) for rate in missing]
