"""``ember-mlx plan``: the flags of ``train``, and what that run will take."""

import argparse
import json

from ember_mlx.finetune import options
from ember_mlx.planner import advice, alternatives, machine, plan
from ember_mlx.planner.inputs import read_inputs, with_rows_of_data
from ember_mlx.planner.report import Report
from ember_mlx.shared.errors import with_one_line_errors


def main(arguments: list[str]):
    """What ``ember-mlx plan`` does.

    Raises:
        InputError: for options, new tokens and data that ``train`` would refuse, a config.json that cannot be planned,
            or no memory.
    """
    own, theirs = _parser().parse_known_args(arguments)
    args = options.parse(theirs)
    backend = own.backend or machine.backend()
    memory, whose = machine.memory(own.memory, backend)
    inputs = with_rows_of_data(args, read_inputs(args))
    model, run = inputs.model, inputs.run
    planned = plan(model, run, backend)
    report = Report(
        name=args.model,
        model=model,
        run=run,
        backend=backend,
        planned=planned,
        said=inputs.said,
        others={flags: plan(model, other, backend) for flags, other in alternatives(run).items()},
        changes=advice(model, run, backend, memory) if planned.peak > memory else [],
        memory=memory,
        whose=whose,
    )
    print(json.dumps(report.to_json(), indent=1) if own.json else report.to_text())


def _parser():
    parser = argparse.ArgumentParser(
        prog="ember-mlx plan",
        usage="ember-mlx plan [FLAGS OF ember-mlx train] [--memory SIZE] [--backend {metal,cuda,cpu}] [--json]",
        description="Say how much memory `ember-mlx train` with the same flags will take; no weights are needed.",
        epilog="--model may be a model's folder, its config.json alone, or a hub name that is in the cache. Where "
        "--data is a folder here and the model has its tokenizer, rows are planned as long as they will be; otherwise "
        "as long as --max-seq-length. For a Mac with 16 GB: ember-mlx plan --model FOLDER --data FOLDER --backend "
        "metal --memory 16GB",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="Plan for a machine with so much: 16GB. Default: what this one has."
    )
    parser.add_argument(
        "--backend", choices=["metal", "cuda", "cpu"], help="Where it will train. Default: where MLX computes here."
    )
    parser.add_argument("--json", action="store_true", help="Print bytes, as JSON.")
    return with_one_line_errors(parser)
