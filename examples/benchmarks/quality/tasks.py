"""The tasks of the quality benchmark: models, data, lengths. ``plan.py`` says what is run in them."""

from dataclasses import dataclass, replace

from llama import Shape

__all__ = ["SETTINGS", "Setting"]


@dataclass(frozen=True)
class Setting:
    """One task. ``start`` is None for fresh weights, or what is fine-tuned: the name of a setting or of a folder."""

    shape: Shape
    data: str  # NAME_train.u16 and NAME_valid.u16 in the data folder
    batch: int  # sequences a step
    length: int  # tokens a sequence
    steps: int
    warmup: int
    body_guess: int  # the body's learning rate to try first, as a power of sqrt(10)
    start: str | None = None
    weight_decay: float = 0.1
    tables_guess: int = 0  # half decades from the first guesses of TABLE_RULES, which are for pretraining
    like: str | None = None  # the setting whose best rates are the first guesses here, once they are known
    constant: bool = False  # the learning rate, from the first step on, instead of warm-up and cosine
    others: tuple[str, ...] = ()  # more data whose validation loss is measured at the end: what was forgotten


def _pretraining(tied, batch, like=None):
    shape = Shape(vocabulary=32768, width=384, layers=6, heads=6, hidden=1024, tied=tied)
    return Setting(shape, "text", batch=batch, length=256, steps=2000, warmup=100, body_guess=-6, like=like)


DATA = ("wikisql", "rasbt", "shakespeare")


def _finetuning(data, steps, shape, start, like=None):
    # weight decay 0: a short run from good weights
    others = tuple(f"smollm2_{other}" for other in DATA if start == "smollm2" and not data.endswith(other))
    return Setting(
        shape, data, 8, 256, steps, warmup=steps // 10, body_guess=-7, start=start, weight_decay=0.0, tables_guess=-2,
        like=like, others=others,
    )  # fmt: skip


OWN_SHAPE = _pretraining(tied=False, batch=64).shape
SMOLLM2 = Shape(49152, 576, 30, 9, 1536, tied=True, key_value_heads=3, rope_base=100_000.0)
SMOLLM2_LORA = replace(SMOLLM2, lora_layers=16)  # as many as mlx_lm.lora has by default
SETTINGS = {
    "untied-4k": _pretraining(tied=False, batch=16),
    "tied-4k": _pretraining(tied=True, batch=16, like="untied-4k"),
    "untied-16k": _pretraining(tied=False, batch=64, like="untied-4k"),
    "tied-16k": _pretraining(tied=True, batch=64, like="tied-4k"),
    "smollm2-wikisql": _finetuning("smollm2_wikisql", 100, SMOLLM2, "smollm2"),
    "smollm2-wikisql-lora": _finetuning("smollm2_wikisql", 100, SMOLLM2_LORA, "smollm2", like="smollm2-wikisql"),
    "smollm2-rasbt": _finetuning("smollm2_rasbt", 50, SMOLLM2, "smollm2", like="smollm2-wikisql"),
    "smollm2-rasbt-lora": _finetuning("smollm2_rasbt", 50, SMOLLM2_LORA, "smollm2", like="smollm2-wikisql-lora"),
    "smollm2-shakespeare": _finetuning("smollm2_shakespeare", 400, SMOLLM2, "smollm2", like="smollm2-wikisql"),
    "smollm2-shakespeare-lora": _finetuning(
        "smollm2_shakespeare", 400, SMOLLM2_LORA, "smollm2", like="smollm2-wikisql-lora"
    ),
    **{
        f"smollm2-{data}-lora-constant": replace(
            _finetuning(f"smollm2_{data}", steps, SMOLLM2_LORA, "smollm2", like=f"smollm2-{data}-lora"),
            warmup=0,
            constant=True,
        )
        for data, steps in (("wikisql", 100), ("rasbt", 50), ("shakespeare", 400))
    },
    # 72 M weights, 39 M of them in the body
    "llama-16k": Setting(
        Shape(32768, 512, 12, 8, 1408, tied=False),
        "text",
        batch=64,
        length=256,
        steps=500,
        warmup=50,
        body_guess=-6,
    ),
    "own-wikisql": _finetuning("wikisql", 100, OWN_SHAPE, "untied-16k"),
    "own-shakespeare": _finetuning("shakespeare", 400, OWN_SHAPE, "untied-16k", like="own-wikisql"),
    "own-rasbt": _finetuning("rasbt", 50, OWN_SHAPE, "untied-16k", like="own-wikisql"),
}
