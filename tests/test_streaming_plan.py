"""The plan of a streamed step, beside what one takes here, and where streaming is recommended."""

import gc
import json
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from processes import run_here

from ember_mlx.commands.plan import main
from ember_mlx.finetune import options
from ember_mlx.finetune.build_optimizer import build_optimizer
from ember_mlx.finetune.choices import choose
from ember_mlx.finetune.trainable import make_trainable, shapes_of
from ember_mlx.planner import advice, plan, read_architecture, run_of, streamed_tables
from ember_mlx.planner.operations import operations
from ember_mlx.planner.streaming_advice import recommendations
from ember_mlx.shared import sizes_in_memory
from ember_mlx.streaming import StreamedStep
from ember_mlx.streaming.shards import Group

QWEN = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
SMALL = QWEN | {"num_hidden_layers": 2, "vocab_size": 512}
FULL = ["--fine-tune-type", "full"]
ORDINARY = [*FULL, "--no-stream"]
LONG = QWEN | {"num_hidden_layers": 24, "vocab_size": 512}


def run_with(config, *words, length=128):
    model = read_architecture(config, "config.json")
    words = ["--batch-size", "1", "--max-seq-length", str(length + 1), *words]
    return model, run_of(options.parse(words), model)


def made(config, args):
    model_class, arguments_class = _get_classes(config)
    model = model_class(arguments_class.from_dict(config))
    choices = choose(args, shapes_of(model))
    make_trainable(model, args, choices)
    return model, build_optimizer(model.train(), args, choices)


def taken(config, words, length=128, reduce=None, group=None, batches=1):
    """The peak of the second step of a model made here, of so many batches."""
    args = options.parse(["--stream", *words])
    model, optimizer = made(config, args)
    batch = mx.random.randint(0, config["vocab_size"], (1, length + 1)), mx.array([[0, length]])
    mx.eval(model.parameters(), optimizer.state, batch)
    step = StreamedStep(model, optimizer, keep_inputs=args.keep_inputs or 1, reduce=reduce, group=group)
    step.accumulated([batch] * batches)
    gc.collect()
    own = sum(array.nbytes for _, array in tree_flatten((model.parameters(), optimizer.state)))
    others = mx.get_active_memory() - own  # of other tests
    mx.clear_cache()  # a cached buffer may serve a smaller array, and counts whole
    mx.reset_peak_memory()
    step.accumulated([batch] * batches)
    return mx.get_peak_memory() - others


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (QWEN, [*FULL, "--optimizer", "sinkgd"]),
        (QWEN | {"tie_word_embeddings": True}, [*FULL, "--optimizer", "adamw"]),
        (QWEN, [*FULL, "--optimizer", "sgd", "--table-optimizer", "adamw"]),
        (QWEN, ["--optimizer", "adamw"]),
        (QWEN | {"num_hidden_layers": 8}, [*FULL, "--optimizer", "adam-mini", "--keep-inputs", "3"]),
    ],
    ids=["stateless", "tied", "whole tables", "lora", "every third input"],
)
def test_a_streamed_step_is_planned_within_a_tenth(config, words):
    model, run = run_with(config, "--stream", *words)
    predicted = max(plan(model, run, "cpu").phases.values())
    assert predicted == pytest.approx(taken(config, words), rel=0.1)


@pytest.mark.parametrize(
    ("config", "words"),
    [(SMALL, FULL), (SMALL | {"tie_word_embeddings": True}, [])],
    ids=["full", "tied lora"],
)
def test_one_of_several_workers_sends_what_is_planned(config, words):
    """The other worker's batch is this one's, so that the two look up the rows of one; the last step is counted."""
    sent = []
    model, run = run_with(config, "--stream", *words, length=32)
    planned = plan(model, replace(run, workers=2), "cpu")
    mx.disable_compile()
    try:
        taken(config, words, 32, lambda array: sent.append(array.nbytes) or array + array)
    finally:
        mx.enable_compile()
    (_, *of_steps), step = sent, len(sent) // 2  # the first asks how many there are
    assert sum(of_steps[-step:]) == pytest.approx(sum(planned.traffic.payload.values()), rel=0.02)


def test_the_peak_of_one_of_several_workers_is_planned_with_its_part_of_the_state():
    words = [*FULL, "--optimizer", "adamw", "--shard-optimizer"]
    model, run = run_with(QWEN, "--stream", *words)
    planned = plan(model, replace(run, workers=2, shard_optimizer=True), "cpu")
    group = Group(0, 2, lambda array: mx.split(array + array, 2)[0], lambda array: mx.concatenate([array, array]))
    peak = taken(QWEN, words, reduce=lambda array: array + array, group=group)
    assert max(planned.phases.values()) == pytest.approx(peak, rel=0.1)
    assert planned.optimizer_state < 0.6 * plan(model, replace(run, workers=2), "cpu").optimizer_state


def test_the_phases_are_those_of_a_step():
    model, run = run_with(QWEN, *FULL, "--stream")
    found = plan(model, run, "cpu")
    assert list(found.phases) == ["forward", "loss", "head", "layers", "embedding"]
    assert min(found.phases.values()) > found.weights + found.optimizer_state
    assert max(found.phases.values()) <= found.peak == sum(found.at_peak.values())
    model, tied = run_with(QWEN | {"tie_word_embeddings": True}, *FULL, "--stream")
    assert "head" not in plan(model, tied, "cpu").phases  # its table is stepped at the end
    assert plan(model, replace(run, stream=False), "cpu").phases == {}


def test_the_head_of_a_gpu_is_planned_in_its_own_blocks(monkeypatch):
    """A logit takes 2 bytes, and what is made of it two to three times 4."""
    config = QWEN | {"hidden_size": 512, "vocab_size": 32768, "torch_dtype": "bfloat16"}
    model, run = run_with(config, *FULL, "--stream", length=256)
    found = []
    for share in (8, 16):
        monkeypatch.setattr(sizes_in_memory, "SHARE_OF_SCRATCH", share)
        planned = plan(model, run, "cuda")
        rows, stepped, *_ = sizes_in_memory.blocks_of_a_head(32768, 512, 2, 256, planned.weights, True)
        found.append((rows, stepped, planned.phases))
    (rows, stepped, large), (fewer, fewer_stepped, small) = found
    assert rows > fewer
    assert stepped > fewer_stepped
    assert 8 <= (large["loss"] - small["loss"]) / (rows - fewer) / 256 <= 14
    assert large["head"] > small["head"]


def test_accumulation_keeps_the_inputs_of_all_batches():
    model, run = run_with(LONG, *FULL, "--stream")
    two, four = (plan(model, replace(run, micro_batches=number), "cpu").phases["layers"] for number in (2, 4))
    inputs = 2 * 25 * 128 * 128 * 4
    assert four - two == pytest.approx(inputs, rel=0.1)


@pytest.mark.parametrize("words", [[*FULL, "--optimizer", "sinkgd"], ["--optimizer", "adamw"]])
def test_a_streamed_step_of_several_batches_is_planned_within_a_tenth(words):
    model, run = run_with(QWEN, "--stream", *words)
    predicted = max(plan(model, replace(run, micro_batches=4), "cpu").phases.values())
    assert predicted == pytest.approx(taken(QWEN, words, batches=4), rel=0.1)


def test_several_batches_are_planned_where_the_lowest_layers_are_frozen():
    model, run = run_with(QWEN, "--stream", "--train-tables", "head", "--num-layers", "2")
    one, two = (plan(model, replace(run, micro_batches=number), "cuda").phases["layers"] for number in (1, 2))
    assert one < two


def test_streaming_is_recommended_where_it_pays_and_never_where_it_cannot_be():
    for config in (QWEN, LONG):
        model, run = run_with(config, *ORDINARY)
        planned = plan(model, run, "cuda")
        first, *_ = recommendations(model, run, "cuda", planned, 1)
        assert first.flags == "--stream"
        assert first.peak == planned.peak - first.saves == plan(model, replace(run, stream=True), "cuda").peak
        assert first.time > 1
    assert recommendations(replace(model, model_type="olmo"), run, "cuda", planned, 1) == []
    assert recommendations(model, replace(run, optimizer="adam-mini bf16+int8"), "cuda", planned, 1) == []
    assert recommendations(model, replace(run, optimizer="flash-adamw bf16+int8"), "cuda", planned, 1)


def test_inputs_are_let_go_of_where_sequences_are_long():
    model, run = run_with(LONG, *FULL, "--stream", length=512)
    (found,) = recommendations(model, run, "cpu", plan(model, run, "cpu"), 1)
    flag, number = found.flags.split()
    assert flag == "--keep-inputs"
    others = [plan(model, replace(run, keep_inputs=keep), "cpu").peak for keep in (1, 2, 12, 24)]
    assert found.peak == plan(model, replace(run, keep_inputs=int(number)), "cpu").peak < min(others)
    model, short = run_with(QWEN, *FULL, "--stream", length=16)
    assert recommendations(model, short, "cpu", plan(model, short, "cpu"), 1) == []


@pytest.mark.parametrize(
    ("words", "workers", "by_default"),
    [
        ((), 1, False),
        (("--fine-tune-type", "dora", "--batch-size", "2"), 2, False),
        (ORDINARY, 1, True),
        ((*ORDINARY, "--batch-size", "2"), 2, False),
        ((*ORDINARY, "--clip-grad-norm", "1"), 1, False),
    ],
)
def test_where_there_is_room_streaming_is_recommended_to_those_that_stream_by_default_alone(words, workers, by_default):
    model = read_architecture(SMALL, "config.json")
    run = run_of(options.parse(["--batch-size", "1", "--max-seq-length", "129", *words]), model, workers)
    planned = plan(model, run, "cuda")

    def advised(memory):
        return [each.flags for each in recommendations(model, run, "cuda", planned, memory)]

    short, tight, roomy = 1, int(planned.peak / 0.95), int(planned.peak / 0.85)
    assert advised(short)[0] == "--stream"
    assert advised(tight) == ["--stream"]  # streamed, it has room: nothing on top
    assert advised(roomy) == (["--stream"] if by_default else [])
    streamed = plan(model, replace(run, stream=True), "cuda")
    assert recommendations(model, replace(run, stream=True), "cuda", streamed, streamed.peak * 2) == []


@pytest.mark.parametrize(
    ("words", "tied", "workers"),
    [
        (("--num-layers", "1"), False, 1),
        ((*FULL, "--optimizer", "sinkgd"), True, 1),
        ((*FULL, "--optimizer", "adamw", "--table-optimizer", "adamw"), False, 1),
        ((*FULL, "--optimizer", "adamw", "--shard-optimizer", "--batch-size", "8"), True, 8),
    ],
)
def test_a_step_is_run_as_far_ahead_as_it_is_planned(words, tied, workers, monkeypatch):
    config, seen = SMALL | {"tie_word_embeddings": tied}, []
    for module in ("streaming.step", "planner.streamed_phase"):
        monkeypatch.setattr(f"ember_mlx.{module}.bytes_ahead", lambda *numbers: seen.append(numbers) or 2**25)
    args = options.parse(["--batch-size", "1", "--stream", "--max-seq-length", "129", *words])
    group = Group(0, workers, None, None) if workers > 1 else None
    StreamedStep(*made(config, args), reduce=group and mx.distributed.all_sum, group=group)
    model = read_architecture(config, "config.json")
    plan(model, run_of(args, model, workers), "cuda")
    weights, state = seen[0]
    assert len(set(seen[1:])) == 1
    assert seen[1] == (weights, pytest.approx(state, rel=0.01))


def test_many_layers_of_adapters_are_in_flight_on_a_gpu(monkeypatch):
    """Their updates are few bytes, which is all that the run-ahead counts; with all weights they hold it up."""
    wide = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
    wide |= {"num_key_value_heads": 8, "head_dim": 128, "torch_dtype": "bfloat16"}
    model, grown = read_architecture(LONG | wide, "config.json"), {}
    for kind in ("lora", "full"):
        words = ["--fine-tune-type", kind, "--num-layers", "-1", "--batch-size", "4", "--max-seq-length", "1025"]
        run, peaks = run_of(options.parse([*words, "--stream"]), model), []
        for ahead in (2, 2**25):
            monkeypatch.setattr("ember_mlx.planner.streamed_phase.bytes_ahead", lambda *_, ahead=ahead: ahead)
            peaks.append(plan(model, run, "cuda").phases["layers"])
        grown[kind] = peaks[1] / peaks[0]
    assert grown["lora"] > 1.4, grown
    assert 1 < grown["full"] < 1.1, grown


def test_a_run_that_does_not_fit_is_told_to_stream():
    def advised(*words):
        model = read_architecture(LONG, "config.json")
        args = options.parse(["--batch-size", "1", "--max-seq-length", "513", *words])
        return [flags for flags, _ in advice(args, model, run_of(args, model), "cuda", 1)]

    assert "--stream" in advised(*ORDINARY)
    streams = advised(*FULL, "--stream")
    assert not {"--stream", "--grad-checkpoint", "--chunked-loss"} & set(streams)


def test_a_change_is_told_once_with_its_time(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    words = ["--model", str(tmp_path), "--max-seq-length", "129", "--backend", "cuda", "--memory", "1MB"]
    main([*words, "--table-optimizer", "adamw"])
    said = capsys.readouterr().out
    assert said.count("--stream") == 1
    assert "Recommended" not in said
    assert "or add --quantize 4" in said
    times = dict(re.findall(r"^  (--[a-z-]+) .* ([0-9.]+) times$", said, re.MULTILINE))
    assert 1 < float(times["--grad-checkpoint"]) < float(times["--stream"])


def test_operations_are_counted():
    """Of a model without attention's own products: 6 a weight, of which 2 are in the forward pass."""
    model, run = run_with(QWEN, *ORDINARY)
    body = 4 * sum(linear.inputs * linear.outputs for linear in model.linears(0)) + 4 * 128 * 4 * 32
    head = 4096 * 128
    assert operations(model, run) == 3 * body + 3 * head
    assert operations(model, replace(run, grad_checkpoint=True)) == 4 * body + 3 * head
    assert operations(model, replace(run, stream=True)) == 4 * body + 3 * head
    assert operations(model, replace(run, stream=True), "cuda") == 4 * body + 4 * head
    assert operations(model, replace(run, stream=True, keep_inputs=2)) == 4.5 * body + 3 * head
    assert operations(model, replace(run, stream=True, norm_pass=True)) == 7 * body + 3 * head
    model, run = run_with(QWEN | {"vocab_size": 16_384}, *ORDINARY)  # more words to a token: the gradient is made twice
    assert operations(model, replace(run, stream=True)) == 4 * body + 4 * 4 * head
    assert operations(model, replace(run, stream=True), "cuda") == 4 * body + 6 * 4 * head


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tokens", "kept"), [(512, False), (1024, True), (2048, True)])
def test_a_head_whose_gradient_is_kept_is_not_the_peak(monkeypatch, tokens, kept, tied):
    model, run = run_with(QWEN | {"vocab_size": 32_000, "tie_word_embeddings": tied}, *FULL, "--stream", length=tokens)
    found = plan(model, run, "cuda")
    cut = streamed_tables.blocks_of_a_head
    monkeypatch.setattr(
        streamed_tables, "blocks_of_a_head", lambda *of, **layers: cut(*of, **layers)._replace(keeps_gradient=False)
    )
    twice = plan(model, run, "cuda")
    phase = "embedding" if tied else "head"
    assert found.peak == twice.peak
    assert (found.phases[phase] > twice.phases[phase]) == kept


def test_the_command_prints_the_phases(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    words = ["--model", str(tmp_path), "--max-seq-length", "129", "--memory", "1GB", "--backend", "cuda", *FULL]
    main([*words, "--no-stream"])
    said = capsys.readouterr().out
    assert "Alternative to --no-stream: --stream, the same training in " in said
    assert "Recommended" not in said
    assert "phase by phase" not in said
    main([*words, "--no-stream", "--optimizer", "sgd", "--batch-size", "1", "--memory", "18MB"])
    said = capsys.readouterr().out
    assert said.count("--stream instead of --no-stream") == 1
    assert "Alternative" not in said
    main([*words, "--stream", "--keep-inputs", "2"])
    said = capsys.readouterr().out
    assert "validation, beside the step" in said
    assert "between steps: weights and state" in said
    assert "a layer, backwards" in said
    main([*words, "--json"])  # the default
    report = json.loads(capsys.readouterr().out)
    assert report["stream"]
    assert max(report["planned"]["phases"].values()) <= report["planned"]["peak"]
    main([*words, "--no-stream", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["recommendations"][0]["flags"] == "--stream"
    assert report["recommendations"][0]["saves"] > 0


def test_the_benchmark_compares_streamed_and_ordinary_steps(tmp_path, monkeypatch, capsys):
    row, phases = "mini-qwen3/tied/1x64/lora/streamed/keep2", ("forward", "loss", "layers", "embedding")
    ordinary, theirs = ("mini-qwen3/1x64/lora/ordinary-checkpointed", "mini-qwen3/1x64/lora-adamw/mlx-lm")
    streamed = {"peak_memory": 10**8, "phases": {name: {"peak": 10**8} for name in phases}}
    rows = {row: streamed, ordinary: {"peak_memory": 10**8, "phases": {}}, theirs: {"peak_memory": 10**8, "phases": {}}}
    machine = {"backend": "cuda", "device": "a GPU", "versions": {"mlx": "1.2.3"}}
    (tmp_path / "measured.json").write_text(json.dumps({"machine": machine, "rows": rows}))
    script = Path(__file__).parents[1] / "examples" / "benchmarks" / "planned_memory.py"
    words = ["--measured", tmp_path / "measured.json", "--out", tmp_path / "table.md"]
    run_here(script, *words, monkeypatch=monkeypatch, capsys=capsys)
    written = (tmp_path / "table.md").read_text()
    assert f"| {row} | " in written
    assert f"| {ordinary} | " in written
    assert theirs not in written
