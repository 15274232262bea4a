"""The losses of a run: the first and the last of each kind, and the tokens trained on."""

import math

import mlx.core as mx
from mlx_lm.cli_ui import rprint
from mlx_lm.tuner.callbacks import TrainingCallback

from ember_mlx.finetune.best import Validations
from ember_mlx.finetune.options import Options
from ember_mlx.optimizers.guarded import GuardedOptimizer
from ember_mlx.optimizers.paired import PairedOptimizer
from ember_mlx.streaming.marks import target_mask

__all__ = ["LossHistory", "learned_tokens", "perplexity"]

LARGEST_EXPONENT = 690  # e^690 is 4e299: within what a float has, and a log may hold


class LossHistory:
    """Keeps the first and the last losses, adds the tables' learning rate, and hands the reports on to callbacks.

    Args:
        args: The run's options.
        callbacks (list): Of mlx-lm's kind; they hear of every report.
        optimizer: The run's.
        saved (dict, optional): What :meth:`to_json` gave, of a run that is resumed.
    """

    def __init__(
        self,
        args: Options,
        callbacks: list[TrainingCallback],
        optimizer: GuardedOptimizer | PairedOptimizer,
        saved: dict | None = None,
    ):
        self.args = args
        self.callbacks = callbacks
        self.optimizer = optimizer
        saved = saved or {"losses": {}, "trained_tokens": 0, "validations": None}
        self.losses = dict(saved["losses"])  # "train_loss" and "val_loss": [first, last]
        self.trained_tokens = saved["trained_tokens"]
        self._tokens_since = 0
        self.validations = Validations(args.patience, saved["validations"])

    def to_json(self) -> dict:
        """What a checkpoint keeps of it."""
        return {
            "losses": dict(self.losses),
            "trained_tokens": self.trained_tokens + self._tokens_since,
            "validations": self.validations.to_json(),
        }

    def draw(self, batch: tuple[mx.array, mx.array]) -> None:
        """Count the tokens of a batch that the loss learns from; the next report brings their sum over all workers."""
        self._tokens_since += sum(learned_tokens(batch))

    def on_train_loss_report(self, train_info: dict) -> None:
        """Keep the loss, and hand on the report; its tokens are those of the runs before, too."""
        # A step that was left out has a loss all the same, and one that stops the run is told between the steps.
        if math.isfinite(train_info["train_loss"]):
            self._keep("train_loss", train_info)
        self.trained_tokens, self._tokens_since = int(train_info["trained_tokens"]), 0
        if self.args.token_tables:
            train_info["table_learning_rate"] = self.optimizer.table_learning_rate.item()
        for callback in self.callbacks:
            callback.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: dict) -> None:
        """Keep the loss, or warn where it is not finite, and hand on the report with the perplexity."""
        val_info["perplexity"] = perplexity(val_info["val_loss"])
        if math.isfinite(val_info["val_loss"]):
            self._keep("val_loss", val_info)
        else:  # a failure of measuring: what is trained is judged by itself, step by step
            step, loss = val_info["iteration"], val_info["val_loss"]
            rprint(
                f"Warning: validation loss is {loss} at step {step}; training continues while its weights are finite"
            )
        for callback in self.callbacks:
            callback.on_val_loss_report(val_info)

    def _keep(self, name, info):
        self.losses[name] = [self.losses.get(name, [info[name]])[0], info[name]]


def perplexity(loss: float) -> float:
    """Of a mean loss in nats a token, e^loss: infinite from about 1e300 on."""
    return math.inf if loss > LARGEST_EXPONENT else math.exp(loss)


def learned_tokens(batch: tuple[mx.array, mx.array]) -> list[int]:
    """How many tokens of each row of a batch the loss learns from."""
    return target_mask(*batch).sum(axis=1).tolist()
