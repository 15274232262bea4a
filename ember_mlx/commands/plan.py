"""``ember-mlx plan``: the flags of ``train``, and what that run will take."""

import json

from ember_mlx.finetune import options
from ember_mlx.planner import advice, alternatives, machine, plan
from ember_mlx.planner.inputs import read_inputs, with_rows_of_data
from ember_mlx.planner.report import Report
from ember_mlx.planner.streaming_advice import recommendations

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """What ``ember-mlx plan`` does.

    Raises:
        InputError: for options, new tokens and data that ``train`` would refuse, a config.json that cannot be planned,
            or no memory.
    """
    own, args = options.parse_command(_parser(), arguments)
    backend = own.backend or machine.backend()
    memory, source = machine.memory(own.memory, backend)
    inputs = with_rows_of_data(args, read_inputs(args))
    model, run = inputs.model, inputs.run
    planned = plan(model, run, backend)
    report = Report(
        name=args.model,
        model=model,
        run=run,
        backend=backend,
        planned=planned,
        assumptions=inputs.assumptions,
        alternatives={flags: plan(model, other, backend) for flags, other in alternatives(run).items()},
        changes=advice(model, run, backend, memory) if planned.peak > memory else [],
        recommendations=recommendations(model, run, backend, planned),
        memory=memory,
        memory_source=source,
    )
    print(json.dumps(report.to_json(), indent=1) if own.json else report.to_text())


def _parser():
    parser = options.build_parser(
        "ember-mlx plan",
        usage="ember-mlx plan --model MODEL --data FOLDER [--memory SIZE] [--backend BACKEND] [options of train]",
        description="Say how much memory `ember-mlx train` with the same flags will take; no weights are needed.\n"
        "--model may be a model's folder, its config.json alone, or a hub name that is in the cache.\n"
        "Rows are planned as long as those of --data, if that is a folder here and the model has its tokenizer;\n"
        "otherwise as long as --max-seq-length.",
        epilog="examples, for a Mac with 16 GB:\n"
        "  ember-mlx plan --model FOLDER --data FOLDER --backend metal --memory 16GB\n"
        "  ember-mlx plan --model FOLDER --data FOLDER --backend metal --memory 16GB --fine-tune-type full --stream",
    )
    group = parser.add_argument_group("planning")
    group.add_argument(
        "--memory", metavar="SIZE", help="Plan for a machine with this memory, such as 16GB. Default: this machine's."
    )
    group.add_argument(
        "--backend", choices=["metal", "cuda", "cpu"], help="Where it will train. Default: where MLX computes here."
    )
    group.add_argument("--json", action="store_true", help="Print bytes, as JSON. Default: off.")
    return parser
