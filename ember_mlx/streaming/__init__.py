"""Training in little more memory than the weights: every weight is stepped inside the backward pass."""

from ember_mlx.streaming.step import StepResult, StreamedStep

__all__ = ["StepResult", "StreamedStep"]
