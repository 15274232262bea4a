"""examples/benchmarks/quality: its model, its rules and its plan. No text is needed: token ids are drawn at random."""

import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples/benchmarks/quality"
sys.path.insert(0, str(FOLDER))
llama, plan, table_rules, training = map(importlib.import_module, ("llama", "plan", "table_rules", "training"))
sys.path.remove(str(FOLDER))

from cuda_ref import Ember  # noqa: E402

TINY = llama.Shape(vocabulary=128, width=16, layers=2, heads=4, hidden=24, tied=False, key_value_heads=2)
SETTING = plan.Setting(TINY, "text", batch=2, length=16, steps=40, warmup=4, body_guess=-4)


def test_the_model_is_the_llama_of_hugging_face():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    theirs, ours = LlamaForCausalLM(config), llama.Llama(TINY)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(0, 128, (2, 9))
    logits = torch.nn.functional.linear(ours(ids), ours.tables["head"])
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def steps_of(optimizer_of, gradients):
    w = torch.nn.Parameter(torch.linspace(-1, 1, gradients[0].numel()).view(gradients[0].shape).clone())
    optimizer = optimizer_of([w])
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
    return w.detach()


@pytest.fixture
def gradients():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(12, 8, generator=generator) * torch.rand(12, 1, generator=generator) for _ in range(5)]


def test_the_factored_rule_is_ember_where_it_should_be(gradients):
    ours = steps_of(lambda w: table_rules.FactoredRule(w, lr=0.01), gradients)
    torch.testing.assert_close(ours, steps_of(lambda w: Ember(w, lr=0.01), gradients))


def test_adafactor_is_that_of_mlx(gradients):
    mx = pytest.importorskip("mlx.core")
    import mlx.optimizers as optim

    optimizer = optim.Adafactor(0.01, relative_step=False, scale_parameter=False)
    w = {"w": mx.linspace(-1, 1, 96).reshape(12, 8)}
    for g in gradients:
        w = optimizer.apply_gradients({"w": mx.array(g.numpy())}, w)
    ours = steps_of(lambda w: table_rules.make("adafactor", w, torch.tensor(0.01)), gradients)
    torch.testing.assert_close(ours, torch.from_numpy(np.array(w["w"])), rtol=1e-5, atol=1e-6)


def test_sgd_is_that_of_pytorch(gradients):
    ours = steps_of(lambda w: table_rules.make("sgd", w, torch.tensor(0.1)), gradients)
    theirs = steps_of(lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.9), gradients)
    torch.testing.assert_close(ours, theirs)


def test_the_search_for_a_rate_goes_on_until_the_best_is_not_at_an_edge():
    losses = {}
    while True:
        best, missing = plan.best_rate(losses, guess=-4)
        if not missing:
            break
        losses |= {rate: float("nan") if rate > 2 else abs(rate - 2.0) for rate in missing}
    assert best == 2
    assert {1, 3} <= losses.keys()


def test_the_plan_reports_other_seeds_at_the_best_rate_and_ends():
    settings = {"a": SETTING}
    phases = [plan.Phase(("a",), ("ember", "frozen"), seeds=(1, 2), probes=("ember",))]
    results = {}
    while runs := list(plan.wanted(results, phases, settings)):
        for run in runs:
            results[run.key()] = abs(run.rate + 6) + 2 * abs(run.body_rate + 3) + run.seed
    reported = sorted((key for key in results if key[4] != plan.TUNING_SEED), key=str)
    assert reported == [
        ("a", "ember", -6, -3, 1, None, False), ("a", "ember", -6, -3, 1, None, True),
        ("a", "ember", -6, -3, 2, None, False),
        ("a", "frozen", 0, -3, 1, None, False), ("a", "frozen", 0, -3, 2, None, False),
    ]  # fmt: skip


def write_tokens(folder):
    random = np.random.default_rng(0)
    for part, count in (("train", 4000), ("valid", 500)):
        ids = random.integers(0, 128, count) & random.integers(0, 128, count)
        ids.astype(np.uint16).tofile(folder / f"text_{part}.u16")


@pytest.fixture
def data(tmp_path):
    write_tokens(tmp_path)
    return tmp_path


@pytest.mark.parametrize("optimizer", ["ember", "adamw", "frozen", "ember | adamw", "ember-bf16"])
def test_a_run_trains_what_it_should(data, optimizer):
    trainer = training.Trainer("cpu", data, data)
    result = trainer.train(plan.Run("a", optimizer, -4, -4, 1, head_rate=-5), SETTING, data / "base.pt")
    assert len(result["losses"]) == SETTING.steps // training.WINDOW
    assert result["losses"][-1] < result["losses"][0]
    assert sum(result["decile_counts"]) == 499 // SETTING.length * SETTING.length
    mean = np.dot(result["decile_losses"], result["decile_counts"]) / sum(result["decile_counts"])
    assert result["valid_loss"] == pytest.approx(mean, abs=1e-3)

    fresh, trained = llama.Llama(TINY), torch.load(data / "base.pt")
    fresh.initialize(1)
    moved = [not torch.equal(fresh.state_dict()[f"{name}.weight"], trained[f"{name}.weight"].float())
             for name in ("model.embed_tokens", "lm_head", "model.layers.0.mlp.up_proj")]  # fmt: skip
    assert moved == ([False, False, True] if optimizer == "frozen" else [True] * 3)


def test_the_probe_sees_how_long_a_row_was_silent():
    w = torch.zeros(3, 2)
    probe = training.Probe(w, torch.tensor(0.1))
    for i, (ids, step) in enumerate([([0, 1], 0.1), ([0], 0.2), ([0], 0.1), ([0], 0.1), ([1], 0.5)]):
        probe.before()
        w[ids] += step
        probe.after(torch.tensor(i), torch.tensor(ids))
    result = probe.result()
    assert result["count"] == [3, 0, 1] + [0] * 8 + [2]  # row 0 three times at once, row 1 after 4 steps, both first
    np.testing.assert_allclose([result["mean"][i] for i in (0, 2, 11)], [4 / 3, 5.0, 1.0], rtol=1e-5)
    np.testing.assert_allclose(result["largest"][0], 2.0, rtol=1e-5)


@pytest.fixture(scope="module")
def gpu_trainers(tmp_path_factory):
    """One that captures its steps and one that does not."""
    folder = tmp_path_factory.mktemp("data")
    write_tokens(folder)
    return [training.Trainer("cuda", folder, folder, graphs=graphs) for graphs in (True, False)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("optimizer", list(table_rules.TABLE_RULES))
def test_a_cuda_graph_does_the_steps_that_the_loop_does(gpu_trainers, optimizer):
    run = plan.Run("a", optimizer, -4, -4, 1, probe=True)
    setting = dataclasses.replace(SETTING, shape=dataclasses.replace(TINY, width=64, hidden=64, key_value_heads=4))
    captured, plain = (trainer.train(run, setting) for trainer in gpu_trainers)
    assert captured["valid_loss"] == pytest.approx(plain["valid_loss"], abs=5e-3)
    assert captured["losses"] == pytest.approx(plain["losses"], abs=5e-3)
    assert captured["probe"]["head"]["count"] == plain["probe"]["head"]["count"]
