"""Token tables of PyTorch models: awkward cases by hand, wrapped models, and transformers' own word on its models.

The rules are those of MLX models: what they decide is tested in tests/test_token_tables.py.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from cuda_ref import InputError, TokenTable, find_token_tables

V, D = 173, 8
UNTIED = {"embed.weight": "embedding", "out.weight": "head"}


class Plain(nn.Module):
    """Somebody's own model: no config."""

    def __init__(self, rows=V, outputs=V, tied=False):
        super().__init__()
        self.embed = nn.Embedding(rows, D)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(D, V), nn.ReLU(), nn.Linear(V, D)) for _ in range(2))
        if outputs:
            self.out = nn.Linear(D, outputs, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, ids):
        raise AssertionError("find_token_tables must not run the model")


def roles(model):
    return {table.path: table.role for table in find_token_tables(model)}


class TestHandMade:
    def test_record(self):
        with torch.device("meta"):
            model = Plain(1_000_000, 1_000_000).to(torch.bfloat16)
        assert find_token_tables(model) == [
            TokenTable("embed.weight", "embedding", (1_000_000, D), torch.bfloat16, quantized=False),
            TokenTable("out.weight", "head", (1_000_000, D), torch.bfloat16, quantized=False),
        ]
        parameters = dict(model.named_parameters())
        assert all(parameters[table.path].shape == table.shape for table in find_token_tables(model))

    def test_tied_or_without_head(self):
        assert roles(Plain(tied=True)) == roles(Plain(outputs=None)) == {"embed.weight": "tied"}

    def test_tied_weight_has_the_name_that_named_parameters_gives(self):
        model = nn.Module()
        model.out = nn.Linear(D, V, bias=False)
        model.embed = nn.Embedding(V, D)
        model.embed.weight = model.out.weight
        assert roles(model) == {"out.weight": "tied"}

    def test_one_table_of_encoder_and_decoder(self):
        model = nn.Module()
        model.encoder, model.decoder = Plain(outputs=None), Plain()
        model.decoder.embed.weight = model.encoder.embed.weight
        assert roles(model) == {"encoder.embed.weight": "embedding", "decoder.out.weight": "head"}

    @pytest.mark.parametrize("positions", [V, 2 * V])
    @pytest.mark.parametrize("tied", [False, True])
    def test_position_tables_are_none(self, positions, tied):
        model = Plain(tied=tied)
        model.position_embedding = nn.Embedding(positions, D)
        model.pos_embed = nn.Parameter(torch.zeros(V, D))
        assert roles(model) == ({"embed.weight": "tied"} if tied else UNTIED)

    def test_tied_table_beside_a_larger_one(self):
        model = Plain(tied=True)
        model.per_layer = nn.Embedding(2 * V, D)
        assert roles(model) == {"embed.weight": "tied"}
        model.config = {"vocab_size": V, "text_config": {"vocab_size_per_layer_input": 2 * V}}
        assert roles(model) == {"embed.weight": "tied", "per_layer.weight": "embedding"}

    def test_any_module_with_num_embeddings_is_a_lookup(self):
        class VocabularyParallel(nn.Module):
            def __init__(self):
                super().__init__()
                self.num_embeddings = V
                self.weight = nn.Parameter(torch.zeros(V, D))

        model = Plain()
        model.embed = VocabularyParallel()
        assert roles(model) == {"out.weight": "head", "embed.weight": "embedding"}

    def test_no_table_and_no_module(self):
        assert find_token_tables(nn.Sequential(nn.Linear(D, D), nn.ReLU())) == []
        with pytest.raises(InputError, match=r"find_token_tables\(str\): a torch.nn.Module is needed"):
            find_token_tables("gpt2")


class Wrapped(nn.Module):
    """What PEFT puts in the place of a module, by the names of its children."""

    def __init__(self, module, kept, **children):
        super().__init__()
        self.add_module(kept, module)
        for name, child in children.items():
            self.add_module(name, nn.ModuleDict({"default": child}))


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class TestWrapped:
    @pytest.mark.parametrize("tied", [False, True])
    def test_lora(self, tied):
        model = Plain(tied=tied)
        model.out = Wrapped(model.out, "base_layer", lora_A=nn.Linear(D, 2), lora_B=nn.Linear(2, V))
        expected = {"embed.weight": "tied"} if tied else {"embed.weight": "embedding", "out.base_layer.weight": "head"}
        assert roles(model) == expected

    def test_the_frozen_and_the_trained_copy_are_both_tables(self):
        model = Plain()
        for name in ("embed", "out"):
            kept, copy = getattr(model, name), getattr(Plain(), name)
            setattr(model, name, Wrapped(kept, "original_module", modules_to_save=copy))
        assert roles(nn.ModuleDict({"base_model": model})) == {
            "base_model.embed.original_module.weight": "embedding",
            "base_model.embed.modules_to_save.default.weight": "embedding",
            "base_model.out.original_module.weight": "head",
            "base_model.out.modules_to_save.default.weight": "head",
        }

    def test_compiled(self):
        model = Plain()
        model.config = {"vocab_size": V}
        assert roles(torch.compile(model)) == {"_orig_mod." + path: role for path, role in UNTIED.items()}

    @pytest.mark.parametrize("tied", [False, True])
    def test_distributed(self, one_process, tied):
        expected = {"embed.weight": "tied"} if tied else UNTIED
        wrapped = DistributedDataParallel(Plain(tied=tied))
        assert roles(wrapped) == {"module." + path: role for path, role in expected.items()}
        sharded = fully_shard(Plain(tied=tied), mesh=init_device_mesh("cpu", (1,)))
        assert roles(sharded) == expected
        assert find_token_tables(sharded)[0].shape == (V, D)


# One of each family, and such as differ: encoder-decoders, state spaces, several vocabularies, names of their own.
# fmt: off
FAMILIES = [
    "bart", "bert", "biogpt", "bloom", "codegen", "cohere2", "ctrl", "deepseek_v3", "ernie4_5", "falcon",
    "falcon_mamba", "gemma", "gemma2", "gemma3", "gemma3_text", "git", "glm", "gpt2", "gpt_bigcode", "gpt_neox",
    "gpt_oss", "gptj", "granite", "helium", "llama", "lfm2", "mamba", "mistral", "mixtral", "modernbert-decoder",
    "moshi", "mpt", "olmo", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "roberta", "rwkv",
    "smollm3", "stablelm", "starcoder2", "whisper", "xglm", "xlm", "xlnet", "xlstm",
]
# fmt: on
# More than transformers says: a table that every layer of Gemma 4 looks tokens up in.
MORE = {"gemma4_text": {"model.embed_tokens_per_layer.weight": "embedding"}}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, *MORE, "t5", "mt5"])
def test_transformers_says_the_same(name, tied):
    auto = AutoModelForSeq2SeqLM if name in ("t5", "mt5") else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(CONFIG_MAPPING[name](num_hidden_layers=2, tie_word_embeddings=tied))
        model.tie_weights()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    names = {weight: name for name, weight in model.named_parameters()}
    expected = {names[embedding]: "tied" if head is embedding else "embedding"}
    expected |= {names[head]: "head"} if head is not embedding else {}
    assert roles(model) == expected | MORE.get(name, {})
