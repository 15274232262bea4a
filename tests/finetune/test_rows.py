"""Rows: every one is tried before the first step and named by its line, and masks end where row and prompt differ."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset
from mlx_lm.utils import load_tokenizer

from ember_mlx import InputError
from ember_mlx.finetune.data import check_data_folder, load_data
from ember_mlx.finetune.rows import ChatRows, spans_of
from ember_mlx.finetune.run import run

TEMPLATES = {
    "strict": "{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('no role ' + m['role']) }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] + '</s>' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    "thinks": "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think></think>{% endif %}",
    "old": "{% for m in messages %}<{{ m.role }}>{{ m.content | string }}</s>{% endfor %}",
    "parts": "{% for m in messages %}<{{ m['role'] }}>"
    "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}",
}


@pytest.fixture
def tokenizer(folders):
    return load_tokenizer(folders["untied"])


@pytest.fixture
def load(parse, tokenizer, tmp_path):
    """What a run does to rows: the sets, or InputError."""

    def load(rows, *arguments, template=None):
        folder = tmp_path / "rows"
        folder.mkdir(exist_ok=True)
        folder.joinpath("train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        if template:
            tokenizer._tokenizer.chat_template = TEMPLATES[template]
        args = parse("--data", folder, "--batch-size", 1, *arguments)
        check_data_folder(args)
        return load_data(args, tokenizer)[0]

    return load


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD = chat(("user", "a"), ("assistant", "b"))
CALL = [{"type": "function", "function": {"name": "f", "arguments": {}}}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat(("user", "a\ud800"), ("assistant", "b")), "cannot be tokenized"),
        (chat(("system", "a"), ("user", "b")), r"cannot be tokenized \(no role system\)"),
        (chat(("tool", "a"), ("user", "b")), r"cannot be tokenized \(no role tool\)"),
        (chat(("user", [{"type": "text", "text": "a"}])), "cannot be tokenized"),
        (
            chat(("user", None), ("assistant", "b")),
            "a message of role 'user' with a content of null, which must be a te",
        ),
        ({"messages": [{"role": "user"}]}, "a content of null"),
        (chat(("user", 5)), "a content of type int, which must be a text"),
        (chat(("user", {"x": 1})), "a content of type dict"),
        (chat(("user", [])), "a content of no parts"),
        (chat((["user"], "a")), "a message whose role is of type list"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": "f"}]},
            "tool_calls are no list of",
        ),
        (GOOD | {"tools": {"f": 1}}, "has tools of type dict, which must be a list"),
        (GOOD | {"tools": [5]}, "cannot be tokenized"),
    ],
)
def test_a_row_that_cannot_train_is_named_wherever_it_is(load, row, message):
    for rows, line in (([row, GOOD], 1), ([GOOD] * 30 + [row], 31)):
        with pytest.raises(InputError, match=rf"train.jsonl line {line} .*{message}.*: fix or remove that line"):
            load(rows, template="strict")


@pytest.mark.parametrize("value", [None, 5, 1.5, True, {"x": 1}, []])
@pytest.mark.parametrize("key", ["prompt", "completion"])
def test_prompts_and_completions_are_texts(load, key, value):
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(InputError, match=f"line 2 has a {key} of .*, which must be a text: fix or remove that line"):
        load([good, good | {key: value}])
    with pytest.raises(InputError, match="line 2 cannot be tokenized .the chat template takes no content of type list"):
        load([good, good | {key: [{"type": "text", "text": "c"}]}])


def test_lists_of_parts_are_taken_where_the_template_knows_them(load, tokenizer):
    rows = load([chat(("user", [{"type": "text", "text": "hi"}]))], template="parts")
    assert tokenizer.decode(rows.process(rows[0])[0]) == "<user>hi"


def test_null_beside_tool_calls_is_legitimate_and_never_written_as_python_would(load, tokenizer):
    row = chat(("user", "None?"), ("assistant", None))
    row["messages"][1]["tool_calls"] = CALL
    rows = load([row])
    assert tokenizer.decode(rows.process(rows[0])[0]) == "<user>None?</s><assistant></s>"


@pytest.mark.parametrize("template", ["old", "thinks"])
def test_a_template_that_prints_none_is_not_taken_at_its_word(load, tokenizer, template):
    """Old templates print Python's None for the null beside tool_calls; no other turn is touched."""
    row = chat(("user", "None?"), ("assistant", None), ("tool", "c"), ("assistant", "b"))
    row["messages"][1]["tool_calls"] = CALL
    rows = load([row], template=template)
    assert "".join(tokenizer.decode(rows.process(rows[0])[0]).split()) == (
        "<user>None?</s><assistant></s><tool>c</s><assistant>b</s>"
    )


@pytest.mark.parametrize("role", ["system", "tool"])
def test_other_roles_train_where_the_template_takes_them_and_are_named_where_not(load, tokenizer, role):
    turns = [("user", "a"), ("assistant", "b")]
    turns.insert(0 if role == "system" else 1, (role, "c"))
    rows = load([GOOD, chat(*turns)], template="thinks")
    assert f"<{role}>c</s>" in tokenizer.decode(rows.process(rows[1])[0])
    with pytest.raises(InputError, match=rf"line 2 cannot be tokenized \(no role {role}\): fix or remove"):
        load([GOOD, chat(*turns)], template="strict")


def test_a_run_refuses_a_bad_row_before_it_writes(parse, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"text": "abc"}] * 20 + [{"text": "a\ud800"}]
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(InputError, match=r"train.jsonl line 21 cannot be tokenized"):
        run(parse("--data", data, "--iters", 2))
    assert not (tmp_path / "adapters").exists()


def test_a_model_without_a_chat_template_says_what_to_do(load, tokenizer):
    tokenizer.has_chat_template = False
    with pytest.raises(InputError, match="line 1 needs a chat template, which the model lacks: use rows of text"):
        load([GOOD])


ANSWERS = ["b", "", "a long answer, longer than what the prompt adds", "<think></think>"]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("tables", [[], ["--train-tables", "none"]])
def test_a_mask_ends_where_row_and_prompt_differ(load, tokenizer, capsys, kind, answer, tables):
    row = chat(("user", "a"), ("assistant", answer)) if kind == "chat" else {"prompt": "a", "completion": answer}
    rows = load([row] * 3, "--mask-prompt", *tables, template="thinks")
    [(start, end)] = spans_of(*rows.process(rows[0]), 512)
    learned = tokenizer.decode(rows.process(rows[0])[0][start:end])
    assert learned == (f"{answer}</s>" if answer != "<think></think>" else "</s>")
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("--mask-prompt: in 3 of 3 rows") == (answer != "<think></think>")


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_where_the_prompt_is_a_prefix_tokens_and_masks_are_mlx_lms(load, tokenizer, capsys, kind):
    rows = [chat(("user", "a"), ("assistant", "b")), chat(("user", "a"), ("assistant", "b"), ("user", "c"))]
    theirs = ChatDataset(rows, tokenizer, mask_prompt=True)
    if kind == "completion":
        rows = [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "ccc"}]
        theirs = CompletionsDataset(rows, tokenizer, "prompt", "completion", True)
    ours = load(rows, "--mask-prompt", "--train-tables", "none")
    assert [ours.process(row) for row in rows] == [theirs.process(row) for row in rows]
    assert "--mask-prompt" not in capsys.readouterr().out
    theirs.mask_prompt = False
    assert [ChatRows(theirs).process(row) for row in rows] == [theirs.process(row) for row in rows]


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4)
VALUES = st.recursive(LEAVES, lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=4), x, max_size=2))
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "\ud800"]) | VALUES
TURNS = st.fixed_dictionaries(
    {}, optional={"role": ROLES, "content": VALUES, "tool_calls": VALUES | st.just(CALL), "name": VALUES}
)
ROWS = st.one_of(
    VALUES,
    st.fixed_dictionaries({"messages": VALUES | st.lists(TURNS, max_size=3)}, optional={"tools": VALUES}),
    st.fixed_dictionaries({}, optional={"prompt": VALUES, "completion": VALUES, "text": VALUES, "tools": VALUES}),
)


@settings(
    max_examples=120,
    deadline=5000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(row=ROWS, template=st.sampled_from(sorted(TEMPLATES)), mask=st.booleans(), first=st.booleans())
def test_any_row_trains_or_is_refused_by_its_line(load, row, template, mask, first):
    rows = [row] if first else [row, row]
    try:
        rows = load(rows, *["--mask-prompt"] * mask, template=template)
    except InputError as error:
        says_where(str(error))
    else:
        tokens, learned = rows.process(rows[0])
        assert len(tokens) > 0
        assert all(0 < start < end <= len(tokens) for start, end in spans_of(tokens, learned, len(tokens)))


def says_where(message):
    assert "train.jsonl line 1 " in message
    assert "\n" not in message


@pytest.mark.parametrize("depth", [500, 100_000])
def test_deep_rows_are_read_or_refused(parse, tokenizer, tmp_path, depth):
    folder = tmp_path / "deep"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a", "x": ' + "[" * depth + "]" * depth + "}\n")
    args = parse("--data", folder, "--batch-size", 1)
    if depth < 1000:
        check_data_folder(args)
        assert len(load_data(args, tokenizer)[0]) == 1
        return
    with pytest.raises(InputError, match=r"train.jsonl line 1 is not JSON .*: fix or remove that line"):
        check_data_folder(args)
