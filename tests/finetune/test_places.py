"""Where arrays stand: what a step takes out of a model and its optimizer's state, and puts in."""

import mlx.core as mx
from mlx.utils import tree_flatten
from tiny_models import tiny_llama

from ember_mlx.finetune.places import Places


def test_what_stands_in_a_model_is_found_by_its_paths_and_replaced_there():
    model = tiny_llama()
    model.layers[0].freeze()
    trained = dict(tree_flatten(model.trainable_parameters()))
    places = Places(model, trained)
    found = places.arrays()
    assert list(found) == places.names == list(trained)
    assert all(found[path] is trained[path] for path in trained)
    frozen, path = model.layers[0].mlp.up_proj.weight, "model.layers.1.mlp.up_proj.weight"
    places.put({name: array + 1 for name, array in found.items()})
    assert mx.array_equal(model.layers[1].mlp.up_proj.weight, trained[path] + 1)
    assert model.layers[0].mlp.up_proj.weight is frozen
    assert places.arrays()["model.norm.weight"] is model.model.norm.weight


def test_what_is_loaded_meanwhile_is_found_too():
    state = {"step": mx.array(0), "states": [{"a.b": {"m": mx.zeros(2)}}, {}]}
    places = Places(state)
    state["states"][0]["a.b"]["m"] = mx.ones(2)
    assert places.arrays()["states.0.a.b.m"] is state["states"][0]["a.b"]["m"]
