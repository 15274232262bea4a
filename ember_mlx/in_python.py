"""``ember_mlx.train``: what ``ember-mlx train`` does, called from Python or a notebook."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.cli_ui import make_console
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.callbacks import TrainingCallback

from ember_mlx.finetune import summary
from ember_mlx.finetune.as_given import naming_as_given
from ember_mlx.finetune.given import Given
from ember_mlx.finetune.keywords import naming_keywords, options_of
from ember_mlx.finetune.lost_peers import PeerDeadline, reporting_lost_peers
from ember_mlx.finetune.options import Options
from ember_mlx.finetune.resume import rates_as_before
from ember_mlx.finetune.run import run_with
from ember_mlx.finetune.watchers import Watcher
from ember_mlx.finetune.workers import Workers
from ember_mlx.planner.inputs import refuse_misfits
from ember_mlx.planner.savings import with_savings
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.replacing import replaced

__all__ = ["Result", "train"]

Rows = Sequence[dict[str, Any]]
IN_MEMORY = "rows in memory"  # what the records of a run have for --data


@dataclass(frozen=True, kw_only=True)
class Result(summary.Result):
    """What came of :func:`train`.

    Attributes:
        loss_name: What ``loss_before`` and ``loss_after`` are of: "Validation loss" or "Training loss".
        loss_before: Before the first step, in nats a token; without validation rows, of the first report. None where
            the first report is the last.
        loss_after: After the last step, on the same batches; without validation rows, of the last report.
        peak_memory: Bytes, the most that MLX held while it trained; None where no step was left to take.
        trained: What trained, by which optimizer, with its state in bytes: a line for each table, one for the rest.
        files: The adapter's, in ``adapter_path``.
        train_losses: Steps done -> mean training loss since the report before, in nats a token.
        valid_losses: Steps done -> validation loss then. Each validation draws its own batches, if not all are used.
        options: All options of the run, frozen; the defaults are filled in.
        model: Trained, in eval mode, with its LoRA layers, for ``mlx_lm.generate``; see :func:`train` for the prompt.
        tokenizer: Its tokenizer, with the tokens that the run added.
    """

    train_losses: dict[int, float]
    valid_losses: dict[int, float]
    options: Options = field(repr=False)
    model: nn.Module = field(repr=False)
    tokenizer: TokenizerWrapper = field(repr=False)


def train(
    model: str | Path | tuple[nn.Module, TokenizerWrapper],
    data: str | Path | Rows | tuple[Rows, Rows] | None = None,
    *,
    quiet: bool = False,
    callbacks: Sequence[TrainingCallback] = (),
    watchers: Sequence[Watcher] = (),
    **options: Any,
) -> Result:
    """Fine-tune ``model``, its token tables included: what ``ember-mlx train`` does, to the same bits.

    ::

        result = ember_mlx.train("Qwen/Qwen3-0.6B", data="questions.csv", iters=200, adapter_path="adapters")
        print(result.loss_before, result.loss_after)
        chat = [{"role": "user", "content": "Hello"}]  # trained through the chat template, asked through it
        prompt = result.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        print(mlx_lm.generate(result.model, result.tokenizer, prompt))

    It saves an adapter and checkpoints to ``adapter_path`` (default: ./adapters), as the command does, and refuses a
    folder that holds another run unless ``overwrite=True``. In the main thread, Ctrl-C (in a notebook, the kernel's
    stop button) ends it between two steps, with a checkpoint; ``resume=True`` goes on. In other threads no signal is
    handled.

    Nothing is left behind in the process: memory limits, NumPy's and MLX's random states, signal handlers and
    mlx-lm's layers are as before. Its random numbers come from ``seed``. MLX's record of the peak memory starts anew.

    Args:
        model: A folder, a name on the Hugging Face hub, or what ``mlx_lm.load`` or ``ember_mlx.load`` returned. A
            loaded model is trained in place; it must have no adapter, and its folder must still be there for
            ``add_tokens``.
        data: What ``--data`` takes: a folder, a file or a name on the hub. Or a list of rows, such as
            ``{"prompt": "...", "completion": "..."}``, of which a part is split off for validation; or a pair of
            lists, to train and to validate on. May be in the file of ``config`` instead.
        quiet: Print nothing, warnings included. Standard output is then silent in all threads.
        callbacks: Of mlx-lm's kind; they hear of every report.
        watchers: They look on between the steps: see :class:`ember_mlx.finetune.watchers.Watcher`.
        options: Those of ``ember-mlx train --help``, with ``_`` for ``-``, switches as True or False; and those of
            the YAML file (``lora_parameters``, ``lr_schedule``, ``optimizer_config``). ``config`` names such a file,
            a recipe too. None stands for the default.

    Raises:
        InputError: (a ``ValueError``) for anything that cannot be used, in one line that names the keyword.
        Interrupted: (a ``KeyboardInterrupt``) once a stopped run is saved.
        SystemExit, PeerLost: with several workers, as :func:`ember_mlx.finetune.run.run` says.
    """
    with ExitStack() as stack:
        # In a notebook rich makes an output of each line, which cannot be redirected, and asks for ipywidgets.
        stack.enter_context(replaced(make_console(), "is_jupyter", False))
        if quiet:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        stack.enter_context(naming_keywords())
        given, named = _given(model, data)
        args, asked = options_of({"train": True} | options | named)
        stack.enter_context(naming_as_given(args.given))
        if not args.train:
            raise InputError("train: False would not train; leave it out, or use `ember-mlx train --test`")
        stack.enter_context(_random_states_kept())
        workers = Workers.join()
        if given.loaded is None and workers.size == 1:
            refuse_misfits(args)
        with reporting_lost_peers(workers), PeerDeadline(workers, args.peer_timeout):
            args = rates_as_before(args, asked, workers)
        args = with_savings(args, asked)
        history = _History()
        result, trained, tokenizer = run_with(given, args, [*callbacks, history], watchers)
    trained.eval()
    return Result(
        **vars(result),
        train_losses=history.train,
        valid_losses=history.valid,
        options=args,
        model=trained,
        tokenizer=tokenizer,
    )


class _History(TrainingCallback):
    """Keeps all losses, by the steps done."""

    def __init__(self):
        self.train, self.valid = {}, {}

    def on_train_loss_report(self, train_info):
        self.train[train_info["iteration"]] = train_info["train_loss"]

    def on_val_loss_report(self, val_info):
        self.valid[val_info["iteration"]] = val_info["val_loss"]


def _given(model, data):
    """What is in memory, and the options that name the rest."""
    named, loaded, rows = {}, None, None
    if isinstance(model, tuple | list):
        loaded, named["model"] = _loaded(model)
    elif isinstance(model, str | os.PathLike):
        named["model"] = model
    else:
        raise InputError(f"model: {type(model).__name__}: give a folder, a hub name, or (model, tokenizer) as loaded")
    if isinstance(data, tuple | list):
        rows, named["data"] = _rows(data), IN_MEMORY
    elif data is None or isinstance(data, str | os.PathLike):
        named["data"] = data
    else:
        raise InputError(f"data: {type(data).__name__}: give a path, a list of rows, or a (train, valid) pair of lists")
    return Given(loaded, rows), named


def _loaded(model):
    """The model, its tokenizer and its config, and where it was loaded from."""
    of_kinds = len(model) in (2, 3) and isinstance(model[0], nn.Module) and isinstance(model[1], TokenizerWrapper)
    if not of_kinds:
        kinds = ", ".join(type(each).__name__ for each in model)
        raise InputError(f"model: ({kinds}): give (model, tokenizer) as mlx_lm.load or ember_mlx.load returns them")
    network, tokenizer, *configs = model
    if any(hasattr(module, "lora_a") for _, module in network.named_modules()):
        raise InputError("model: it has an adapter already, as after an earlier train: load it anew, or give its path")
    name = str(tokenizer.name_or_path)
    path = Path(name) / "config.json"
    config = configs[0] if configs else json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return (network, tokenizer, config), name


def _rows(data):
    if data and all(isinstance(part, list | tuple) for part in data):
        if len(data) != 2:
            raise InputError(f"data: {len(data)} lists: give one list of rows, or a (train, valid) pair of lists")
        train_rows, valid_rows = data
    else:
        train_rows, valid_rows = data, ()
    if not train_rows:
        raise InputError("data: no rows to train on: give at least batch_size of them")
    return {"train": train_rows, "valid": valid_rows}


@contextmanager
def _random_states_kept() -> Iterator[None]:
    of_numpy, (high, low) = np.random.get_state(), mx.random.state[0].tolist()
    try:
        yield
    finally:
        np.random.set_state(of_numpy)
        mx.random.seed(high << 32 | low)  # the seed is the state: its two halves
