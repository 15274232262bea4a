"""examples/benchmarks/training_parity.py on a tiny Llama: the two frameworks agree, and what is wrong is seen."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

import cuda_ref

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
SHORT = {"--steps": 10, "--warmup": 3, "--batch-size": 2, "--length": 16, "--table-learning-rate": 1e-2}


@pytest.fixture
def compare(folders, tmp_path, monkeypatch):
    """Run it on one of the tiny models; the exit code and the report."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")  # the script sets it, for its own process
    import training_parity
    import training_parity_twins

    pairs = [{"prompt": f"What is {i} squared?", "completion": f"It is {i * i}."} for i in range(40)]
    monkeypatch.setattr(training_parity_twins, "finetuning_pairs", lambda: (pairs, []))

    def compare(model, *beside):
        words = [word for pair in (SHORT | {"--model": folders[model], "--out": tmp_path / "out.json"}).items()
                 for word in pair]  # fmt: skip
        code = training_parity.main([str(word) for word in [*words, "--beside", *beside]])
        return code, json.loads((tmp_path / "out.json").read_text())

    device = mx.default_device()
    yield compare
    mx.set_default_device(device)


def of_the_way(comparison):
    return max(entry["of_the_way"] for name, entry in comparison.items() if name != "loss")


@pytest.mark.parametrize("model", ["untied", "tied"])
def test_both_frameworks_train_alike_and_a_wrong_twin_does_not(compare, model):
    code, report = compare(model, "mlx, exact sums", "torch, Ember beta2 0.99", "mlx, AdamW bias uncorrected")
    comparisons, losses = report["comparisons"], report["losses"]["mlx"]
    alike = comparisons["mlx | torch"]
    assert code == 0
    assert losses[-1] < losses[0] - 0.5
    assert report["rates"] < 1e-6
    assert {"model.embed_tokens.weight", "body"} < alike.keys()
    assert ("lm_head.weight" in alike) == (model == "untied")
    assert alike["loss"]["largest"] < 1e-5
    assert of_the_way(alike) < 1e-4  # the body of a random model; 1e-5 seen
    # The bias correction of MLX's Adam explains most of it.
    assert comparisons["mlx, exact sums | torch"]["body"]["of_the_way"] < 0.5 * alike["body"]["of_the_way"]
    assert of_the_way(comparisons["torch, Ember beta2 0.99 | torch"]) > 1e-3
    assert of_the_way(comparisons["mlx, AdamW bias uncorrected | mlx"]) > 0.1


def test_a_difference_beyond_what_is_allowed_ends_with_exit_code_1(compare, monkeypatch):
    ember = cuda_ref.Ember
    monkeypatch.setattr(cuda_ref, "Ember", lambda tables, lr, **options: ember(tables, 1.1 * lr, **options))
    code, report = compare("untied")
    assert code == 1
    assert report["comparisons"]["mlx | torch"]["loss"]["largest"] > 1e-3


def test_the_picture_is_drawn_from_the_report(compare, tmp_path):
    pytest.importorskip("matplotlib")
    import plot_training_parity

    _, report = compare("untied", "mlx, neighbours")
    plot_training_parity.draw(report, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 20_000
