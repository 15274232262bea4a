"""Answers at each validation: right, told of, and without a trace in the run; prompts that cannot be, by their line."""

import json
import re
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from finetune.breaking import BreakAt, Breaks
from mlx_lm.generate import stream_generate
from mlx_lm.models import llama

from ember_mlx import InputError, load
from ember_mlx.commands import plan
from ember_mlx.finetune import checkpoints, run_log
from ember_mlx.finetune.base_models import load_base
from ember_mlx.finetune.run import run
from ember_mlx.finetune.samples import Samples, read_prompts
from ember_mlx.finetune.workers import Workers

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("train 3\n\n  valid 4  \n")
    return path


def sampled(prompts, *more):
    return ["--sample-prompts", prompts, "--sample-tokens", 5, *more]


def ends_alike(folder, *names):
    one, two = (checkpoints.find(folder / name, True) for name in names)
    assert one.position == two.position
    for arrays, others in ((one.weights, two.weights), (one.optimizer, two.optimizer)):
        assert arrays.keys() == others.keys()
        assert all(mx.array_equal(array, others[name]) for name, array in arrays.items())


@pytest.mark.parametrize(
    ("words", "model"),
    [
        (["--grad-accumulation-steps", 2, "--packing", "--max-seq-length", 64], "tied"),
        (["--fine-tune-type", "full", "--grad-checkpoint"], "untied"),
        (["--fine-tune-type", "full", "--stream"], "untied"),
        ([], "quantized"),
    ],
    ids=["lora", "full", "streamed", "quantized"],
)
def test_a_run_that_is_sampled_is_bit_for_bit_the_run_that_is_not(parse, prompts, tmp_path, monkeypatch, words, model):
    block = llama.TransformerBlock
    monkeypatch.setattr(block, "__call__", block.__call__)  # which --grad-checkpoint replaces for good
    config = tmp_path / "run.yaml"
    config.write_text("lora_parameters: {rank: 2, scale: 10.0, dropout: 0.5}\n")
    common = ["--iters", 4, "--steps-per-eval", 2, "--config", config, "--table-learning-rate", 1e-2, *words]
    run(parse(*common, adapter="plain", model=model))
    result = run(parse(*common, *sampled(prompts), adapter="sampled", model=model))
    ends_alike(tmp_path, "plain", "sampled")
    assert [taken["step"] for taken in result.samples] == [0, 1, 3]


def test_the_answers_are_those_of_generate_and_are_printed_and_logged(parse, prompts, folders, tmp_path, capsys):
    log = tmp_path / "run.jsonl"
    flags = sampled(prompts, "--save-every", 1, "--log-jsonl", log)
    result = run(parse("--iters", 3, "--steps-per-eval", 2, "--learning-rate", 1e-2, *flags))
    assert [(row["step"], row["samples"]) for row in run_log.read(log).samples] == [
        (taken["step"], taken["samples"]) for taken in result.samples
    ]
    assert [taken["step"] for taken in result.samples] == [0, 1, 2]
    model, tokenizer = load(str(folders["untied"]))
    for each in result.samples[0]["samples"]:
        turns = [{"role": "user", "content": each["prompt"]}]
        asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        words = tokenizer.encode(asked, add_special_tokens=False)
        tokens = [step.token for step in stream_generate(model, tokenizer, words, max_tokens=5)]
        assert each["answer"] == tokenizer.decode([token for token in tokens if token not in tokenizer.eos_token_ids])
    out = capsys.readouterr().out
    assert out.count("answers after 1 step\n    train 3\n      > ") == 1
    assert out.count("answers after ") == 3


def test_a_resumed_run_answers_as_one_that_never_stopped(parse, prompts, tmp_path):
    common = ["--iters", 5, "--steps-per-eval", 2, "--learning-rate", 1e-2, "--save-every", 2, *sampled(prompts)]
    whole = run(parse(*common, "--log-jsonl", tmp_path / "whole.jsonl", adapter="whole"))
    with pytest.raises(Breaks):
        run(parse(*common, "--log-jsonl", tmp_path / "run.jsonl"), BreakAt(4))
    resumed = run(parse(*common, "--log-jsonl", tmp_path / "run.jsonl", "--resume"))
    ends_alike(tmp_path, "whole", "adapters")
    assert resumed.samples == whole.samples[2:]
    assert run_log.read(tmp_path / "run.jsonl").samples == run_log.read(tmp_path / "whole.jsonl").samples


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.md", "hello", "p.md: must be a .txt with a prompt a line, or a .jsonl"),
        ("p.txt", "", "p.txt: has no prompts; give 1 to 100"),
        ("p.txt", "\n \n", "p.txt: has no prompts; give 1 to 100"),
        ("p.txt", "a\n" * 101, "p.txt: has 101 prompts; give 1 to 100, since each validation answers them all"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', "p.jsonl line 2: is not JSON ("),
        ("p.jsonl", '{"texts": "a"}', 'must hold {"prompt": "..."}, {"messages": [...]} or {"text": "..."}; fix'),
        ("p.jsonl", '{"prompt": [{"role": "user", "content": "a"}]}', "p.jsonl line 1: must hold"),
        ("p.jsonl", '{"messages": "a"}', "p.jsonl line 1: must hold"),
        ("p.jsonl", "3", "p.jsonl line 1: must hold"),
        ("p.jsonl", '{"prompt": ""}', "p.jsonl line 1: must hold"),
        ("p.jsonl", '{"prompt": 3}', "p.jsonl line 1: must hold"),
        ("p.jsonl", '{"messages": []}', "p.jsonl line 1: must hold"),
        ("p.jsonl", '{"messages": [{"content": "a"}]}', "p.jsonl line 1 has a message without a role"),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', "line 1: has an answer and no question"),
    ],
)
def test_prompts_that_cannot_be_are_refused_by_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        read_prompts(path)
    assert "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read_is_refused_by_plan_too(folders, tmp_path):
    with pytest.raises(InputError, match=r"--sample-prompts .*none.txt: cannot be read \(No such file"):
        plan.main(["--model", str(folders["untied"]), "--sample-prompts", str(tmp_path / "none.txt")])
    with pytest.raises(InputError, match=r"--sample-prompts .*none.txt: cannot be read \(No such file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    with pytest.raises(InputError, match=r"latin.txt: cannot be read \("):
        read_prompts(tmp_path / "latin.txt")


def test_rows_of_a_data_set_are_asked_without_their_answers(folders, tmp_path):
    _, tokenizer, _ = load_base(str(folders["untied"]))
    path = tmp_path / "valid.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": "q", "completion": "w"}, {"messages": turns}, {"text": "once\u2028"}]
    path.write_text("\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    prompts = read_prompts(path)
    assert [prompt.asked for prompt in prompts] == ["q", turns[:1], "once\u2028"]
    assert [prompt.text for prompt in prompts] == ["q", "a", "once\u2028"]
    # What is learned as text goes on as it stands.
    assert prompts[2].tokens(tokenizer) == tokenizer.encode("once\u2028")
    assert prompts[0].tokens(tokenizer) == tokenizer.encode("<user>q</s><assistant>")


def test_prompts_are_tried_before_the_first_step(parse, prompts, folders, tmp_path):
    with pytest.raises(InputError, match="line 1: has 10 tokens, and must have 1 to --max-seq-length 8"):
        run(parse(*sampled(prompts, "--max-seq-length", 8)))
    with pytest.raises(InputError, match="answered at each validation, and no validation rows exist"):
        run(parse(*sampled(prompts, "--valid-fraction", 0, "--data", folders["data"] / "train.jsonl")))
    assert not (tmp_path / "adapters").exists()
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    _, tokenizer, _ = load_base(str(folders["untied"]))
    tokenizer._tokenizer.chat_template = None
    tokenizer.has_chat_template = False
    with pytest.raises(InputError, match="chat.jsonl line 1: messages need a chat template, which the model lacks"):
        read_prompts(chat)[0].tokens(tokenizer)
    assert read_prompts(prompts)[0].tokens(tokenizer) == tokenizer.encode("train 3")


def test_a_run_that_a_signal_ends_answers_no_further(parse, prompts, folders):
    model, tokenizer, _ = load_base(str(folders["untied"]))
    passed = []
    deadline = SimpleNamespace(
        workers=Workers(0, 1), signalled=lambda: len(passed) == 1, passed=lambda: passed.append(1)
    )
    samples = Samples(parse(*sampled(prompts)), tokenizer, deadline)
    samples.before_training(model, None, (), ())
    samples.after_validation(1, 0.0)
    assert (len(passed), samples.taken) == (2, [])


def test_ids_that_the_tokenizer_lacks_are_no_error(parse, prompts, folders):
    _, tokenizer, _ = load_base(str(folders["untied"]))
    deadline = SimpleNamespace(workers=Workers(0, 1), signalled=lambda: False, passed=lambda: None)
    samples = Samples(parse(*sampled(prompts)), tokenizer, deadline)
    samples.before_training(WritesOne(300), None, (), ())
    samples.after_validation(1, 0.0)
    assert [each["answer"] for each in samples.taken[0]["samples"]] == ["", ""]


class WritesOne(nn.Module):
    """A model that writes one token for ever, which may be beyond the tokenizer's: vocabularies are padded."""

    def __init__(self, token):
        super().__init__()
        self.layers = []
        self.token = token

    def __call__(self, tokens, cache=None):
        return mx.broadcast_to(mx.arange(self.token + 1, dtype=mx.float32), (*tokens.shape, self.token + 1))
