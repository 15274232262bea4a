"""Adapter folders: loaded whole or refused by the tensor that does not fit; fused into folders for stock mlx-lm."""

import json
import shutil
import sys
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import fuse as mlx_lm_fuse

from ember_mlx import InputError, cli, load
from ember_mlx.finetune import adapter_saving, adapters, safe_reading, safe_writing
from ember_mlx.finetune.run import run

pytestmark = pytest.mark.usefixtures("eager")

IDS = mx.array([[4, 60, 70, 80, 90]])


def fuse(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ember-mlx", "fuse", *map(str, arguments)])
    cli.main()


def fused_in_memory(model, **options):
    layers = [(path, module.fuse(**options)) for path, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(layers))
    return model


@pytest.mark.parametrize("base", ["untied", "tied"])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_a_fused_folder_gives_the_same_logits_in_stock_mlx_lm(parse, folders, tmp_path, monkeypatch, base, kind):
    run(parse("--fine-tune-type", kind, "--table-learning-rate", 1e-2, "--learning-rate", 1e-2, model=base))
    adapter = tmp_path / "adapters"
    fuse(monkeypatch, "--model", folders[base], "--adapter-path", adapter, "--save-path", tmp_path / "fused")
    model, _ = load(folders[base], adapter_path=adapter)
    unfused = model(IDS)
    stock, _ = mlx_lm.load(str(tmp_path / "fused"))
    if kind == "full":
        assert mx.array_equal(stock(IDS), unfused)
    else:
        assert mx.array_equal(stock(IDS), fused_in_memory(model)(IDS))
        # x (W + B A) and x W + (x B) A differ by rounding, whoever computes them.
        assert mx.allclose(stock(IDS), unfused, atol=1e-4)
    untrained, _ = load(folders[base])
    assert not mx.allclose(untrained(IDS), unfused, atol=1e-2)


def test_a_quantized_model_with_trained_tables_is_loaded_and_fused(parse, folders, tmp_path, monkeypatch):
    run(parse("--table-learning-rate", 1e-2, model="quantized"))
    adapter = tmp_path / "adapters"
    model, _, config = load(folders["quantized"], adapter_path=adapter, return_config=True)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert type(model.lm_head) is nn.Linear
    assert config["quantization"]["lm_head"] is False
    words = [
        "--model",
        folders["quantized"],
        "--adapter-path",
        adapter,
        "--save-path",
        tmp_path / "fused",
        "--overwrite",
    ]
    # The table was trained dequantized, and stays so.
    for again, kind in (([], nn.Linear), (["--requantize", 8], nn.QuantizedLinear), (["--dequantize"], nn.Linear)):
        fuse(monkeypatch, *words, "--overwrite", *again)
        stock, _ = mlx_lm.load(str(tmp_path / "fused"))
        assert type(stock.lm_head) is nn.Linear
        assert type(stock.layers[0].mlp.up_proj) is kind
        model, _ = load(folders["quantized"], adapter_path=adapter)
        assert mx.array_equal(stock(IDS), fused_in_memory(model, dequantize=kind is nn.Linear)(IDS))


def test_tables_alone_are_saved_loaded_and_fused(parse, folders, tmp_path, monkeypatch):
    run(parse("--num-layers", 0, "--table-learning-rate", 1e-2))
    adapter = tmp_path / "adapters"
    assert mx.load(str(adapter / "adapters.safetensors")).keys() == {adapters.REFUSAL}
    model, _ = load(folders["untied"], adapter_path=adapter)
    fuse(monkeypatch, "--model", folders["untied"], "--adapter-path", adapter, "--save-path", tmp_path / "fused")
    stock, _ = mlx_lm.load(str(tmp_path / "fused"))
    assert mx.array_equal(stock(IDS), model(IDS))


def test_an_adapter_of_stock_mlx_lm_loads_here(parse, folders, tmp_path):
    from mlx_lm import lora

    lora.run(parse("--num-layers", 2))
    stock, _ = mlx_lm.load(str(folders["untied"]), adapter_path=str(tmp_path / "adapters"))
    ours, _ = load(folders["untied"], adapter_path=tmp_path / "adapters")
    assert mx.array_equal(stock(IDS), ours(IDS))


def test_fuse_replaces_nothing_without_overwrite(parse, folders, tmp_path, monkeypatch, capsys):
    run(parse())
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "mine.txt").write_text("mine")
    arguments = [
        "--model",
        folders["untied"],
        "--adapter-path",
        tmp_path / "adapters",
        "--save-path",
        tmp_path / "fused",
    ]
    with pytest.raises(SystemExit) as exit_:
        fuse(monkeypatch, *arguments)
    assert exit_.value.code == 2
    assert "already exists; give another path, or --overwrite" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "fused").iterdir()] == ["mine.txt"]
    # A shard of an earlier, larger model: mlx-lm would load it over the new weights.
    base = folders["untied"] / "model.safetensors"
    (tmp_path / "fused" / "model-00002-of-00002.safetensors").write_bytes(base.read_bytes())
    with pytest.raises(SystemExit):
        fuse(monkeypatch, *arguments[:-1], folders["untied"], "--overwrite")
    assert "is the model itself" in capsys.readouterr().err
    fuse(monkeypatch, *arguments, "--overwrite")
    stock, _ = mlx_lm.load(str(tmp_path / "fused"))
    model, _ = load(folders["untied"], adapter_path=tmp_path / "adapters")
    assert mx.array_equal(stock(IDS), fused_in_memory(model)(IDS))
    assert (tmp_path / "fused" / "mine.txt").read_text() == "mine"
    assert mlx_lm_fuse.load is mlx_lm.load


@pytest.mark.parametrize(
    ("kind", "base", "message"),
    [
        ("lora", "tied", "lm_head.weight is not among the parameters to load"),
        ("lora", "deeper", r"model.layers.2.* \(and 13 more\) is not in adapters.safetensors"),
        ("full", "tied", "lm_head.weight is not among the parameters to load"),
    ],
)
def test_an_adapter_of_another_model_is_refused_by_the_tensor(parse, folders, tmp_path, kind, base, message):
    run(parse("--fine-tune-type", kind, "--num-layers", -1))
    adapter = tmp_path / "adapters"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"num_layers": -1}))
    with pytest.raises(InputError, match=message):
        load(folders[base], adapter_path=adapter)


def test_a_table_of_another_shape_is_refused(parse, folders, tmp_path):
    run(parse())
    file = tmp_path / "adapters" / "token_tables.safetensors"
    tables = {name: array[:-1] + 0 for name, array in mx.load(str(file)).items()}
    mx.eval(tables)
    mx.save_safetensors(str(file), tables, safe_reading.read_metadata(file, "here"))
    with pytest.raises(InputError, match=r"weight has shape \(259, 32\), but \(260, 32\) in this model"):
        load(folders["untied"], adapter_path=tmp_path / "adapters")


def test_an_adapter_folder_that_is_not_whole_is_refused(parse, folders, tmp_path):
    run(parse())
    adapter = tmp_path / "adapters"
    with pytest.raises(InputError, match="it has no adapter_config.json"):
        load(folders["untied"], adapter_path=tmp_path)
    (adapter / "token_tables.safetensors").rename(adapter / "elsewhere")
    with pytest.raises(InputError, match="it has no file token_tables.safetensors"):
        load(folders["untied"], adapter_path=adapter)
    (adapter / "token_tables.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(InputError, match="token_tables.safetensors cannot be read"):
        load(folders["untied"], adapter_path=adapter)
    tables = {"lm_head.weight": mx.zeros((260, 32))}
    mx.save_safetensors(str(adapter / "token_tables.safetensors"), tables)
    with pytest.raises(InputError, match="model.embed_tokens.weight is missing"):
        load(folders["untied"], adapter_path=adapter)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match="adapter_config.json holds a list where an object belongs"):
        load(folders["untied"], adapter_path=adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="adapter_config.json is not JSON that can be read"):
        load(folders["untied"], adapter_path=adapter)


def test_a_kill_between_the_files_of_a_save_is_seen_and_mended_by_resume(parse, folders, tmp_path, monkeypatch):
    common = ["--save-every", 1, "--table-learning-rate", 1e-2, "--learning-rate", 1e-2]
    run(parse(*common, "--iters", 1, adapter="first"))
    replace, outcomes = safe_writing.os.replace, []
    for scale in (20.0, 10.0):  # that of the first run, and another
        for at in range(5):
            folder, calls = tmp_path / f"{scale} {at}", []
            shutil.copytree(tmp_path / "first", folder)

            def killed(*paths, at=at, calls=calls):
                if len(calls) == at:
                    raise KeyboardInterrupt
                calls.append(paths)
                replace(*paths)

            args = parse(*common, "--iters", 2, "--overwrite", "--seed", 1, adapter=folder.name)
            args.lora_parameters["scale"] = scale
            with monkeypatch.context() as context:
                context.setattr(safe_writing.os, "replace", killed)
                with pytest.raises(KeyboardInterrupt):
                    run(args)
            try:
                load(folders["untied"], adapter_path=folder)
                outcomes.append(f"{scale}: whole")
            except InputError as error:
                outcomes.append(f"{scale}: " + ("of one save" if "--resume`" in str(error) else str(error)))
            run(args | {"overwrite": False, "resume": True})
            load(folders["untied"], adapter_path=folder)
    # adapters, tables, both as checkpoints, config: mixed is what lies between the first two, and with another scale
    # what lies before the config too.
    assert outcomes == ["20.0: whole", "20.0: of one save", *["20.0: whole"] * 3,
                        "10.0: whole", *["10.0: of one save"] * 4]  # fmt: skip


def test_the_pair_of_an_earlier_step_and_an_adapter_without_ids_load(parse, folders, tmp_path):
    run(parse("--save-every", 1, "--iters", 2, "--table-learning-rate", 1e-2))
    folder = tmp_path / "adapters"
    files = [folder / adapters.ADAPTERS, folder / adapters.TABLES]
    shutil.copy(folder / f"0000001_{adapters.TABLES}", files[1])
    message = "adapters.safetensors and token_tables.safetensors are not of one save"
    with pytest.raises(InputError, match=message):
        load(folders["untied"], adapter_path=folder)
    with pytest.raises(InputError, match=message):
        run(parse("--resume-adapter-file", files[0], adapter="second"))
    shutil.copy(folder / f"0000001_{adapters.ADAPTERS}", files[0])
    load(folders["untied"], adapter_path=folder)
    for name in ("best.safetensors", f"best_{adapters.ADAPTERS}"):
        alone = shutil.copy(files[0], tmp_path / name)
        with pytest.raises(InputError, match=f"the token tables that were saved with {name} are not there"):
            run(parse("--resume-adapter-file", alone, adapter="second"))
    for file in files:
        arrays = mx.load(str(file))
        mx.eval(arrays)
        mx.save_safetensors(str(file), arrays)
    config = json.loads((folder / adapters.CONFIG).read_text())
    with pytest.raises(InputError, match="adapter_config.json and adapters.safetensors are not of one save"):
        load(folders["untied"], adapter_path=folder)
    del config[adapters.SETTINGS_ID]
    (folder / adapters.CONFIG).write_text(json.dumps(config))
    load(folders["untied"], adapter_path=folder)


def test_the_same_run_writes_the_same_bytes(parse, tmp_path):
    for adapter in ("one", "other"):
        run(parse(adapter=adapter))
    for name in (adapters.ADAPTERS, adapters.TABLES):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_a_loaded_model_is_ready_to_write(parse, folders, tmp_path):
    args = parse()
    args.lora_parameters["dropout"] = 0.5
    run(args)
    model, tokenizer = load(folders["untied"], adapter_path=tmp_path / "adapters")
    assert not [name for name, module in model.named_modules() if module.training]
    assert mlx_lm.generate(model, tokenizer, "a", max_tokens=2) is not None
    assert [name for name, _ in tree_flatten(model.parameters()) if "lora_a" in name]


def test_tables_are_saved_in_the_order_of_the_options(tmp_path):
    """That of a set changes from process to process, and with it the bytes of the file."""
    names = [f"table{i}" for i in range(9)]
    model = SimpleNamespace(trainable_parameters=lambda: {name: mx.zeros(1) for name in sorted(names)})
    args = SimpleNamespace(fine_tune_type="lora", token_tables=names[::-1])
    files, _ = adapter_saving.Saver(tmp_path, model, args)._arrays()
    assert list(files[adapters.TABLES]) == names[::-1]
