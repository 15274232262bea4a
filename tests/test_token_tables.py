"""Token tables: hand-made awkward cases, then every architecture of mlx-lm against a trace of what its weights do."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures.build import Case, examine, model_files
from architectures.configs import NEEDS_METAL, NOT_BUILT, NOT_TIED
from architectures.trace import trace_token_tables
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text, gpt2
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny_models import tiny_llama

from ember_mlx.shared.errors import InputError
from ember_mlx.token_tables import LOOKED_FOR, TokenTable, find_token_tables

V, D = 173, 64


class Block(nn.Module):
    def __init__(self, inner: int = V):
        super().__init__()
        self.up = nn.Linear(D, inner)  # by default as many outputs as the vocabulary
        self.down = nn.Linear(inner, D)

    def __call__(self, x):
        return x + self.down(nn.relu(self.up(x)))


class Plain(nn.Module):
    """Somebody's own model: no args, no config."""

    def __init__(self, rows: int = V, outputs: int | None = V):
        super().__init__()
        self.embed = nn.Embedding(rows, D)
        self.blocks = [Block() for _ in range(2)]
        if outputs:
            self.out = nn.Linear(D, outputs)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.out(x) if "out" in self else self.embed.as_linear(x)


class Args:
    def __init__(self, **fields):
        self.__dict__.update(fields)


def tiny_gpt2(positions: int) -> nn.Module:
    return gpt2.Model(
        gpt2.ModelArgs(
            model_type="gpt2", n_ctx=positions, n_embd=D, n_head=2, n_layer=2, n_positions=positions,
            layer_norm_epsilon=1e-5, vocab_size=V,
        )
    )  # fmt: skip


def roles(model: nn.Module) -> dict[str, str]:
    return {table.path: table.role for table in find_token_tables(model)}


UNTIED = {"embed.weight": "embedding", "out.weight": "head"}


class TestHandMade:
    def test_record(self):
        model = tiny_llama(vocabulary=V, hidden=D)
        model.set_dtype(mx.bfloat16)
        assert find_token_tables(model) == [
            TokenTable("model.embed_tokens.weight", "embedding", (V, D), mx.bfloat16, quantized=False),
            TokenTable("lm_head.weight", "head", (V, D), mx.bfloat16, quantized=False),
        ]
        assert find_token_tables(model)[0].module_path == "model.embed_tokens"
        parameters = dict(tree_flatten(model.parameters()))
        assert all(parameters[table.path].shape == table.shape for table in find_token_tables(model))

    def test_without_args(self):
        assert roles(Plain()) == UNTIED == trace_token_tables(Plain())
        assert roles(Plain(outputs=None)) == {"embed.weight": "tied"} == trace_token_tables(Plain(outputs=None))

    def test_no_table(self):
        assert find_token_tables(nn.Sequential(nn.Linear(D, D), nn.ReLU())) == []
        vision = nn.Sequential(nn.Linear(D, D))
        vision.position_embedding = nn.Embedding(196, D)
        assert find_token_tables(vision) == []
        assert "nn.Embedding" in LOOKED_FOR

    def test_no_module(self):
        with pytest.raises(InputError, match=r"find_token_tables\(tuple\).*first item"):
            find_token_tables((Plain(), "tokenizer"))

    def test_sequential(self):
        model = nn.Sequential(nn.Embedding(V, D), Block(), nn.Linear(D, V))
        assert roles(model) == {"layers.0.weight": "embedding", "layers.2.weight": "head"}

    def test_block_that_is_not_in_a_list(self):
        model = Plain()
        model.blocks = []
        model.block = Block()
        assert roles(model) == UNTIED

    @pytest.mark.parametrize("tokens", [V, V + 10])
    @pytest.mark.parametrize("positions", [V, V + 5, V + 10, 2 * V])
    def test_positions_beside_stated_vocabulary(self, positions, tokens):
        model = tiny_gpt2(positions)
        model.model.wte = nn.Embedding(tokens, D)
        assert roles(model) == {"model.wte.weight": "tied"}

    def test_name_of_a_position_table_gives_way_to_structure(self):
        model = nn.Module()
        model.args = Args(vocab_size=V)
        model.pos_tokens = nn.Embedding(V, D)
        model.segments = nn.Embedding(2, D)
        assert roles(model) == {"pos_tokens.weight": "tied"}

    @pytest.mark.parametrize("outputs", [V, 192, None])
    @pytest.mark.parametrize("positions", [V, 192, 2 * V])
    def test_positions_without_args(self, positions, outputs):
        model = Plain(outputs=outputs)
        model.position_embedding_table = nn.Embedding(positions, D)
        assert roles(model) == (UNTIED if outputs else {"embed.weight": "tied"})

    def test_larger_table_of_no_telling_name(self):
        model = Plain()
        model.places = nn.Embedding(2 * V, D)
        assert roles(model) == UNTIED

    def test_position_array_is_no_head(self):
        model = Plain(outputs=None)
        model.pos_embedding = mx.zeros((V, D))
        assert roles(model) == {"embed.weight": "tied"}

    def test_bare_head(self):
        model = Plain(outputs=None)
        model.unembed = mx.zeros((V, D))
        assert roles(model) == {"embed.weight": "embedding", "unembed": "head"}

    def test_hashed_ngrams(self):
        model = Plain()
        model.args = Args(vocab_size=V)
        model.ngrams = [nn.Embedding(2 * V + i, 16) for i in (1, 3)]
        assert roles(model) == UNTIED

    @pytest.mark.parametrize(("rows", "outputs"), [(192, 192), (192, V), (V, 192), (1000, 1000)])
    def test_padded_or_grown_beyond_what_args_state(self, rows, outputs):
        model = Plain(rows, outputs)
        model.args = Args(vocab_size=V)
        model.positions = nn.Embedding(2048, D)
        assert roles(model) == UNTIED

    def test_grown_and_tied_beside_a_larger_table(self):
        model = Plain(192, None)
        model.args = Args(vocab_size=V)
        model.places = nn.Embedding(2048, D)
        assert roles(model) == {"embed.weight": "tied"}

    def test_smaller_table_before_the_tied_one(self):
        model = nn.Module()
        model.args = Args(vocab_size=V, vocab_size_per_layer_input=151)
        model.per_layer = nn.Embedding(151, D)
        model.embed = nn.Embedding(V, D)
        assert roles(model) == {"per_layer.weight": "embedding", "embed.weight": "tied"}

    def test_fewer_rows_than_args_state(self):
        model = Plain()
        model.args = Args(vocab_size=50_000)
        assert roles(model) == UNTIED

    def test_wide_projection_is_no_padded_head(self):
        model = Plain(outputs=None)
        model.args = Args(vocab_size=V)
        model.project = nn.Linear(D, 4 * V)
        assert roles(model) == {"embed.weight": "tied"}

    def test_nested_config(self):
        model = nn.Module()
        model.config = {"text_config": {"vocab_size": V}, "vision_config": {"hidden_size": 8}}
        model.language_model = Plain(outputs=None)
        model.vision_tower = nn.Module()
        model.vision_tower.table = nn.Embedding(4 * V, D)
        assert roles(model) == {"language_model.embed.weight": "tied"}

    @pytest.mark.parametrize("field", ["vocab_size", "n_vocab", "num_vocab", "padded_vocab_size"])
    def test_what_a_vocabulary_is_called(self, field):
        model = Plain(outputs=None)
        model.args = Args(**{field: V})
        model.places = nn.Embedding(2 * V, D)
        assert roles(model) == {"embed.weight": "tied"}

    def test_value_embeddings_are_tables_and_not_tied(self):
        model = Plain(outputs=None)
        model.value_tables = [nn.Embedding(V, D)]
        assert roles(model) == {"embed.weight": "tied", "value_tables.0.weight": "embedding"}

    def test_two_places_one_module(self):
        model = Plain(outputs=None)
        model.out = model.embed
        assert roles(model) == {"embed.weight": "tied"}

    def test_head_left_unused(self):
        class Obedient(Plain):
            def __call__(self, ids):
                x = self.embed(ids)
                return self.embed.as_linear(x) if self.args.tie_word_embeddings else self.out(x)

        for kind, expected in ((Obedient, {"embed.weight": "tied"}), (Plain, UNTIED)):
            model = kind()
            model.args = Args(vocab_size=V, tie_word_embeddings=True)
            assert roles(model) == expected == trace_token_tables(model)

    def test_gemma3_loaded_without_head(self):
        model = gemma3_text.Model(
            gemma3_text.ModelArgs("gemma3_text", hidden_size=D, num_hidden_layers=2, intermediate_size=96, vocab_size=V)
        )
        assert roles(model) == {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}
        model.sanitize({"model.embed_tokens.weight": mx.zeros((V, D))})
        assert roles(model) == {"model.embed_tokens.weight": "tied"}


class TestWrapped:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize(
        ("mode", "group_size", "bits", "dtype"),
        [("affine", 32, 4, mx.float16), ("affine", 64, 3, mx.float16), ("mxfp4", 32, 4, mx.bfloat16)],
    )
    def test_quantized(self, tied, mode, group_size, bits, dtype):
        model = tiny_llama(tied, vocabulary=V, hidden=D)
        model.set_dtype(mx.float16)
        plain = find_token_tables(model)
        # Some layers are 96 wide, which not every group size divides.
        tables = {table.module_path for table in plain}
        nn.quantize(model, group_size, bits, mode=mode, class_predicate=lambda path, _: path in tables)
        expected = [TokenTable(t.path, t.role, (V, D), dtype, quantized=True) for t in plain]
        assert find_token_tables(model) == expected
        assert expected[0].dtype == model.model.embed_tokens(mx.array([0])).dtype

    def test_scales_are_no_head(self):
        model = Plain(outputs=None)
        model.per_layer = nn.Embedding(V, 2)  # as wide as the scales of the packed table
        nn.quantize(model, 32, 4, class_predicate=lambda path, _: path == "embed")
        assert roles(model) == {"embed.weight": "tied", "per_layer.weight": "embedding"}

    @pytest.mark.parametrize("use_dora", [False, True])
    @pytest.mark.parametrize("quantize", [False, True])
    def test_adapters_around_tables(self, quantize, use_dora):
        model = tiny_llama(vocabulary=V, hidden=D)
        if quantize:
            nn.quantize(model, 32, 4)
        keys = ["self_attn.q_proj", "model.embed_tokens", "lm_head"]
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": keys}, use_dora)
        tables = find_token_tables(model)
        assert [(t.path, t.role, t.shape, t.quantized) for t in tables] == [
            ("model.embed_tokens.embedding.weight", "embedding", (V, D), quantize),
            ("lm_head.linear.weight", "head", (V, D), quantize),
        ]

    def test_adapter_as_wide_as_the_table_is_no_head(self):
        model = Plain(outputs=None)
        model.layers = model.blocks
        linear_to_lora_layers(model, 2, {"rank": D, "scale": 1.0, "dropout": 0.0, "keys": ["embed"]})
        assert roles(model) == {"embed.embedding.weight": "tied"}

    def test_adapter_around_a_leaf_in_a_list(self):
        model = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, V))
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": ["layers.1"]})
        assert roles(model) == {"layers.0.weight": "embedding", "layers.1.linear.weight": "head"}

    def test_adapted_position_table(self):
        model = tiny_gpt2(V)
        keys = ["model.wte", "model.wpe"]
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": keys})
        assert roles(model) == {"model.wte.embedding.weight": "tied"}


def test_costs_nothing():
    mx.synchronize()
    before = mx.get_active_memory()
    model = nn.Module()
    model.embed = nn.Embedding(1_000_000, 4096)  # 16 GB if it were computed
    assert roles(model) == {"embed.weight": "tied"}
    assert mx.get_active_memory() - before < 1e6


BUILT = [name for name in model_files() if name not in NOT_BUILT]
CASES = [(name, tied) for name in BUILT for tied in (False, True) if not (tied and name in NOT_TIED)]


@pytest.mark.parametrize(("name", "tied"), CASES, ids=[f"{n}-{'tied' if t else 'untied'}" for n, t in CASES])
def test_architecture(name, tied):
    case = examine(name, tied)
    if not isinstance(case, Case):
        pytest.fail(
            f"mlx_lm/models/{name}.py could not be built: {case}. Give it what its ModelArgs needs in OVERRIDES "
            "(tests/architectures/configs.py), or list it in NOT_BUILT with this reason."
        )
    assert set(case.traced.values()) in ({"tied"}, {"embedding", "head"}, {"embedding", "tied"})
    assert {t.path: t.role for t in case.found} == case.traced
    assert [(t.path, t.role, t.shape) for t in case.quantized] == [(t.path, t.role, t.shape) for t in case.found]
    assert case.adapted == case.quantized


@pytest.mark.parametrize(("name", "tied"), [(n, False) for n in NOT_BUILT] + [(n, True) for n in NOT_TIED])
def test_not_built_for_the_listed_reason(name, tied):
    if name in NEEDS_METAL and mx.metal.is_available():
        pytest.skip(
            "written for a machine without Metal: kernels in its layers have no gradient and run on the GPU only"
        )
    case = examine(name, tied)
    assert not isinstance(case, Case), f"{name} can be built now: take it out of tests/architectures/configs.py"
    assert (NOT_TIED if tied else NOT_BUILT)[name] in case


def test_count():
    assert set(NOT_BUILT) <= set(model_files()), "NOT_BUILT lists files that this mlx-lm does not have"
    built = [name for name in BUILT if isinstance(examine(name, False), Case)]
    print(f"\n{len(built)} of {len(model_files())} files of mlx_lm/models built and traced")
    assert len(built) >= 100
