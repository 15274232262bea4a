"""Modelfiles: chat templates read off what they render, written anew in Go, and read back."""

import json
import re

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny_sentencepiece import write_model, write_tokenizer
from transformers import AutoTokenizer

from ember_mlx.commands import export
from ember_mlx.exporting import ollama

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORMS = {
    "chatml": CHATML,
    "chatml with a default": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}" + CHATML
    ),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "phi": (  # the end of the text where no answer is asked for
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "plain": (
        "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\nA: {% else %}{{ m['content'] }}"
        "{{ eos_token }}\n{% endif %}{% endfor %}"
    ),
}
OTHERS = {
    "numbered": "{% for m in messages %}{{ loop.index }} {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}A:",
    "system inside": "{% for m in messages[-1:] %}[{{ messages[0]['content'] }}] {{ m['content'] }}{% endfor %} A:",
    "dated": CHATML + "{{ strftime_now('%d') }}",
    "marks": CHATML.replace("<|im_end|>", "{{ '{{end}}' }}"),
    "form feed": CHATML.replace("\n", "\f"),
    "none": None,
}


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def wrapped(template):
        tokenizer.chat_template = template
        return TokenizerWrapper(tokenizer)

    return wrapped


def rendered(template, chat):
    """What Go makes of a template of this kind: the same in Jinja, of which each ``end`` must be told apart."""
    open_blocks, words = [], {"range .Messages": "for m in messages", "if not .System": "if not system"}

    def translated(match):
        word = match[1].strip()
        if word == ".Content":
            return "{{ m.content }}"
        if word == "end":
            return "{% end" + open_blocks.pop() + " %}"
        role = re.fullmatch(r'(else )?if eq \.Role "(\w+)"', word)
        if not (role and role[1]):
            open_blocks.append("for" if word.startswith("range") else "if")
        return "{% " + (f"{'el' if role[1] else ''}if m.role == '{role[2]}'" if role else words[word]) + " %}"

    jinja = re.sub(r"\{\{(.*?)\}\}", translated, template)
    environment = ImmutableSandboxedEnvironment(keep_trailing_newline=True)
    return environment.from_string(jinja).render(
        messages=chat, system="".join(m["content"] for m in chat if m["role"] == "system")
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_template_of_turns_says_in_go_what_it_says_in_jinja(wrapped, form):
    tokenizer = wrapped(FORMS[form])
    turns = ollama.read_turns(tokenizer)
    template = ollama.go_template(turns)
    roles = ["system"] * ("system" in turns.before) + ["user", "assistant", "user"]
    assert ("system" in roles) == (form != "gemma")
    for chat in (
        [{"role": role, "content": f"of {role}\n{n}"} for n, role in enumerate(roles)],
        [{"role": "user", "content": "é"}],
    ):
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert rendered(template, chat) == expected


def test_what_llama_cpp_writes_itself_is_left_out(wrapped, monkeypatch):
    tokenizer = wrapped(FORMS["llama 3"])
    assert ollama.go_template(ollama.read_turns(tokenizer)).startswith("<s>")
    monkeypatch.setattr(ollama, "_adds_bos", lambda _: True)
    assert ollama.go_template(ollama.read_turns(tokenizer)).startswith("{{ range")


@pytest.mark.parametrize("form", OTHERS)
def test_other_templates_are_left_out_in_words(wrapped, form):
    expected = {"dated": "today's date", "marks": "marks that Ollama reads"}
    expected |= {"form feed": "cannot hold", "none": "no chat template"}
    assert expected.get(form, "not made of turns alone") in ollama.read_turns(wrapped(OTHERS[form]))


def test_a_modelfile_beside_a_model_folder(tmp_path, capsys):
    model = write_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHATML)
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20, "do_sample": True}))
    (model / "tokenizer.model").write_bytes(b"of SentencePiece")
    words = ["--format", "ollama", "--model", str(model), "--no-adapter", "--save-path", str(tmp_path / "out")]
    export.main(words)
    assert f"In {tmp_path / 'out'}: the fused model; Modelfile, with the chat template" in capsys.readouterr().out
    text = (tmp_path / "out" / ollama.MODELFILE).read_text()
    assert text.startswith('FROM .\nTEMPLATE """{{ range .Messages }}')
    assert text.endswith(
        '<|im_start|>assistant\n"""\nPARAMETER stop "</s>"\nPARAMETER stop "<|im_end|>"\nPARAMETER temperature 0.6\n'
        "PARAMETER top_k 20\n"
    )
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"of SentencePiece"
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (model / "chat_template.jinja").write_text(OTHERS["numbered"])
    export.main([*words, "--overwrite"])
    assert "without TEMPLATE: the chat template is not made of turns alone; Ollama takes" in capsys.readouterr().out
    text = (tmp_path / "out" / ollama.MODELFILE).read_text()
    assert text.startswith("FROM .\n# No TEMPLATE: the chat template is not made of turns alone.\nPARAMETER stop")
    assert (tmp_path / "out" / "mine.txt").exists()
