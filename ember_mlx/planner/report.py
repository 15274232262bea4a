"""A plan in words, and as JSON."""

from dataclasses import dataclass
from typing import Any

from ember_mlx.planner.architecture import Architecture
from ember_mlx.planner.graph import Run
from ember_mlx.planner.plan import Plan
from ember_mlx.shared.text_tables import text_table
from ember_mlx.shared.units import in_units

__all__ = ["Report"]

# By the last word of the flags.
LABELS = {"ember": "Ember", "adamw": "AdamW", "adafactor": "Adafactor", "none": "no training (frozen)"}
ROWS = ("weights", "gradients", "optimizer state", "activations", "logits", "scratch")


@dataclass(frozen=True)
class Report:
    """All that ``ember-mlx plan`` reports.

    Args:
        name (str): Of the model, as it was given.
        model, run, backend, planned: What was planned, and its plan.
        assumptions (list[str]): Lines on what was assumed: how long rows are, and why.
        alternatives (dict[str, Plan]): Other optimizers on the tables, by the flags that ask for them.
        changes (list[tuple[str, Plan]]): What would make it fit.
        memory (int): Bytes that this run may take.
        memory_source (str): Whose they are, as the subject and verb of a sentence: "this machine has".
    """

    name: str
    model: Architecture
    run: Run
    backend: str
    planned: Plan
    assumptions: list[str]
    alternatives: dict[str, Plan]
    changes: list[tuple[str, Plan]]
    memory: int
    memory_source: str

    def to_text(self) -> str:
        """The plan for a reader, in lines."""
        model, run, planned = self.model, self.run, self.planned
        layers = f"{model.layers} layers" if model.layers else "its layers left out"
        kinds = "all weights" if run.fine_tune_type == "full" else f"{run.fine_tune_type} in {run.layers} layers"
        kinds = kinds if model.layers else "token tables alone"
        sizes = []
        for role in ROWS:
            sizes.append((role, in_units(planned.most[role]), in_units(planned.at_peak[role])))
            if role == "weights":
                sizes.append(("  of which train", in_units(planned.trainable), ""))
        sizes.append(("predicted peak", "", in_units(planned.peak)))
        others = [
            (LABELS[flags.split()[-1]], in_units(other.optimizer_state), in_units(other.peak))
            for flags, other in self.alternatives.items()
        ]
        return "\n".join(
            [
                f"{self.name}: {model.model_type}, {layers}, {model.vocabulary:,} tokens",
                f"{kinds}, batches of {run.batch_size} x {run.length} tokens, on {self.backend}",
                *self.assumptions,
                "",
                text_table(("1 GB = 10^9 bytes", "at most", "at the peak"), sizes, right=(1, 2)),
                "At most: at any one moment of a step; new weights exist beside the old ones for a while.",
                f"At the peak: when the sum is largest{', which is in validation' if planned.is_evaluation else ''}.",
                "",
                text_table(("with the token tables by", "all optimizer state", "peak"), others, right=(1, 2)),
                "",
                *self._verdict(),
                *(f"Note: {note}." for note in model.notes),
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """The plan for a program: bytes, by the names of :class:`Plan`."""
        return {
            "backend": self.backend,
            "memory": self.memory,
            "batch_size": self.run.batch_size,
            "length": self.run.length,
            "evaluation_length": self.run.evaluation_length or self.run.length,
            "supposed": self.assumptions,
            "vocabulary": self.model.vocabulary,
            "fits": self.planned.peak <= self.memory,
            "planned": _plan_as_json(self.planned),
            "alternatives": {flags: _plan_as_json(other) for flags, other in self.alternatives.items()},
            "changes": [{"flags": flags, "peak": after.peak} for flags, after in self.changes],
            "notes": self.model.notes,
        }

    def _verdict(self):
        has = f"{self.memory_source[0].upper()}{self.memory_source[1:]} {in_units(self.memory)}"
        if self.planned.peak <= self.memory:
            fits = "what is planned fits (see the note)" if self.model.notes else "it fits"
            return [f"{has}: {fits}, with {in_units(self.memory - self.planned.peak)} to spare."]
        if not self.changes:
            return [f"{has}: it does not fit, and no change of flags makes it fit."]
        lines = [f"{has}: it does not fit. The cheapest changes, each on top of those before, and the new peak:"]
        changes = [(f"  {flags}", in_units(after.peak)) for flags, after in self.changes]
        lines.append(text_table(("  change", "new peak"), changes, right=(1,)))
        if self.changes[-1][1].peak > self.memory:
            lines.append("With all of these it still does not fit: choose a smaller model, or a quantized one.")
        return lines


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
