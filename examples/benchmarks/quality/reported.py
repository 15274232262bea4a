"""What is in the JSON lines of ``results``: the tuning runs, the reported ones, and differences between them."""

import math
from dataclasses import dataclass
from statistics import mean, stdev

from plan import BASELINE, SETTINGS, TUNING_SEED, Run, tuned_rates
from run import loss_of
from table_rules import TABLE_RULES

__all__ = ["WORDS", "Reported", "Results", "against", "paired"]

# Quantiles of Student's t for a 95 % interval, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
WORDS = {name: words for name, (_, _, words) in TABLE_RULES.items()}
WORDS |= {
    "ember | adamw": "Ember on the embedding, AdamW on the head",
    "adamw | ember": "AdamW on the embedding, Ember on the head",
}


@dataclass(frozen=True)
class Reported:
    """The runs of one optimizer in one setting at its best rate, seed -> result, tuning seed left out."""

    rate: int | None  # None: the search was not finished, or there is nothing to tune
    by_seed: dict

    def losses(self):
        return [loss_of(result) for result in self.by_seed.values()]


class Results:
    """All results, by setting and optimizer."""

    def __init__(self, lines):
        self.by_run = {Run(**line["run"]).key(): line for line in lines}
        self.losses = {key: loss_of(line) for key, line in self.by_run.items()}
        self.settings = [name for name in SETTINGS if any(key[0] == name for key in self.by_run)]

    def reported(self, setting, optimizer):
        body, rate = self.rates(setting, optimizer)
        by_seed = {}
        for key, line in self.by_run.items():
            run = Run(*key)
            same = (run.setting, run.optimizer, run.body_rate, run.probe) == (setting, optimizer, body, False)
            same = same and run.body == BASELINE
            if same and run.seed != TUNING_SEED and ("|" in optimizer or run.rate == rate):
                by_seed[run.seed] = line
        return Reported(
            rate if optimizer in TABLE_RULES and optimizer != "frozen" else None, dict(sorted(by_seed.items()))
        )

    def rates(self, setting, optimizer):
        if "|" in optimizer:
            return tuned_rates(setting, BASELINE, self.losses)[0], None
        return tuned_rates(setting, optimizer, self.losses)

    def body(self, setting):
        """The body's rate; while it is being searched for, that of the best tuning run so far."""
        found = self.rates(setting, BASELINE)[0]
        if found is None:
            runs = (runs[0] for optimizer in TABLE_RULES if (runs := self._tuning_runs(setting, optimizer)))
            found = min(runs, key=lambda pair: pair[0])[1].body_rate
        return found

    def tuning(self, setting, optimizer, body=None):
        """rate -> validation loss of the tuning seed, at the body's best rate or another."""
        body = self.body(setting) if body is None else body
        runs = self._tuning_runs(setting, optimizer)
        return dict(sorted((run.rate, loss) for loss, run in runs if run.body_rate == body))

    def _tuning_runs(self, setting, optimizer):
        """(loss, run), the best first."""
        runs = ((loss, Run(*key)) for key, loss in self.losses.items() if key[:2] == (setting, optimizer))
        runs = ((loss, run) for loss, run in runs if run.body == BASELINE)
        return sorted(
            ((loss, run) for loss, run in runs if run.seed == TUNING_SEED and not run.probe),
            key=lambda pair: (pair[0], pair[1].rate),
        )

    def best_of(self, setting, family):
        """Of several rules, the one whose tuning run at its best rate is the best; None while there is none."""
        tuned = [(min(self.tuning(setting, rule).values()), rule) for rule in family
                 if self.reported(setting, rule).by_seed]  # fmt: skip
        return min(tuned)[1] if tuned else None

    def probe(self, setting, optimizer):
        runs = ((Run(*key), line) for key, line in self.by_run.items())
        found = [line["probe"] for run, line in runs if (run.setting, run.optimizer) == (setting, optimizer)
                 and run.probe and run.body == BASELINE]  # fmt: skip
        return found[-1] if found else None


def against(theirs: Reported, baseline: Reported):
    """Mean of the differences to the baseline over the seeds that both have, half its 95 % interval, and how many."""
    seeds = [seed for seed in theirs.by_seed if seed in baseline.by_seed]
    pairs = [loss_of(theirs.by_seed[seed]) - loss_of(baseline.by_seed[seed]) for seed in seeds]
    if not pairs or not all(map(math.isfinite, pairs)):
        return math.nan, math.nan, len(pairs)
    half = T95[len(pairs) - 1] * stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
    return mean(pairs), half, len(pairs)


def paired(ours: Reported, theirs: Reported, number_of):
    """As ``against``, of any number of a line."""
    return against(*(
        Reported(None, {seed: {"valid_loss": number_of(line)} for seed, line in runs.by_seed.items()})
        for runs in (ours, theirs)
    ))  # fmt: skip
