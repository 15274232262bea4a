"""Builds mlx-lm's architectures in miniature and compares what is found in them with what tracing says."""

import importlib
import inspect
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx_lm.tuner.utils import linear_to_lora_layers

from architectures.configs import BASE, OVERRIDES
from architectures.trace import trace_token_tables
from ember_mlx.token_tables import TokenTable, find_token_tables

# olmo adds its mask, the word "causal", to the scores: only sequences of one token, which have no mask, run.
ONE_TOKEN_ONLY = {"olmo"}


@dataclass(frozen=True)
class Case:
    """One tiny model: what is found in it plain, quantized, and quantized with LoRA; and what tracing says."""

    found: list[TokenTable]
    quantized: list[TokenTable]
    adapted: list[TokenTable]
    traced: dict[str, str]


def model_files() -> list[str]:
    """Every file of `mlx_lm/models`, by name, helpers included."""
    return sorted(p.stem for p in Path(mlx_lm.models.__path__[0]).glob("*.py") if p.stem != "__init__")


def build(name: str, tied: bool) -> nn.Module:
    """A tiny instance of one architecture; whatever its file raises when it cannot be had."""
    # olmo.py only checks that this package is there, and exits the process when it is not.
    with mock.patch.dict(sys.modules, {"hf_olmo": ModuleType("hf_olmo")}):
        module = importlib.import_module(f"mlx_lm.models.{name}")
    if not hasattr(module, "Model"):
        raise NotImplementedError("a helper: it defines no Model")
    own = dict(OVERRIDES.get(name, {}))
    text_model_type = own.pop("text_model_type", name)
    config = BASE | {"tie_word_embeddings": tied, "weight_tying": tied, "share_input_output_layers": tied} | own
    config = {"text_config": config | {"model_type": text_model_type}} | config | {"model_type": name}
    mx.random.seed(0)
    # from_dict asks for the signature once a key, which takes longer than all else here.
    with mock.patch.object(inspect, "signature", cache(inspect.signature)):
        return module.Model(module.ModelArgs.from_dict(config))


@cache
def examine(name: str, tied: bool) -> Case | str:
    """Build, look, trace; once a session, on the CPU everywhere. The reason, if it cannot be built and run."""
    mx.disable_compile()  # thousands of tiny graphs: compiling them takes minutes
    try:
        with mx.stream(mx.cpu):
            return _examine(name, tied)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        mx.enable_compile()


def _examine(name: str, tied: bool) -> Case:
    model = build(name, tied)
    found = find_token_tables(model)
    traced = trace_token_tables(model, one_by_one=name in ONE_TOKEN_ONLY)
    nn.quantize(model, 32, 4, class_predicate=_can_be_quantized)
    quantized = find_token_tables(model)
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 1.0, "dropout": 0.0})
    return Case(found, quantized, find_token_tables(model), traced)


def _can_be_quantized(path: str, module: nn.Module) -> bool:
    return type(module) in (nn.Embedding, nn.Linear) and module.weight.shape[-1] % 32 == 0
