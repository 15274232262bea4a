"""A plan in words, and as JSON."""

from dataclasses import dataclass
from typing import Any

from ember_mlx.finetune.disk import DiskUse
from ember_mlx.finetune.options import Options
from ember_mlx.planner.architecture import Architecture
from ember_mlx.planner.graph import Run
from ember_mlx.planner.network import LINKS
from ember_mlx.planner.plan import Plan
from ember_mlx.planner.streaming_advice import Recommendation
from ember_mlx.shared.text_tables import text_table
from ember_mlx.shared.units import in_units

__all__ = ["Report"]

# By the last word of the flags.
LABELS = {"ember": "Ember", "adamw": "AdamW", "adafactor": "Adafactor", "none": "no training (frozen)"}
PHASES = {
    "forward": "forward",
    "loss": "the loss, and its gradient by the hidden states",
    "head": "the head's step",
    "layers": "a layer, backwards, and its step",
    "embedding": "the embedding's step",
}
TURNED_OFF = "--no-stream"
NUMBERS = {2: "16 bits", 4: "float32"}
ROWS = ("weights", "gradients", "optimizer state", "activations", "logits", "scratch")


@dataclass(frozen=True)
class Report:
    """All that ``ember-mlx plan`` reports.

    Args:
        options (Options): The run's, as they were given.
        model, run, backend, planned: What was planned, and its plan.
        assumptions (list[str]): Lines on what was assumed: how long rows are, and why.
        alternatives (dict[str, tuple[Run, Plan]]): Other optimizers on the tables, by the flags that ask for them.
        changes (list[tuple[str, Plan]]): What would make it fit.
        recommendations (list[Recommendation]): What saves memory and changes no result; beside changes none.
        steps (int): Of the run.
        disk (DiskUse): What it takes on the disk.
        link (str): Of several workers, one of :data:`ember_mlx.planner.network.LINKS`.
        memory (int, optional): Bytes that this run may take, if they are known.
        memory_source (str): Whose they are, as the subject and verb of a sentence: "this machine has"; or what to give.
    """

    options: Options
    model: Architecture
    run: Run
    backend: str
    planned: Plan
    assumptions: list[str]
    alternatives: dict[str, tuple[Run, Plan]]
    changes: list[tuple[str, Plan]]
    recommendations: list[Recommendation]
    steps: int
    disk: DiskUse
    link: str
    memory: int | None
    memory_source: str

    def to_text(self) -> str:
        """The plan for a reader, in lines."""
        model, run, planned = self.model, self.run, self.planned
        layers = f"{model.layers} layers" if model.layers else "its layers left out"
        kinds = "all weights" if run.fine_tune_type == "full" else f"{run.fine_tune_type} in {run.layers} layers"
        kinds = kinds if model.layers else "token tables alone"
        hosts = f" on each of {run.workers} hosts" if run.workers > 1 else ""
        sizes = []
        for role in ROWS:
            sizes.append((role, in_units(planned.most[role]), in_units(planned.at_peak[role])))
            if role == "weights":
                sizes.append(("  of which train", in_units(planned.trainable), ""))
        sizes.append(("predicted peak", "", in_units(planned.peak)))
        others = [
            (self._label(flags, other), in_units(other_plan.optimizer_state), in_units(other_plan.peak))
            for flags, (other, other_plan) in self.alternatives.items()
        ]
        return "\n".join(
            [
                f"{self.options.model}: {model.model_type}, {layers}, a vocabulary of {model.vocabulary:,} tokens",
                f"{kinds}, batches of {run.batch_size} x {run.length} tokens{hosts}, on {self.backend}",
                *self.assumptions,
                "",
                text_table(("1 GB = 10^9 bytes", "at most", "at the peak"), sizes, right=(1, 2)),
                "At most: at any one moment of a step; new weights exist beside the old ones for a while.",
                f"At the peak: when the sum is largest{', which is in validation' if planned.is_evaluation else ''}.",
                "",
                *self._phases(),
                text_table(("with the token tables by", "all optimizer state", "peak"), others, right=(1, 2)),
                "",
                *self._verdict(),
                *self._recommended(),
                *self._network(),
                f"Disk, of {self.steps:,} steps: at most {self.disk}.",
                *(f"Note: {note}." for note in self._notes()),
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
            "fits": None if self.memory is None else self.planned.peak <= self.memory,
            "planned": _plan_as_json(self.planned),
            "alternatives": {
                flags: _plan_as_json(other_plan) | {"stream": other.stream, "layers": other.layers}
                for flags, (other, other_plan) in self.alternatives.items()
            },
            "changes": [
                {"flags": flags, "peak": after.peak, "time": self._time(after)} for flags, after in self.changes
            ],
            "steps": self.steps,
            "disk": vars(self.disk) | {"final": self.disk.final},
            "stream": self.run.stream,
            "keep_inputs": self.run.keep_inputs,
            "recommendations": [vars(each) for each in self.recommendations],
            "network": self._network_as_json(),
            "notes": self._notes(),
        }

    def _label(self, flags, other):
        """What trains the tables, and what else is not as in the run that is planned."""
        label, run = LABELS[flags.split()[-1]], self.run
        if other.stream != run.stream:
            label += f", {'' if other.stream else 'not '}streamed"
        if other.layers != run.layers:
            label += f", {other.layers} layers"
        return label

    def _network(self):
        """Of several workers, what each sends."""
        traffic, steps = self.planned.traffic, self.run.micro_batches
        if traffic is None:
            return []
        parts = [f"{in_units(nbytes)} in {NUMBERS[width]}" for width, nbytes in sorted(traffic.payload.items())]
        rows = f" (at most {traffic.embedding_rows:,} rows of the embedding)" if traffic.embedding_rows else ""
        what = f"gradients of {' and '.join(parts)}{rows}" if parts else ""
        if traffic.around_tables:
            around = f"{in_units(traffic.around_tables)} around the sharded tables"
            what = f"{around} and {what}" if what else around
        every = "step" if steps == 1 else f"{steps} steps"
        return [
            f"Network: each of the {traffic.workers} hosts sends {in_units(traffic.sent)} every {every}, {what}: "
            f"{traffic.seconds(self.link):.2g} s over {self.link}, at {LINKS[self.link] / 1e9:g} GB/s."
        ]

    def _network_as_json(self):
        traffic = self.planned.traffic
        if traffic is None:
            return None
        every = {"steps": self.run.micro_batches, "sent": traffic.sent, "seconds": traffic.seconds(self.link)}
        payload = {NUMBERS[width]: nbytes for width, nbytes in traffic.payload.items()}
        around = {"around_tables": traffic.around_tables}
        return {"hosts": traffic.workers, "link": self.link, **every, "payload": payload, **around}

    def _phases(self):
        """Of a streamed step, what stands between steps, and the peak of each phase."""
        planned, rows = self.planned, []
        if not planned.phases:
            return []
        rows.append(("between steps: weights and state", in_units(planned.weights + planned.optimizer_state)))
        rows += [(PHASES[name], in_units(peak)) for name, peak in planned.phases.items()]
        rows.append(("validation, beside the step", in_units(planned.evaluation)))
        return [text_table(("streamed step, phase by phase", "peak"), rows, right=(1,)), ""]

    def _recommended(self):
        """The changes, where they make it fit; beside none what saves memory, or was turned off, as an alternative."""
        if self.changes and self._fits_in_the_end():
            flags = " ".join(flags for flags, _ in self.changes)
            return [f"Recommended: {flags}, with a peak of {in_units(self.changes[-1][1].peak)}."]
        begin = "Recommended" if self.options.stream is not False else f"Alternative to {TURNED_OFF}"
        lines = []
        for each in self.recommendations:
            on_top = " on top of that" if lines else ""
            lines.append(
                f"{begin}{on_top}: {each.flags}, the same training in {in_units(each.saves)} less: a peak of "
                f"{in_units(each.peak)}. By its operations a step takes about {each.time:.2f} times as long as without."
            )
        return lines

    def _notes(self):
        if not (self.run.stream and self.model.whole_head):
            return self.model.notes
        whole = f"the head of {self.model.model_type} cannot be cut: its logits and gradient, whole, are not planned"
        return [*self.model.notes, whole]

    def _verdict(self):
        source = f"{self.memory_source[0].upper()}{self.memory_source[1:]}"
        if self.memory is None:
            return [f"Whether it fits is not known. {source}."]
        has = f"{source} {in_units(self.memory)}"
        if self.planned.peak <= self.memory:
            fits = "what is planned fits (see the note)" if self._notes() else "it fits"
            return [f"{has}: {fits}, with {in_units(self.memory - self.planned.peak)} to spare."]
        if not self.changes:
            return [f"{has}: it does not fit, and no change of flags makes it fit."]
        lines = [f"{has}: it does not fit. The cheapest changes, each on top of those before:"]
        changes = [
            (f"  {self._change(flags)}", in_units(after.peak), f"{self._time(after):.2f} times")
            for flags, after in self.changes
        ]
        lines.append(text_table(("  change", "new peak", "time of a token"), changes, right=(1, 2)))
        few = any("--grad-accumulation-steps" in flags for flags, _ in self.changes)
        on_a_gpu = " On a GPU few short rows at a time take longer." if few else ""
        lines.append(f"Time: by operations alone, over the run as planned.{on_a_gpu}")
        if not self._fits_in_the_end():
            lines.append(f"With all of these it still does not fit: choose a smaller model{self._or_quantized()}.")
        return lines

    def _fits_in_the_end(self):
        return self.changes[-1][1].peak <= self.memory

    def _time(self, after):
        return after.operations / self.planned.operations

    def _or_quantized(self):
        if self.model.quantization:
            return ""
        return f", or add --quantize 4{' to lora' if self.run.fine_tune_type == 'full' else ''}"

    def _change(self, flags):
        return f"{flags} instead of {TURNED_OFF}" if self.options.stream is False and "--stream" in flags else flags


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
        "phases": planned.phases,
    }
