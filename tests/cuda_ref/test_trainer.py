"""Hugging Face's Trainer with a PairedOptimizer: the rates are what was asked, and a resumed run is the same."""

from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.optimization import get_linear_schedule_with_warmup

from cuda_ref import Ember, PairedOptimizer

STEPS, WARMUP = 8, 3
PEAKS = {"tables": 1e-2, "rest": 3e-4}
SIDES = {"tables": partial(Ember, lr=PEAKS["tables"]), "rest": partial(torch.optim.AdamW, lr=PEAKS["rest"])}


EVERY_OPTION = partial(SIDES["tables"], beta2=lambda step: 1 - (step + 1) ** -0.8, row_clip=1.0, row_floor=0.5, seed=3)


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def linear(optimizer):
    return get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)


def one_lambda_a_group(optimizer):
    return LambdaLR(optimizer, [lambda step: 1 / (1 + step), warmup_then_linear])  # the rest, the tables


def warmup_then_linear(step):
    return step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP)


def with_pair(model, scheduler, **sides):
    pair = PairedOptimizer(model, **SIDES | sides)
    return {"optimizers": (pair, scheduler(pair))}


WAYS = {
    "scheduler from args": lambda model: with_pair(model, lambda pair: None),
    "scheduler given": lambda model: with_pair(model, linear),
    "every option of Ember": lambda model: with_pair(model, linear, tables=EVERY_OPTION),
    "a schedule a side": lambda model: with_pair(model, one_lambda_a_group),
    "made by Trainer": lambda model: {"optimizer_cls_and_kwargs": (lambda: PairedOptimizer, SIDES)},
}


class Rates(TrainerCallback):
    """The learning rates that each step is about to use: of the tables, of the rest."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        pair = getattr(optimizer, "optimizer", optimizer)  # what accelerate wrapped
        self.seen.append(tuple(side.param_groups[0]["lr"] for side in (pair.tables, pair.rest)))


def run(folder, way, resume_from=None, **options):
    model, rates = tiny_llama(), Rates()
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 40, (12,), generator=generator) for _ in range(2 * STEPS)]
    args = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=2, learning_rate=123.0, warmup_steps=WARMUP,
        lr_scheduler_type="linear", save_steps=STEPS // 2, logging_steps=1, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, **{"use_cpu": True} | options,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=[{"input_ids": r, "labels": r} for r in rows], callbacks=[rates], **WAYS[way](model)
    )
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer, rates.seen


@pytest.mark.parametrize("way", WAYS)
def test_rates_are_what_was_asked_and_a_resumed_run_is_the_same(tmp_path, way):
    trainer, rates = run(tmp_path / "straight", way)
    of_rest = (lambda step: 1 / (1 + step)) if way == "a schedule a side" else warmup_then_linear
    expected = [(PEAKS["tables"] * warmup_then_linear(i), PEAKS["rest"] * of_rest(i)) for i in range(STEPS)]
    assert rates == expected
    assert expected[WARMUP][0] == PEAKS["tables"]
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == [rate for _, rate in expected]

    resumed, rates = run(tmp_path / "resumed", way, resume_from=tmp_path / "straight" / f"checkpoint-{STEPS // 2}")
    assert rates == expected[STEPS // 2 :]
    for (name, w), (_, other) in zip(trainer.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(w, other), name
    saved, other = (t.optimizer.state_dict()["state"] for t in (trainer, resumed))
    assert all(torch.equal(x, other[i][name]) for i in saved for name, x in saved[i].items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the Trainer scales losses of float16 on a GPU only")
def test_float16_steps_both_sides_together(tmp_path):
    trainer, _ = run(tmp_path, "scheduler from args", use_cpu=False, fp16=True)
    done = {float(state["step"]) for state in trainer.optimizer.state.values()}
    assert len(done) == 1
    assert 0 < done.pop() <= STEPS
