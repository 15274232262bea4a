"""`--mask-prompt` learns what the assistant writes, in all turns, whatever the chat template makes of them."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.trainer import default_loss
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ember_mlx import InputError
from ember_mlx.finetune.batches import Rows, batches_of
from ember_mlx.finetune.data import check_data_folder, load_data
from ember_mlx.finetune.rows import spans_of
from ember_mlx.streaming.marks import marks_of, target_mask
from ember_mlx.streaming.mean_loss import mean_loss

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: think blocks before the last question are dropped, and one is added to the answers after it.
QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set content = m.content or '' %}{% set thought = '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
{{- content }}
{%- for call in m.tool_calls or [] %}
{%- if not loop.first or content %}{{- '\n' }}{% endif %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
{%- else %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
# As DeepSeek-R1's: the prompt begins a thought, of which no row has anything.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% endif %}"
    "{% if m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|eos|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# As Llama 3.1's: a call has no content.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' }}{% if m.tool_calls %}"
    '{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}<|eot|>' }}{% else %}{{ m.content | trim + '<|eot|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
# As Mistral's: nothing asks for an answer, and the system's text is in the last question.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.revindex0 < 2 and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + '</s>' }}{% endif %}"
    "{% endfor %}"
)
# As gpt-oss's: an answer may have several parts, each with a header, and is closed otherwise where it is the last.
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
LAST_ALONE_IS_CLOSED = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if loop.last %}</s>{% else %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '</s>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def hf():
    """A byte-level tokenizer whose tokens go over the edges of words."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    own.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|eos|>", "<|eot|>", "</s>", "<s>", "<think>", "</think>"]
    special += ["<|start|>", "<|end|>", "<|return|>", "<|message|>"]
    texts = ["assistant\nuser: a\n\n é. b[/INST] hello. é", '<tool_call>\n{"name": "f"}\n</tool_call>'] * 3
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    own.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>", bos_token="<s>")


@pytest.fixture
def learned(hf, tmp_path, parse):
    """The texts that a conversation teaches."""

    def learned(template, turns, **keys):
        hf.chat_template = template
        rows = load(parse, tmp_path, TokenizerWrapper(hf), [{"messages": turns} | keys])
        tokens, spans = rows.process(rows[0])
        return [hf.decode(tokens[start:end]) for start, end in spans_of(tokens, spans, 10**6)]

    return learned


def load(parse, folder, tokenizer, rows, *arguments):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = parse("--data", folder / "rows.jsonl", "--batch-size", 1, "--valid-fraction", 0, "--mask-prompt", *arguments)
    check_data_folder(args)
    return load_data(args, tokenizer)[0]


def turn(role, content=None, *calls):
    made = [{"type": "function", "function": {"name": name, "arguments": {"x": 1}}} for name in calls]
    return {"role": role, "content": content} | ({"tool_calls": made} if made else {})


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
TALK = [turn("user", "a"), turn("assistant", "é. b"), turn("user", "assistant\n"), turn("assistant", " hello. ")]
THOUGHT = [
    turn("system", "<think>"),
    turn("user", "a"),
    turn("assistant", "<think>\nold\n</think>\n\none"),
    turn("user", "b"),
    turn("assistant", "<think>\nnew\n</think>\n\n", "f"),
    turn("tool", "1"),
    turn("tool", "2"),
    turn("assistant", None, "f", "f"),
    turn("tool", "3"),
    turn("assistant", "two"),
]


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        (CHATML, TALK, ["é. b<|im_end|>", " hello. <|im_end|>"]),
        (CHATML, [turn("assistant", "a"), turn("assistant", ""), turn("user", "b")], ["a<|im_end|>", "<|im_end|>"]),
        (QWEN3, TALK, ["é. b<|im_end|>", "<think>\n\n</think>\n\n hello. <|im_end|>"]),
        (
            QWEN3,
            THOUGHT,
            [
                "one<|im_end|>",
                f"<think>\nnew\n</think>\n\n{CALL}<|im_end|>",
                f"{CALL}\n{CALL}<|im_end|>",
                "<think>\n\n</think>\n\ntwo<|im_end|>",
            ],
        ),
        (R1, [*TALK[:3], turn("assistant", "<think>x</think>c")], ["é. b<|eos|>", "c<|eos|>"]),
        (
            LLAMA,
            [*TALK[:3], turn("assistant", None, "f"), turn("tool", "1"), TALK[-1]],
            # A token with a character of the header and one of the answer is learned: no prompt ends with it.
            ["é. b<|eot|>", '\n{"name": "f", "parameters": {"x": 1}}<|eot|>', "hello.<|eot|>"],
        ),
        (MISTRAL, [turn("system", "s"), *TALK], [" é. b</s>", " hello.</s>"]),
        (
            HARMONY,
            [turn("user", "<|start|>assistant"), turn("assistant", "a"), TALK[2], TALK[3] | {"thinking": "b"}],
            [
                "<|channel|>final<|message|>a",
                "<|channel|>analysis<|message|>b<|end|><|start|>assistant<|channel|>final<|message|> hello. <|return|>",
            ],
        ),
        (LAST_ALONE_IS_CLOSED, TALK, ["é. b", " hello. </s>"]),
        (MARKED, TALK, ["é. b</s>", " hello. </s>"]),
    ],
)
@pytest.mark.parametrize("fast", [True, False])
def test_all_that_the_assistant_writes_is_learned_and_nothing_else(
    learned, hf, monkeypatch, template, turns, expected, fast
):
    if not fast:  # as of a tokenizer without offsets; the template's own marks then stand for nothing
        monkeypatch.setattr(type(hf), "is_fast", False)
    assert learned(template, turns) == expected


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (CHATML.replace("m.content", "m.content | upper"), TALK, "does not show where the answer in message 2 stands"),
        (CHATML.replace("m.content", "m.content + m.content"), TALK, "answer in message 2 stands"),
        ("{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}", TALK, "answer in message 2 stands"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content[:9] }}{% endfor %}", TALK, "answer in message 2"),
        (
            CHATML,
            [turn("user", "a"), turn("user", "b")],
            "has no message of role assistant, and --mask-prompt",
        ),
    ],
)
def test_an_answer_that_cannot_be_found_is_refused_by_its_row(learned, template, turns, message):
    with pytest.raises(InputError, match=rf"rows.jsonl: line 1 .*{message}") as refused:
        learned(template, turns)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("max_seq_length", [12, 512])
def test_batches_have_marks_of_what_is_learned_and_no_padding(hf, parse, tmp_path, max_seq_length):
    hf.chat_template = CHATML
    rows = [{"messages": TALK[:n]} for n in (4, 2)]
    data = load(parse, tmp_path, TokenizerWrapper(hf), rows)
    args = parse("--mask-prompt", "--batch-size", 2, "--max-seq-length", max_seq_length)
    [(tokens, marks)] = batches_of(args, Rows(data))
    mask = np.array(target_mask(tokens, marks))
    for i, row in enumerate(rows):
        spans = spans_of(*data.process(row), max_seq_length)
        expected = [t for start, end in spans for t in range(start, end)]
        assert (np.flatnonzero(mask[i]) + 1).tolist() == expected
    assert mask.any()
    assert ((np.array(marks) > 0).sum(1) == [min(len(data.process(row)[0]), max_seq_length) for row in rows]).all()


def test_the_loss_by_marks_is_mlx_lms_where_the_marks_say_what_its_lengths_say():
    rng = np.random.default_rng(0)
    tokens, table = mx.array(rng.integers(0, 9, (3, 8))), mx.array(rng.normal(size=(9, 9)), mx.float32)
    lengths = mx.array([[2, 7], [0, 4], [3, 5]])
    marks = mx.array(np.stack([marks_of(8, [(first, last + 1)]) for first, last in lengths.tolist()]))
    model = lambda inputs: table[inputs]  # noqa: E731
    expected = default_loss(model, tokens, lengths)
    for learned in (lengths, marks):
        assert all(mx.array_equal(a, b) for a, b in zip(mean_loss(model, tokens, learned), expected, strict=True))
