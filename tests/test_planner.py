"""The memory planner: its bytes against MLX's own arrays, its order against MLX's rules, its command line."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, quantize_model
from planned_models import QWEN
from processes import run_here

from ember_mlx.commands.plan import main
from ember_mlx.finetune import optimizer_names, options
from ember_mlx.finetune.build_optimizer import build_optimizer
from ember_mlx.finetune.choices import choose
from ember_mlx.finetune.quantized_layers import quantize_layers
from ember_mlx.finetune.trainable import make_trainable, shapes_of
from ember_mlx.optimizers import AdamMini, FlashAdamW, FlashLion, SinkGD
from ember_mlx.planner import advice, alternatives, plan, read_architecture, run_of
from ember_mlx.planner.evaluation import DEVICES, peak_memory
from ember_mlx.planner.inputs import find_config
from ember_mlx.planner.optimizer_state import state_of
from ember_mlx.planner.savings import savings
from ember_mlx.planner.step import build_step
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.sizes_in_memory import CHUNKED_LOGITS, words_of_a_sharded_head
from ember_mlx.shared.units import in_units

QWEN_2 = {**QWEN, "model_type": "qwen2", "head_dim": 16, "tie_word_embeddings": True}


def planned(config, *words, backend="cpu"):
    args = options.parse([*words, "--max-seq-length", "33"])
    model = read_architecture(config, "config.json")
    if args.quantize:
        model = model.with_layers_of(args.quantize)
    return plan(model, run_of(args, model), backend)


def made(config, *words):
    """Bytes of weights, of what trains and of optimizer state, as MLX has them."""
    args = options.parse(list(words))
    model_class, arguments_class = _get_classes(config)
    model = model_class(arguments_class.from_dict(config))
    model.set_dtype(mx.bfloat16)
    if "quantization" in config:
        model, _ = quantize_model(model, config, **config["quantization"])
    if args.quantize:
        quantize_layers(model, dict(config), args.quantize, "model")
    choices = choose(args, shapes_of(model))
    make_trainable(model, args, choices)
    optimizer = build_optimizer(model, args, choices)
    arrays = (model.parameters(), model.trainable_parameters(), optimizer.state)
    return [sum(array.nbytes for _, array in tree_flatten(tree) if array.ndim) for tree in arrays]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (QWEN, ["--optimizer", "adamw"]),
        (QWEN, ["--fine-tune-type", "full", "--table-optimizer", "adafactor", "--optimizer", "adafactor"]),
        (QWEN, ["--num-layers", "2", "--train-tables", "head", "--table-optimizer", "sgd"]),
        (QWEN_2, ["--fine-tune-type", "full", "--table-optimizer", "adamw", "--num-layers", "2"]),
        *(
            (config, ["--optimizer", name, *full, "--table-optimizer", "sage"])
            for config, full in ((QWEN, []), (QWEN_2, ["--fine-tune-type", "full"]))
            for name in optimizer_names.BODY[1:]
        ),
        (QWEN_2 | {"quantization": {"bits": 4, "group_size": 32}}, []),
        (QWEN_2 | {"quantization": {"bits": 4, "group_size": 32}}, ["--train-tables", "none"]),
        (QWEN, ["--quantize", "4"]),
        (QWEN_2, ["--quantize", "3", "--train-tables", "none"]),
    ],
)
def test_weights_and_state_are_those_that_mlx_has_to_the_byte(config, words):
    found = planned(config, *words)
    assert [found.weights, found.trainable, found.optimizer_state] == made(config, *words)
    assert found.gradients == found.trainable


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("adam-mini", AdamMini),
        ("adam-mini int8", partial(AdamMini, momentum="int8")),
        ("sinkgd", SinkGD),
        ("flash-adamw", FlashAdamW),
        ("flash-lion", FlashLion),
    ],
)
def test_the_state_of_the_optimizers_for_the_body_is_in_the_table(name, optimizer):
    weights = {"w": mx.zeros((6, 4)), "b": mx.zeros((5,))}
    made = optimizer(1e-3)
    made.init(weights)
    for path, weight in weights.items():
        arrays = [array for _, array in tree_flatten(made.state[path])]
        kept = state_of(name, weight.shape, 4)
        assert sorted((array.size, array.itemsize) for array in arrays) == sorted(kept)


def test_a_table_under_adamw_is_stepped_in_place_without_a_copy_of_its_gradient():
    """A CPU took 215.7 MB: weights, state and gradients, and blocks of squares for the norm."""
    big = QWEN | {"vocab_size": 200_000, "num_hidden_layers": 1}
    found = planned(big, "--table-optimizer", "adamw", "--batch-size", "1")
    fixed = found.weights + found.optimizer_state + found.gradients
    assert fixed < found.peak < fixed + 2 * 200_000 * QWEN["hidden_size"]
    assert found.peak == pytest.approx(215.7e6, rel=0.05)


@pytest.mark.parametrize(
    ("shape", "measured"),  # over the weights, without state, as the trials of the streaming step had it
    [((256, 36, 9496, 32), 131.1 / 128.1), ((512, 12, 16384, 64), 223 / 212)],
)
def test_a_streamed_step_takes_little_more_than_its_weights(shape, measured):
    hidden, layers, vocabulary, tokens = shape
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocabulary, "head_dim": hidden // 4}
    config = QWEN | sizes | {"intermediate_size": 3 * hidden, "torch_dtype": "float32"}
    model = read_architecture(config, "config.json")
    words = ["--fine-tune-type", "full", "--no-stream", "--num-layers", "-1", "--optimizer", "sgd", "--batch-size", "1"]
    run = run_of(options.parse([*words, "--max-seq-length", str(tokens + 1)]), model)
    found = plan(model, replace(run, stream=True), "cpu")
    assert (found.peak - found.optimizer_state) / found.weights == pytest.approx(measured, rel=0.1)
    # The part above the weights, too, which the 10 % of the whole would hide.
    assert found.peak - found.optimizer_state - found.weights < 2 * (measured - 1) * found.weights
    assert found.peak < plan(model, run, "cpu").peak


def test_chunks_never_hold_the_logits_of_the_whole_vocabulary():
    """Those of one slice, in bfloat16 and in float32, if the device keeps up; not those of all 75."""
    model = read_architecture(QWEN | {"vocab_size": 151_936, "num_hidden_layers": 1}, "config.json")
    run = run_of(options.parse(["--chunked-loss", "--batch-size", "1", "--max-seq-length", "4097"]), model)
    step = build_step(model, run, "cpu")
    one_after_another = replace(DEVICES["cpu"], ahead=0)
    logits = peak_memory(step.results, step.existing, one_after_another).most["logits"]
    assert logits < 6.5 * CHUNKED_LOGITS


def test_a_sharded_head_has_four_slices_and_with_chunked_loss_those_that_it_takes():
    qwen = {"rows": 151_936 // 2, "tokens": 2 * 4096}
    assert words_of_a_sharded_head(**qwen, chunked=False) == 151_936 // 8
    assert words_of_a_sharded_head(**qwen, chunked=True) == CHUNKED_LOGITS // (2 * 4096)
    assert words_of_a_sharded_head(rows=4096, tokens=64, chunked=False) >= 4096


def test_stochastic_rounding_writes_a_new_table_where_the_nearest_is_written_in_place():
    big = QWEN | {"vocab_size": 20_000}
    words = ("--batch-size", "1", "--table-rounding")
    nearest, stochastic = (planned(big, *words, how, backend="cuda") for how in ("nearest", "stochastic"))
    # The peak with nearest is another moment, when all gradients are there.
    assert stochastic.at_peak["weights"] - nearest.at_peak["weights"] >= 20_000 * QWEN["hidden_size"] * 2
    assert stochastic.peak > nearest.peak
    assert stochastic.optimizer_state == nearest.optimizer_state
    assert planned(big, *words[:2], backend="cuda").peak == stochastic.peak


def test_what_should_save_memory_does():
    long = {**QWEN, "vocab_size": 4096, "num_hidden_layers": 8}
    model = read_architecture(long, "config.json")
    words = ["--fine-tune-type", "full", "--no-stream", "--optimizer", "adamw", "--max-seq-length", "129"]
    run = run_of(options.parse(words), model)
    peaks = {
        "as it is": plan(model, run, "cuda").peak,
        "checkpoint": plan(model, replace(run, grad_checkpoint=True), "cuda").peak,
        "shorter": plan(model, replace(run, length=64), "cuda").peak,
        "adamw": plan(model, replace(run, table_optimizer="adamw"), "cuda").peak,
        "metal": plan(model, run, "metal").peak,
    }
    assert peaks["checkpoint"] < peaks["as it is"] > peaks["shorter"]
    assert peaks["as it is"] < peaks["adamw"]
    assert peaks["as it is"] < peaks["metal"]  # whose attention keeps a number for each pair of tokens


def test_advice_goes_on_until_it_fits():
    model = read_architecture(QWEN | {"num_hidden_layers": 8}, "config.json")
    args = options.parse(["--max-seq-length", "1024"])
    run = run_of(args, model)
    peak = plan(model, run, "metal").peak
    assert advice(args, model, run, "metal", peak) == []
    few = advice(args, model, run, "metal", peak - 1)
    many = advice(args, model, run, "metal", 1)
    assert [flags for flags, _ in few] == ["--grad-checkpoint"]
    assert few == many[:1]
    peaks = [after.peak for _, after in many]
    assert peaks == sorted(peaks, reverse=True)
    assert many[-1][1].peak < peak / 10
    names = [flags.split()[0] for flags, _ in many]
    assert len(set(names)) == len(names)  # of --max-seq-length 512 and 256, the last


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.000 kB"),
        (12e9, "12.00 GB"),
        (9.99996e6, "10.00 MB"),
        (999.96e6, "1.000 GB"),
        (1.5e19, "15.00 EB"),
    ],
)
def test_bytes_are_written_as_people_do(nbytes, text):
    assert in_units(nbytes) == text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": -1}, "hidden_size: -1 must be a whole number from 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 must be"),
        ({"vocab_size": 1e8}, "vocab_size: 100000000.0 must be"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"intermediate_size": "big"}, "intermediate_size: 'big' must be"),
        ({"vocab_size": None}, "vocab_size missing"),
        ({"quantization": {"bits": 99}}, "quantization: bits: 99 must be"),
        ({"quantization": {"bits": 4, "lm_head": {"group_size": 0}}}, "quantization: lm_head: group_size: 0 must be"),
    ],
)
def test_sizes_that_cannot_be_are_refused(config, words):
    with pytest.raises(InputError, match=words):
        read_architecture(QWEN | config, "config.json")


def test_an_unknown_architecture_says_what_is_missing_and_is_planned_as_far_as_it_goes():
    model = read_architecture({"model_type": "new", "vocab_size": 384, "n_embd": 64}, "config.json")
    assert "num_hidden_layers, num_attention_heads, intermediate_size" in model.notes[0]
    found = plan(model, run_of(options.parse(["--max-seq-length", "33"]), model), "cpu")
    assert found.weights == (2 * 384 * 64 + 64) * 2
    assert found.peak > found.weights + found.gradients


def test_what_others_quantized_leaves_the_tables_as_they_are():
    packed = {"bits": 4, "group_size": 32}
    for config, trained in (
        ({"quantization": packed}, 0),
        ({"quantization_config": packed | {"quant_method": "awq"}}, 2),
    ):
        model = read_architecture(QWEN | config, "config.json")
        assert [table.nbytes for table in model.tables()].count(None) == trained
        assert all(linear.nbytes for linear in model.linears(0))


def test_a_module_may_be_packed_in_its_own_way():
    own = {"bits": 4, "group_size": 32, "model.embed_tokens": {"bits": 8}, "lm_head": False}
    embedding, head = read_architecture(QWEN | {"quantization": own}, "config.json").tables()
    numbers = embedding.rows * embedding.columns
    assert embedding.nbytes == numbers + 4 * numbers // 64  # MLX's groups of 64, each with a scale and a bias
    assert head.nbytes is None


@pytest.mark.parametrize("layers", [[], ["--num-layers", "18"]])
def test_advice_is_what_its_flags_do(layers):
    model = read_architecture(QWEN | {"num_hidden_layers": 20, "intermediate_size": 4096}, "config.json")
    words = ["--fine-tune-type", "full", "--max-seq-length", "600", *layers]
    args = options.parse(words)
    changes = advice(args, model, run_of(args, model), "cpu", 1)
    assert any("--fine-tune-type lora" in flags for flags, _ in changes)
    for flags, after in changes:
        words += flags.split()
        assert plan(model, run_of(options.parse(words), model), "cpu") == after


def test_where_no_layer_trains_the_tables_must():
    model = read_architecture(QWEN, "config.json")
    for kind in ("lora", "full"):
        args = options.parse(["--num-layers", "0", "--fine-tune-type", kind])
        run = run_of(args, model)
        flags = [*alternatives(args, model, run), *(changed for changed, _ in advice(args, model, run, "cpu", 1))]
        assert "--train-tables none" not in flags
    args = options.parse([])
    assert "--train-tables none" in alternatives(args, model, run_of(args, model))


def test_the_command_says_whether_it_fits(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    words = ["--model", str(tmp_path), "--max-seq-length", "65", "--backend", "metal"]
    main([*words, "--memory", "1GB"])
    said = capsys.readouterr().out
    assert "it fits" in said
    assert "predicted peak" in said
    main([*words, "--memory", "3MB", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert not report["fits"]
    assert report["changes"][0]["flags"] == "--grad-checkpoint"
    assert report["planned"]["peak"] == sum(report["planned"]["at_peak"].values())


@pytest.mark.parametrize(("backend", "lacks"), [("cuda", "no CUDA GPU"), ("metal", "no Metal")])
def test_no_other_machine_is_judged_by_the_memory_of_this_one(tmp_path, capsys, monkeypatch, backend, lacks):
    monkeypatch.setattr("ember_mlx.planner.machine.backend", lambda: "cpu")
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    words = ["--model", str(tmp_path), "--max-seq-length", "65", "--backend", backend]
    main(words)
    said = capsys.readouterr().out
    assert f"\nWhether it fits is not known. Give --memory: this machine has {lacks}.\n" in said
    main([*words, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["memory"], report["fits"], report["changes"]) == (None, None, [])
    main([*words, "--memory-limit", "1GB"])
    assert "--memory-limit is 1.000 GB: it fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "0"], "--memory 0: must be a size of at least 1MB"),
        (["--memory=-3GB"], "--memory -3GB: must be a size"),
        (["--memory", "nan"], "--memory nan: must be a size"),
        (["--memory", "16"], "--memory 16: must be a size of at least 1MB, in MB, GB, MiB or GiB"),
        (["--train-tables", "none", "--num-layers", "9"], "the model has 3 layers"),
        (["--train-tables", "none", "--num-layers", "0"], "nothing is left to train"),
        (["--batch-size", "0"], "--batch-size 0: must be"),
    ],
)
def test_bad_options_are_one_line(tmp_path, words, message):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    with pytest.raises(InputError, match=message):
        main(["--model", str(tmp_path / "config.json"), *words])


def test_a_model_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="has no config.json"):
        main(["--model", str(tmp_path)])
    with pytest.raises(InputError, match="no such file or folder"):
        main(["--model", str(tmp_path / "nowhere")])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no such folder here, and the Hugging Face hub gave no config.json"):
        main(["--model", "nobody/nothing-here"])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json cannot be read"):
        main(["--model", str(tmp_path)])


def test_the_weights_that_are_there_say_their_dtype(tmp_path):
    # mlx_lm.convert --dtype leaves the old one in config.json.
    (tmp_path / "config.json").write_text(json.dumps(QWEN | {"torch_dtype": "float32"}))
    assert find_config(str(tmp_path))[0]["torch_dtype"] == "float32"
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"w": mx.zeros(3, mx.bfloat16)})
    assert find_config(str(tmp_path))[0]["torch_dtype"] == "bfloat16"
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert find_config(str(tmp_path))[0]["torch_dtype"] == "float32"


def test_a_mac_keeps_a_quarter_of_its_memory(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    main(["--model", str(tmp_path), "--max-seq-length", "64", "--memory", "16GB", "--backend", "metal"])
    assert "Of --memory 16GB a Mac's GPU may use about 75 % by default, 12.00 GB: it fits" in capsys.readouterr().out


def test_train_warns_only_when_it_does_not_fit(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    args = options.parse(["--model", str(tmp_path), "--max-seq-length", "64", "--no-auto-savings"])
    assert savings(args, set()) == ({}, [])
    monkeypatch.setattr("ember_mlx.planner.machine.memory", lambda asked, backend: (1000, "this machine has"))
    (said,) = savings(args, set())[1]
    assert "this machine has 1.000 kB" in said
    (tmp_path / "config.json").unlink()
    assert savings(args, set()) == ({}, [])


def test_the_benchmark_compares_with_what_was_measured(tmp_path, monkeypatch, capsys):
    row = "smollm2-135m/tied/lora/1x512/ember/checkpoint"
    machine = {"backend": "cuda", "device": "a GPU", "versions": {"mlx": "1.2.3"}}
    (tmp_path / "measured.json").write_text(json.dumps({"machine": machine, "rows": {row: {"peak_memory": 10**9}}}))
    script = Path(__file__).parents[1] / "examples" / "benchmarks" / "planned_memory.py"
    words = ["--measured", tmp_path / "measured.json", "--out", tmp_path / "table.md"]
    run_here(script, *words, monkeypatch=monkeypatch, capsys=capsys)
    assert f"| {row} | " in (tmp_path / "table.md").read_text()


def test_the_planner_needs_no_mlx():
    code = (
        "import sys; sys.modules['mlx.core'] = None; import ember_mlx.planner as p;"
        f"m = p.read_architecture({QWEN!r}, 'c'); print(m.vocabulary)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "384", done.stderr
