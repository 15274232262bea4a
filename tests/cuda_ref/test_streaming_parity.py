"""StreamedBackward of PyTorch and StreamedStep of MLX train one model alike."""

from functools import partial

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import cuda_ref

mx = pytest.importorskip("mlx.core")
optim = pytest.importorskip("mlx.optimizers")
llama, qwen3 = (pytest.importorskip(f"mlx_lm.models.{name}") for name in ("llama", "qwen3"))
ember_mlx, streaming, utils = (pytest.importorskip(name) for name in ("ember_mlx", "ember_mlx.streaming", "mlx.utils"))

pytestmark = pytest.mark.usefixtures("eager")

V, D, STEPS = 190, 32, 20
SHAPES = {"vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
          "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
          "max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_same_weights_after_twenty_steps(kind, tied):
    shapes = SHAPES | {"tie_word_embeddings": tied}
    make, config = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}[kind]
    torch.manual_seed(0)
    theirs = make(config(**shapes))
    module = {"llama": llama, "qwen3": qwen3}[kind]
    ours = module.Model(module.ModelArgs.from_dict(shapes | {"model_type": kind})).train()
    start = {name: p.detach().numpy().copy() for name, p in theirs.named_parameters()}
    ours.load_weights([(name, mx.array(weight)) for name, weight in start.items()])

    # A large eps: next to zero, the step of an element would be the sign of a rounding error.
    paired = ember_mlx.PairedOptimizer(ours, tables=ember_mlx.Ember(1e-2, eps=1e-4), rest=optim.SGD(0.1))
    step = streaming.StreamedStep(ours, paired)
    sgd = partial(torch.optim.SGD, lr=0.1)
    optimizer = cuda_ref.PairedOptimizer(theirs, tables=partial(cuda_ref.Ember, lr=1e-2, eps=1e-4), rest=sgd)
    streamed = cuda_ref.StreamedBackward(theirs, optimizer)
    random = np.random.default_rng(1)
    for _ in range(STEPS):
        ids = random.integers(0, V, (2, 12))
        loss, _ = step(mx.array(ids))
        assert streamed(torch.from_numpy(ids)).item() == pytest.approx(loss, rel=1e-5)
    end = dict(utils.tree_flatten(ours.parameters()))
    for name, p in theirs.named_parameters():
        weight, way = np.array(end[name]), np.abs(np.array(end[name]) - start[name]).max()
        assert way > 0
        roundings = STEPS * np.spacing(np.abs(weight).max())  # each step rounds the weight, here and there
        np.testing.assert_allclose(p.detach().numpy(), weight, rtol=0, atol=1e-4 * way + roundings, err_msg=name)
