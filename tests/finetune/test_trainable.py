"""What is trainable after each choice of options."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from tiny_models import tiny_llama

from ember_mlx import InputError, find_token_tables
from ember_mlx.finetune.choices import choose
from ember_mlx.finetune.trainable import make_trainable, shapes_of

LORA = {"rank": 8, "scale": 1.0, "dropout": 0.0}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def trainable(model, args):
    make_trainable(model, args, choose(args, shapes_of(model)))
    return {name for name, _ in tree_flatten(model.trainable_parameters())}


def split(names):
    """(tables, layers that train, other names outside the layers)."""
    tables = names & {EMBEDDING, HEAD}
    inside = {name for name in names if name.startswith("model.layers.")}
    return tables, {int(name.split(".")[2]) for name in inside}, names - tables - inside


@pytest.mark.parametrize(
    ("train_tables", "tables"),
    [("auto", {EMBEDDING, HEAD}), ("embedding", {EMBEDDING}), ("head", {HEAD}), ("none", set())],
)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_train_with_the_tables_that_were_asked_for(parse, train_tables, tables, kind):
    names = trainable(tiny_llama(), parse("--train-tables", train_tables, "--fine-tune-type", kind))
    assert split(names) == (tables, {0, 1}, set())
    leaves = {name.rpartition(".")[2] for name in names - tables}
    assert leaves == ({"lora_a", "lora_b"} if kind == "lora" else {"lora_a", "lora_b", "m"})


@pytest.mark.parametrize(("train_tables", "tables"), [("auto", {EMBEDDING, HEAD}), ("head", {HEAD})])
def test_full_trains_everything_else_beside_tables(parse, train_tables, tables):
    model = tiny_llama()
    names = trainable(model, parse("--fine-tune-type", "full", "--train-tables", train_tables))
    everything = {name for name, _ in tree_flatten(model.parameters())}
    assert names == everything - {EMBEDDING, HEAD} | tables
    assert "model.norm.weight" in names


def test_full_without_tables_trains_what_mlx_lm_does(parse):
    names = trainable(tiny_llama(layers=17), parse("--fine-tune-type", "full", "--train-tables", "none"))
    assert split(names) == (set(), set(range(1, 17)), set())


@pytest.mark.parametrize(("asked", "layers"), [(1, {1}), (2, {0, 1}), (-1, {0, 1}), (0, set())])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_num_layers_counts_from_the_end_and_zero_means_none(parse, asked, layers, kind):
    args = parse("--num-layers", asked, "--fine-tune-type", kind)
    tables, trained, outside = split(trainable(tiny_llama(), args))
    assert trained == layers
    assert choose(args, shapes_of(tiny_llama())).num_layers == len(layers)
    assert tables == {EMBEDDING, HEAD}
    assert outside == ({"model.norm.weight"} if kind == "full" else set())


@pytest.mark.parametrize(("kind", "layers", "trained"), [("lora", 2, 2), ("lora", 17, 16), ("full", 17, 17)])
def test_the_default_is_16_layers_or_as_many_as_there_are_and_for_full_all(parse, kind, layers, trained):
    args = parse("--fine-tune-type", kind)
    names = trainable(tiny_llama(layers=layers), args)
    assert choose(args, shapes_of(tiny_llama(layers=layers))).num_layers == trained
    assert split(names)[1] == set(range(layers - trained, layers))


def test_full_leaves_out_what_has_no_gradient(parse):
    model = tiny_llama()
    model.model.buckets = mx.arange(4)
    model.model.norm.tables = [mx.zeros((2,), mx.int32)]
    names = trainable(model, parse("--fine-tune-type", "full"))
    assert "model.norm.weight" in names
    assert not {name for name in names if "buckets" in name or "tables" in name}


def test_a_tied_table_is_the_embedding(parse):
    for train_tables in ("auto", "embedding"):
        names = trainable(tiny_llama(tied=True), parse("--train-tables", train_tables))
        assert split(names)[0] == {EMBEDDING}


def test_quantized_tables_train_once_dequantized_and_the_bytes_are_said(parse, folders, capsys):
    model, _ = load_model(folders["quantized"])
    ids = mx.array([[5, 6, 7]])
    before = model(ids)
    args = parse("--train-tables", "head")
    assert split(trainable(model, args)) == ({HEAD}, {0, 1}, set())
    # 260 x 32 numbers: 8 bits each and, of every 32, a scale and a bias in float32; then 4 bytes each.
    assert "Dequantized, so that they can train: lm_head, 10.40 kB before, 33.28 kB now" in capsys.readouterr().out
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.embed_tokens) is nn.QuantizedEmbedding
    assert mx.allclose(before, model(ids), atol=1e-5)
    gradients = nn.value_and_grad(model, lambda m, x: m(x).square().mean())(model, ids)[1]
    assert gradients["lm_head"]["weight"].shape == (260, 32)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("quantized", ["--fine-tune-type", "full"], "full: .* is quantized, and quantized weights cannot"),
        ("tied", ["--train-tables", "head"], "the head is the embedding.*use --train-tables embedding"),
        ("untied", ["--num-layers", 3], "--num-layers 3: the model has 2 layers"),
        ("untied", ["--num-layers", 0, "--train-tables", "none"], "nothing is left to train"),
        (
            "untied",
            ["--num-layers", 0, "--train-tables", "none", "--fine-tune-type", "full"],
            "nothing is left to train",
        ),
    ],
)
def test_what_cannot_train_is_refused(parse, folders, model, arguments, message):
    with pytest.raises(InputError, match=message):
        trainable(load_model(folders[model])[0], parse(*arguments))


def test_lora_on_a_table_that_trains_as_a_whole_is_refused(parse):
    args = parse() | {"lora_parameters": LORA | {"keys": ["self_attn.q_proj", "lm_head"]}}
    with pytest.raises(InputError, match="keys names lm_head"):
        trainable(tiny_llama(), args)
    assert "lm_head.lora_a" in trainable(tiny_llama(), args | {"train_tables": "none"})


def test_lora_parameters_that_mlx_lm_refuses_are_an_input_error(parse):
    args = parse() | {"lora_parameters": {"rank": 8, "alpha": 16}}
    with pytest.raises(InputError, match="missing required key 'scale'"):
        trainable(tiny_llama(), args)
    args |= {"lora_parameters": LORA | {"keys": ["nowhere"]}}
    with pytest.raises(InputError, match="no layer has such a module"):
        trainable(tiny_llama(), args)


def test_a_model_without_token_tables_says_what_was_looked_for(parse):
    with pytest.raises(InputError, match="looked for .*--train-tables none"):
        choose(parse(), shapes_of(nn.Linear(3, 3)))
    assert find_token_tables(nn.Linear(3, 3)) == []
