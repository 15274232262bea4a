"""How 16-bit weights that are no table are rounded: by chance where all of a model trains, unless told otherwise."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_models import tiny_llama, write_model

from ember_mlx import InputError
from ember_mlx.finetune import options
from ember_mlx.finetune.base_models import load_base
from ember_mlx.finetune.build_optimizer import build_optimizer
from ember_mlx.finetune.choices import choose
from ember_mlx.finetune.run import run
from ember_mlx.finetune.trainable import shapes_of

pytestmark = pytest.mark.usefixtures("eager")

FULL = "--fine-tune-type full"


@pytest.mark.parametrize(
    ("dtype", "words", "rounding"),
    [
        (mx.bfloat16, FULL, "stochastic"),
        (mx.float16, FULL, "stochastic"),
        (mx.bfloat16, f"{FULL} --stream --optimizer sinkgd", "stochastic"),
        (mx.bfloat16, f"{FULL} --body-rounding nearest", "nearest"),
        (mx.float32, FULL, "nearest"),
        (mx.bfloat16, "", "nearest"),  # adapters are float32
        (mx.bfloat16, f"{FULL} --train-tables none", "nearest"),  # mlx-lm's own run
        (mx.bfloat16, f"{FULL} --train-tables none --body-rounding stochastic", "stochastic"),
    ],
)
def test_it_is_chosen_by_what_trains(dtype, words, rounding):
    model = tiny_llama()
    model.set_dtype(dtype)
    assert choose(options.parse(words.split()), shapes_of(model)).body_rounding == rounding


@pytest.mark.parametrize(("dtype", "idle"), [(mx.float32, True), (mx.bfloat16, False)])
def test_asked_for_in_float32_it_has_no_effect_and_says_so(dtype, idle, capsys):
    model = tiny_llama()
    model.set_dtype(dtype)
    args = options.parse([*FULL.split(), "--body-rounding", "stochastic"])
    build_optimizer(model, args, choose(args, shapes_of(model)))
    assert ("--body-rounding stochastic: no effect" in capsys.readouterr().out) == idle


def test_a_rest_of_each_weight_takes_its_place(tmp_path):
    config = tmp_path / "split.yaml"
    config.write_text("optimizer: adam-mini\noptimizer_config: {adam-mini: {weights: bf16+int8}}\n")
    model = tiny_llama()
    model.set_dtype(mx.bfloat16)
    words = [*FULL.split(), "--config", str(config)]
    assert choose(options.parse(words), shapes_of(model)).body_rounding == "nearest"
    with pytest.raises(InputError, match=r"--body-rounding stochastic: optimizer_config keeps a rest"):
        choose(options.parse([*words, "--body-rounding", "stochastic"]), shapes_of(model))


@pytest.mark.parametrize("optimizer", ["adam", "adam-mini"])
def test_small_steps_move_weights_that_nearest_leaves_still(parse, tmp_path, capsys, optimizer):
    folder = write_model(tmp_path / "model", dtype=mx.bfloat16)
    before = dict(tree_flatten(load_base(folder)[0].parameters()))
    words = [*FULL.split(), "--model", folder, "--optimizer", optimizer, "--learning-rate", 1e-5]
    moved, arrays = {}, {}
    for name, more in {"plain": [], "streamed": ["--stream"], "nearest": ["--body-rounding", "nearest"]}.items():
        run(parse(*words, *more, adapter=name))
        assert ("Adam, stochastic rounding" in capsys.readouterr().out) == (name != "nearest" and optimizer == "adam")
        arrays[name] = mx.load(str(tmp_path / name / "adapters.safetensors"))
        body = [path for path in before if ".layers." in path and before[path].ndim == 2]
        changed = [np.array((arrays[name][path] != before[path]).reshape(-1)) for path in body]
        moved[name] = np.concatenate(changed).mean()
    assert moved["plain"] > 2 * moved["nearest"]
    alike = [np.array((arrays["plain"][path] == arrays["streamed"][path]).reshape(-1)) for path in body]
    assert np.concatenate(alike).mean() > 0.98  # the same bits for each weight; gradients differ in their last
