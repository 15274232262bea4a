"""``ember-mlx plan``: the flags of ``train``, and what that run will take."""

import json
import math
import os
import sys
from dataclasses import replace

from ember_mlx.finetune import options
from ember_mlx.finetune.as_given import as_given, naming_as_given
from ember_mlx.finetune.best import keeps_best
from ember_mlx.finetune.build_optimizer import check_rates
from ember_mlx.finetune.choices import choose
from ember_mlx.finetune.data import may_validate
from ember_mlx.finetune.disk import disk_use, what_is_kept
from ember_mlx.finetune.workers import announced_workers
from ember_mlx.planner import advice, alternatives, machine, plan
from ember_mlx.planner.inputs import read_inputs, with_rows_of_data
from ember_mlx.planner.network import LINKS
from ember_mlx.planner.report import Report
from ember_mlx.planner.streaming_advice import recommendations
from ember_mlx.shared.command_line import describe
from ember_mlx.shared.errors import InputError

__all__ = ["main"]

EPILOG = """\
examples:
  ember-mlx plan --model Qwen/Qwen3-0.6B --quantize 4
      what a hub model takes with layers of 4 bits and rows of 512 tokens
  ember-mlx plan --model Qwen/Qwen3-0.6B --data my_data
      what the run of the same flags takes, and whether this machine has it
  ember-mlx plan --model Qwen/Qwen3-0.6B --data my_data --backend metal --memory 16GB
      the same for a Mac with 16 GB
  ember-mlx plan --model Qwen/Qwen3-0.6B --data my_data --grad-checkpoint --chunked-loss --json
      in bytes, of a run that takes less
  ember-mlx plan --model Qwen/Qwen3-0.6B --data my_data --workers 2 --link TB
      what each of two Macs takes, and what it sends"""
HELP = {
    "planning": {
        "memory": ("SIZE", "Plan for a machine with this memory, such as 16GB. Default: this machine's."),
        "backend": (None, "Where it will train. Default: where MLX computes here."),
        "workers": ("N", "Plan for one of N hosts that share each batch. Default: those of mlx.launch, or 1."),
        "link": (None, "What connects them: TB is TCP over Thunderbolt 5, RDMA the same without TCP. Default: 10GbE."),
        "json": (None, "Print bytes, as JSON."),
    }
}


def main(arguments: list[str]) -> None:
    """What ``ember-mlx plan`` does.

    Raises:
        InputError: for options, new tokens and data that ``train`` would refuse, a config.json that cannot be planned,
            or no memory.
    """
    if os.environ.get("MLX_RANK", "0") != "0":
        return  # the plan is the same for all, and the first prints it
    own, args = options.parse_command(_parser(), arguments)
    with naming_as_given(args.given):
        _plan(own, args)


def _plan(own, args):
    if args.train and args.epochs is None:
        check_rates(args, tables=args.train_tables != "none")
    workers = announced_workers() if own.workers is None else own.workers
    if workers < 1:
        raise InputError(f"--workers {workers}: must be at least 1")
    if own.link is not None and workers == 1:
        raise InputError(f"--link {own.link}: no effect: it is for several hosts; add --workers N, or leave it out")
    backend = own.backend or machine.backend()
    memory, source = machine.limited(args, *machine.memory(own.memory, backend), own.memory)
    available = math.inf if memory is None else memory
    inputs = with_rows_of_data(args, read_inputs(args, workers), usual_rows="max_seq_length" not in own.given)
    model, run = inputs.model, inputs.run
    warning = choose(args, model.shapes(), workers=workers).warning
    if warning:
        print(as_given(warning, args.given), file=sys.stderr)
    planned = plan(model, run, backend)
    changes = advice(args, model, run, backend, available) if planned.peak > available else []
    report = Report(
        options=args,
        model=model,
        run=run,
        backend=backend,
        planned=planned,
        assumptions=inputs.assumptions,
        alternatives={
            flags: (other, plan(model, other, backend)) for flags, other in alternatives(args, model, run).items()
        },
        changes=changes,
        recommendations=[] if changes else recommendations(model, run, backend, planned, available),
        steps=inputs.iters,
        disk=_disk(args, inputs, planned),
        link=own.link or "10GbE",
        memory=memory,
        memory_source=source,
    )
    print(json.dumps(report.to_json(), indent=1) if own.json else report.to_text())


def _disk(args, inputs, planned):
    """As ``train`` reckons it: sharded tables are saved whole."""
    if inputs.run.shard_tables:
        planned = plan(inputs.model, replace(inputs.run, shard_tables=False), "cpu")
    tables = bool(inputs.run.tables)
    kept = what_is_kept(args, tables, keeps_best(args, tables, may_validate(args)))
    return disk_use(args | {"iters": inputs.iters}, planned.trainable, planned.optimizer_state, kept)


def _parser():
    parser = options.build_parser(
        "ember-mlx plan",
        usage="ember-mlx plan --model MODEL --data DATA [--memory SIZE] [--workers N] [options of plan and of train]",
        description="Say how much memory `ember-mlx train` with the same flags will take; no weights are needed.\n"
        "--model may be a model's folder, its config.json alone, or a hub name; of that, kilobytes are downloaded.\n"
        "Rows are planned as long as those of --data, if that is here and the model has its tokenizer. Without --data\n"
        "they have 512 tokens, or as many as --max-seq-length says.",
        epilog=EPILOG,
    )
    parser.add_argument("--memory")
    parser.add_argument("--backend", choices=["metal", "cuda", "cpu"])
    parser.add_argument("--workers", type=int)
    parser.add_argument("--link", choices=list(LINKS))
    parser.add_argument("--json", action="store_true")
    return describe(parser, HELP)
