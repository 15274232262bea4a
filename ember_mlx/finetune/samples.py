"""``--sample-prompts``: the model's greedy answers at each validation, by which nothing of the run changes."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx_lm.cli_ui import rprint
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ember_mlx.finetune.lost_peers import PeerDeadline
from ember_mlx.finetune.options import Options
from ember_mlx.finetune.rows import REMEDY, fault_of
from ember_mlx.finetune.watchers import Watcher
from ember_mlx.shared.errors import InputError, did_you_mean_path, reason_of
from ember_mlx.token_tables import TokenTable

__all__ = ["Prompt", "Samples", "read_prompts"]

FORMATS = (".txt", ".jsonl")
KEYS = ("prompt", "messages", "text")  # the first that a row has
MOST_PROMPTS = 100
MOST_BYTES = 10**7
SHOWN = 100  # characters of a line on the terminal


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Args:
        where (str): Its place, for errors.
        asked (str or list): A text, or the turns of a chat.
        goes_on (bool): The text has no chat template around it: the answer goes on where it ends.
    """

    where: str
    asked: str | list[dict[str, Any]]
    goes_on: bool = False

    @property
    def text(self) -> str:
        """The text, or that of the last turn."""
        if isinstance(self.asked, str):
            return self.asked
        content = self.asked[-1].get("content")
        return content if isinstance(content, str) else json.dumps(content)

    def tokens(self, tokenizer: TokenizerWrapper) -> list[int]:
        """The tokens that ``ember-mlx generate`` gives the model: with the chat template, if it has one and should.

        Raises:
            InputError: for a chat without a template, and for what the template or the tokenizer refuses.
        """
        turns = [{"role": "user", "content": self.asked}] if isinstance(self.asked, str) else self.asked
        if turns is self.asked and not tokenizer.has_chat_template:
            raise InputError(f"{self.where}: messages need a chat template, which the model lacks: use prompts")
        try:
            if self.goes_on or not tokenizer.has_chat_template:
                return tokenizer.encode(self.asked)
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            return tokenizer.encode(text, add_special_tokens=False)
        # Whatever a tokenizer or a chat template has against it.
        except Exception as error:
            reason = reason_of(error)
            raise InputError(f"{self.where}: cannot be tokenized ({reason}): {REMEDY}") from error


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file: of a .txt one a line, of a .jsonl each line's "prompt", "messages" or "text".

    The last turn of a chat is left out where the assistant says it: it is what the model is asked for. A "text" goes on
    without a chat template, as rows of text are learned.

    Raises:
        InputError: for a file that cannot be read or holds anything else, with the line; for none, and for too many.
    """
    path, where = Path(path), f"--sample-prompts {path}"
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{where}: must be a .txt with a prompt a line, or a .jsonl")
    try:
        if path.is_file() and path.stat().st_size > MOST_BYTES:
            raise InputError(f"{where}: has more than {MOST_BYTES:,} bytes; give a few prompts")
        lines = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=None).readlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{where}: cannot be read ({getattr(error, 'strerror', None) or error}){did_you_mean_path(path)}"
        ) from error
    read = _of_json if path.suffix.lower() == ".jsonl" else Prompt
    places = [(f"{where} line {number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not 0 < len(places) <= MOST_PROMPTS:
        few = f"give 1 to {MOST_PROMPTS}, since each validation answers them all"
        raise InputError(f"{where}: has {len(places) or 'no'} prompts; {few}")
    return [read(*placed) for placed in places]


def _of_json(where, line):
    try:
        row = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where}: is not JSON ({error}); {REMEDY}") from error
    key = next((key for key in KEYS if isinstance(row, dict) and key in row), None)
    asked = row[key] if key else None
    if key != "messages" and isinstance(asked, str) and asked.strip():
        return Prompt(where, asked, goes_on=key == "text")
    if key != "messages" or not isinstance(asked, list) or not asked:
        raise InputError(
            f'{where}: must hold {{"prompt": "..."}}, {{"messages": [...]}} or {{"text": "..."}}; {REMEDY}'
        )
    if fault := fault_of({"messages": asked}, ("messages",), chat=True):
        raise InputError(f"{where} {fault}: {REMEDY}")
    turns = asked[:-1] if asked[-1]["role"] == "assistant" else asked
    if not turns:
        raise InputError(f"{where}: has an answer and no question; {REMEDY}")
    return Prompt(where, turns)


class Samples(Watcher):
    """Answers the prompts after each validation, prints the answers in short, and hands them on whole.

    Of several workers the first answers, and the others meet it after each prompt, so that none gives it up for lost.

    Args:
        args: The run's options.
        tokenizer: The run's.
        deadline (PeerDeadline): Of the workers, of whom the first alone needs the file; it hears of every meeting.

    ``listeners`` are called with the steps done and the answers: ``[{"prompt": ..., "answer": ...}, ...]``. ``taken``
    has them all, as ``{"step": ..., "samples": ...}``.

    Raises:
        InputError: on the first worker, for prompts that cannot be used; see :func:`read_prompts`.
    """

    def __init__(self, args: Options, tokenizer: TokenizerWrapper, deadline: PeerDeadline):
        self.args = args
        self.tokenizer = tokenizer
        self.workers = deadline.workers
        self.deadline = deadline
        self.listeners: list[Callable[[int, list[dict[str, str]]], None]] = []
        self.taken: list[dict[str, Any]] = []
        self.prompts: list[tuple[str, list[int]]] = []
        for prompt in read_prompts(args.sample_prompts) if self.workers.leads else ():
            tokens = prompt.tokens(tokenizer)
            if not 0 < len(tokens) <= args.max_seq_length:
                limit = f"1 to --max-seq-length {args.max_seq_length}"
                raise InputError(f"{prompt.where}: has {len(tokens):,} tokens, and must have {limit}; {REMEDY}")
            self.prompts.append((prompt.text, tokens))

    def before_training(
        self, model: nn.Module, optimizer: Optimizer, tables: Sequence[TokenTable], rows: Sequence
    ) -> None:
        self.model = model
        self.number = self.workers.all_max(len(self.prompts))

    def after_validation(self, step: int, loss: float) -> None:
        answers = []
        for i in range(self.number):
            if self.workers.leads:
                text, tokens = self.prompts[i]
                answers.append({"prompt": text, "answer": self._answer(tokens)})
            stops = self.workers.all_max(int(self.deadline.signalled()))
            self.deadline.passed()
            if stops:
                return  # before the next step the run ends
        if not self.workers.leads:
            return
        done = step - 1
        self.taken.append({"step": done, "samples": answers})
        rprint(f"  answers after {done:,} {'step' if done == 1 else 'steps'}")
        for each in answers:
            rprint(f"    {_in_short(each['prompt'])}\n      > {_in_short(each['answer'])}")
        for listener in self.listeners:
            listener(done, answers)

    def _answer(self, prompt):
        """The likeliest tokens, one by one, with neither dropout nor a random number."""
        trains, tokens = self.model.training, []
        self.model.eval()
        try:
            for token, _ in generate_step(mx.array(prompt), self.model, max_tokens=self.args.sample_tokens):
                if token in self.tokenizer.eos_token_ids or self.deadline.signalled():
                    break
                tokens.append(token)
        finally:
            self.model.train(trains)
        # mlx-lm's streaming detokenizers fail on ids that a tokenizer lacks; a model in training may write them.
        return self.tokenizer.decode(tokens)


def _in_short(text):
    """In one line, and harmless to a terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}..."
