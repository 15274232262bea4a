"""A plan in words, and as JSON."""

from dataclasses import dataclass

from ember_mlx.planner.architecture import Architecture
from ember_mlx.planner.builder import Run
from ember_mlx.planner.plan import Plan
from ember_mlx.shared.units import in_units

# By the last word of the flags.
LABELS = {"ember": "Ember", "adamw": "AdamW", "adafactor": "Adafactor", "none": "no training (frozen)"}
ROWS = ("weights", "gradients", "optimizer state", "activations", "logits", "scratch")


@dataclass(frozen=True)
class Report:
    """All that ``ember-mlx plan`` has to tell.

    Args:
        name (str): Of the model, as it was given.
        model, run, backend, planned: What was planned, and its plan.
        said (list[str]): Lines on what was supposed: how long rows are, and why.
        others (dict[str, Plan]): The alternatives, by their flags.
        changes (list[tuple[str, Plan]]): What would make it fit.
        memory (int): Bytes that there are.
        whose (str): Whose they are, in words that end a sentence's first half.
    """

    name: str
    model: Architecture
    run: Run
    backend: str
    planned: Plan
    said: list[str]
    others: dict[str, Plan]
    changes: list[tuple[str, Plan]]
    memory: int
    whose: str

    def to_text(self) -> str:
        model, run, planned = self.model, self.run, self.planned
        layers = f"{model.layers} layers" if model.layers else "its layers left out"
        kinds = "all weights" if run.fine_tune_type == "full" else f"{run.fine_tune_type} in {run.layers} layers"
        kinds = kinds if model.layers else "token tables alone"
        lines = [
            f"{self.name}: {model.model_type}, {layers}, {model.vocabulary:,} tokens",
            f"{kinds}, batches of {run.batch_size} x {run.length} tokens, on {self.backend}",
            *self.said,
            "",
            f"{'1 GB = 10^9 bytes':32}{'at most':>14}{'at the peak':>14}",
        ]
        whole = {"weights": planned.weights, "gradients": planned.gradients, "optimizer state": planned.optimizer_state}
        for role in ROWS:
            lines.append(_line(role, whole.get(role, planned.most[role]), planned.at_peak[role]))
            if role == "weights":
                lines.append(_line("  of which train", planned.trainable))
        lines += [
            _line("predicted peak", None, planned.peak),
            "At most: at any one moment of a step. At the peak: when all together are most"
            + (", which is in validation." if planned.is_evaluation else "."),
            "",
            f"{'with the token tables by':32}{'all state':>14}{'peak':>14}",
        ]
        for flags, other in self.others.items():
            lines.append(_line(LABELS[flags.split()[-1]], other.optimizer_state, other.peak))
        lines += ["", self._verdict()]
        lines += [_line(f"  {flags}", None, after.peak) for flags, after in self.changes]
        if self.changes and self.changes[-1][1].peak > self.memory:
            lines.append("With all of these it still does not fit: a smaller model, or a quantized one, is needed.")
        lines += [f"Note: {note}." for note in model.notes]
        return "\n".join(lines)

    def to_json(self) -> dict:
        return {
            "backend": self.backend,
            "memory": self.memory,
            "batch_size": self.run.batch_size,
            "length": self.run.length,
            "evaluation_length": self.run.evaluation_length or self.run.length,
            "supposed": self.said,
            "vocabulary": self.model.vocabulary,
            "fits": self.planned.peak <= self.memory,
            "planned": _plan_as_json(self.planned),
            "alternatives": {flags: _plan_as_json(other) for flags, other in self.others.items()},
            "changes": [{"flags": flags, "peak": after.peak} for flags, after in self.changes],
            "notes": self.model.notes,
        }

    def _verdict(self):
        said = f"{self.whose[0].upper()}{self.whose[1:]} {in_units(self.memory)}"
        if self.planned.peak <= self.memory:
            fits = "what is planned fits (see the note)" if self.model.notes else "it fits"
            return f"{said}: {fits}, with {in_units(self.memory - self.planned.peak)} to spare."
        if not self.changes:
            return f"{said}: it does not fit, and no change of flags makes it fit."
        return f"{said}: it does not fit. The cheapest changes, each on top of those before, and the new peak:"


def _line(label, *sizes):
    return f"{label:32}" + "".join(f" {'' if nbytes is None else in_units(nbytes):>13}" for nbytes in sizes)


def _plan_as_json(planned):
    return {
        "weights": planned.weights,
        "trainable": planned.trainable,
        "gradients": planned.gradients,
        "optimizer_state": planned.optimizer_state,
        "at_most": dict(planned.most),
        "at_peak": dict(planned.at_peak),
        "peak": planned.peak,
        "peak_in": "validation" if planned.is_evaluation else "training",
    }
