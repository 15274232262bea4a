"""``ember-mlx train``: fine-tune, and say how to resume what a signal stopped."""

import shlex
import sys

from ember_mlx.finetune import options
from ember_mlx.finetune.as_given import naming_as_given
from ember_mlx.finetune.broken_pipes import outliving_its_readers
from ember_mlx.finetune.lost_peers import PeerDeadline, PeerLost, leave, reporting_lost_peers
from ember_mlx.finetune.resume import rates_as_before
from ember_mlx.finetune.run import run
from ember_mlx.finetune.stop_signals import Interrupted
from ember_mlx.finetune.workers import Workers
from ember_mlx.planner.inputs import refuse_misfits
from ember_mlx.planner.savings import with_savings

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Train, test, or both."""
    workers = Workers.join()
    try:
        args, given = _parse_together(arguments, workers)
        if args.train and workers.size == 1:
            with naming_as_given(args.given):
                refuse_misfits(args)
        run(with_savings(args, given) if args.train else args)
    except PeerLost as lost:
        leave(lost)
    except Interrupted as stopped:
        if not workers.leads:
            sys.exit(stopped.exit_code)
        with outliving_its_readers():
            print(stopped, file=sys.stderr)
            if stopped.checkpoint:
                words = options.command_to_resume(arguments, stopped.resume_words)
                print(f"To resume:\n  {shlex.join(['ember-mlx', 'train', *words])}", file=sys.stderr)
        sys.exit(stopped.exit_code)


def _parse_together(arguments, workers):
    """The options and the names of those given, where no worker refuses its own; --peer-timeout is not known yet."""
    deadline = PeerDeadline(workers, options.defaults()["peer_timeout"] // 10)
    with reporting_lost_peers(workers), deadline:
        with workers.one_outcome():
            args, given = options.parse_given(arguments, data_required=True)
        with naming_as_given(args.given):
            return rates_as_before(args, given, workers), given
