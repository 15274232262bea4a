"""``ember-mlx data``: what `train` with the same flags will learn from; no model is loaded."""

from pathlib import Path

from mlx_lm.cli_ui import rprint
from mlx_lm.utils import load_tokenizer

from ember_mlx.finetune import options
from ember_mlx.finetune.added_tokens import grow_tokenizer, read_tokens
from ember_mlx.finetune.as_given import naming_as_given
from ember_mlx.finetune.base_models import check_model, why_not_loaded
from ember_mlx.finetune.data import check_data_folder, load_data
from ember_mlx.finetune.data_report import LEARNED, count, rendered
from ember_mlx.finetune.options import Options
from ember_mlx.finetune.packing import PackedRows, packed
from ember_mlx.shared.command_line import describe
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.text_tables import text_table

__all__ = ["main"]

EPILOG = """\
examples:
  ember-mlx data questions.csv --model Qwen/Qwen3-0.6B --mask-prompt
      rows, tokens and lengths, and three rows with what is learned marked
  ember-mlx data questions.csv --model Qwen/Qwen3-0.6B --packing --max-seq-length 1024
      how many packs the rows make, and how full
  ember-mlx data my_data --model Qwen/Qwen3-0.6B --max-seq-length 512
      which rows that length cuts"""
HELP = {
    "data": {
        "file": ("DATA", "A folder, a file or a name on the hub, as --data of train takes it. Required, or --data is."),
        "show": ("N", "Show the first N rows of the training set; 0 for none. Default: 3."),
    }
}
HEADER = ("set", "rows", "tokens", "learned", "min", "median", "max", "truncated", "masked", "empty")


def main(arguments: list[str]) -> None:
    """What ``ember-mlx data`` does.

    Raises:
        InputError: for data that ``train`` would refuse, and a model without a tokenizer.
    """
    own, args = options.parse_command(_parser(), arguments)
    if own.file is not None:
        args = Options({**args.given, "data": ""}, **(vars(args) | {"data": own.file}))
    elif args.data == options.defaults()["data"] and not getattr(args, "hf_dataset", None):
        raise InputError("DATA is required: ember-mlx data FILE, with a folder, a file or a name on the hub")
    if own.show is not None and own.show < 0:
        raise InputError(f"--show {own.show}: must be at least 0")
    with naming_as_given(args.given):
        _show(own, args)


def _show(own, args):
    check_data_folder(args)
    tokenizer = _tokenizer(args, "" if "model" in own.given else " (the default)")
    sets = dict(zip(("train", "valid", "test"), load_data(args, tokenizer), strict=True))
    counts = {name: count(rows, args.max_seq_length) for name, rows in sets.items() if len(rows)}
    print(text_table(HEADER, [_cells(name, found) for name, found in counts.items()], right=range(1, len(HEADER))))
    train = packed(args, sets["train"])
    if isinstance(train, PackedRows):
        print(
            f"\nPacked: {len(sets['train']):,} train rows make {len(train):,} packs of {args.max_seq_length:,} tokens, "
            f"{train.fullness:.1%} full; in batches of {args.batch_size}"
        )
    for name, found in counts.items():
        if found.empty:
            rprint(
                f"Warning: in {found.empty} of {found.rows} {name} rows nothing is learned: remove them, or raise "
                f"--max-seq-length {args.max_seq_length}"
            )
    rows = sets["train"] if args.train else sets["test"]
    shown = min(3 if own.show is None else own.show, len(rows))
    if shown:
        print(f"\nThe first {shown} rows; what is learned stands in {LEARNED[0]} {LEARNED[1]}:")
    for i in range(shown):
        print(f"\n--- {rows.where(i)}\n{rendered(rows, i, tokenizer, args.max_seq_length)}")


def _cells(name, found):
    numbers = (found.rows, found.tokens, found.learned, found.shortest, found.middle, found.longest)
    return (
        name,
        *(f"{number:,g}" if number < 1e6 else f"{number:,.0f}" for number in numbers),
        *(f"{number:,}" for number in (found.truncated, found.masked, found.empty)),
    )


def _tokenizer(args, default):
    trust = {"trust_remote_code": args.trust_remote_code}
    try:
        tokenizer = load_tokenizer(Path(args.model) if Path(args.model).exists() else args.model, trust)
    # Whatever a tokenizer, or the hub's client, raises.
    except Exception as error:
        where = f"--model {args.model or repr('')}{default}"
        check_model(args.model, where)  # only now: a folder with a tokenizer alone will do
        why = why_not_loaded(args.model, error)
        raise InputError(f"{where}: its tokenizer cannot be loaded: {why}") from error
    if args.add_tokens:
        where = f"--add-tokens {args.add_tokens}"
        tokenizer, _ = grow_tokenizer(tokenizer, read_tokens(Path(args.add_tokens)), where)
    return tokenizer


def _parser():
    parser = options.build_parser(
        "ember-mlx data",
        usage="ember-mlx data DATA [--model MODEL] [--show N] [options of train]",
        description="Show what `ember-mlx train` with the same flags will learn from: rows, tokens and lengths.\n"
        "truncated: rows that --max-seq-length cuts; masked: rows with a masked prompt; empty: nothing is learned.",
        epilog=EPILOG,
    )
    parser.add_argument("file", nargs="?")
    parser.add_argument("--show", type=int, default=None)
    return describe(parser, HELP)
