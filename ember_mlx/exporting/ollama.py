"""Ollama's Modelfile: where the weights are, the chat template as a Go template, stop tokens and parameters.

Ollama has Go templates, Hugging Face Jinja ones. A template that is made of turns, each with a text before and a text
after it, is read off what it renders, and written anew. It is used only if it then renders the same chats to the same
text. ChatML, Llama 3, Zephyr, Phi and plain forms are such; tools, thoughts and dates are not translated.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ember_mlx.exporting.inputs import Fused, export_folder, write_fused
from ember_mlx.finetune import safe_writing

__all__ = ["MODELFILE", "Turns", "go_template", "read_turns", "write_model_for_ollama", "write_modelfile"]

MODELFILE = "Modelfile"
Chat = list[dict[str, str]]
PARAMETERS = {  # of generation_config.json, and what Ollama calls them
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turns:
    """A chat template of turns: ``start``, then before, content and after of each message, then ``answer``.

    Args:
        before, after (dict[str, str]): By role; without "system" if the template refuses it.
        default (str, optional): The system message of chats that have none.
    """

    start: str
    before: dict[str, str]
    after: dict[str, str]
    answer: str
    default: str | None = None

    def render(self, chat: Chat) -> str:
        """The text of a chat that the model is to answer."""
        if self.default is not None and chat[0]["role"] != "system":
            chat = [{"role": "system", "content": self.default}, *chat]
        turns = (self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in chat)
        return self.start + "".join(turns) + self.answer


def write_model_for_ollama(folder: Path, fused: Fused, files: tuple[str, ...]) -> str:
    """Write a model folder with a Modelfile; what was written, in words.

    Args:
        files: Patterns of the files of a model.

    Raises:
        InputError: for whatever keeps the folder from being written.
    """
    with export_folder(folder, fused.nbytes, (*files, MODELFILE)) as partial:
        write_fused(partial, fused)
        return f"the fused model; {write_modelfile(partial, '.', fused)}"


def write_modelfile(folder: Path, weights: str, fused: Fused) -> str:
    """Write the Modelfile of ``weights``, a file in the folder or "." for its safetensors; what it says, in words."""
    turns = read_turns(fused.tokenizer)
    name = weights if weights == "." else f"./{weights}"
    lines = [f"FROM {name}"]
    words = f"{MODELFILE}, with the chat template"
    if isinstance(turns, str):
        words = f"{MODELFILE}, without TEMPLATE: {turns}; Ollama takes the template of the model if it knows it"
        lines.append(f"# No TEMPLATE: {turns}.")
    else:
        lines.append(f'TEMPLATE """{go_template(turns)}"""')
        if "system" not in turns.before:
            words += ", which has no system message"
    lines += [f'PARAMETER stop "{token}"' for token in _stops(fused.tokenizer, turns)]
    lines += [f"PARAMETER {name} {value}" for name, value in _parameters(fused.source).items()]
    safe_writing.write_bytes(folder / MODELFILE, ("\n".join(lines) + "\n").encode())
    return words


def read_turns(tokenizer: TokenizerWrapper) -> Turns | str:
    """The turns that a tokenizer's chat template is made of, or why it is not, in words."""
    template = tokenizer.chat_template
    if not template:
        return "the model has no chat template"
    if "strftime_now" in str(template):
        return "the chat template writes today's date"

    def render(chat: Chat, *, answer: bool = True) -> str | None:
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer)
        # Whatever a template raises, such as for a role that it does not know.
        except Exception:
            return None
        bos = tokenizer.bos_token
        return text.removeprefix(bos) if bos and _adds_bos(tokenizer) else text

    # Some templates end a chat that asks for no answer with the token of the end, besides the turn's own end.
    for end in ("", tokenizer.eos_token or ""):
        turns = _read_off(render, end)
        if turns and all(render(chat) == turns.render(chat) for chat in _chats("system" in turns.before)):
            break
    else:
        return "the chat template is not made of turns alone"
    text = "".join((turns.start, turns.answer, turns.default or "", *turns.before.values(), *turns.after.values()))
    if any(mark in text for mark in ("{{", "}}", '"""')):
        return "the chat template writes marks that Ollama reads itself"
    if not text.replace("\n", "").replace("\t", "").isprintable():  # of which Ollama's reader keeps nothing
        return "the chat template writes characters that a Modelfile cannot hold"
    return turns


def go_template(turns: Turns) -> str:
    """The same template in the language of Go, over Ollama's ``.Messages``; ``.System`` is all system messages."""
    opening, branches = turns.start, []
    if turns.default is not None:
        unasked = turns.before["system"] + turns.default + turns.after["system"]
        opening += f"{{{{ if not .System }}}}{unasked}{{{{ end }}}}"
    for role, before in turns.before.items():
        condition = "if" if not branches else "else if"
        branches.append(f'{{{{ {condition} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{turns.after[role]}')
    return f"{opening}{{{{ range .Messages }}}}{''.join(branches)}{{{{ end }}}}{{{{ end }}}}{turns.answer}"


def _read_off(render: Callable[..., str | None], end: str) -> Turns | None:
    """The turns, from what a template makes of contents that stand nowhere in it; ``end`` follows unasked chats."""
    system, user, assistant = ({"role": role, "content": f"<{role}'s words>"} for role in ROLES)

    def pieces(chat, **options):
        """What stands before, between and after the contents."""
        text, found = render(chat, **options), []
        for message in chat:
            piece, word, text = (text or "").partition(message["content"])
            if not word:
                return None
            found.append(piece)
        return [*found, text]

    asked, asked_only = pieces([user]), pieces([user], answer=False)
    answered = pieces([user, assistant], answer=False)
    talk = pieces([user, assistant, user])
    if None in (asked, asked_only, answered, talk):
        return None
    after = {"user": asked_only[1].removesuffix(end), "assistant": answered[2].removesuffix(end)}
    before = {"user": _without(talk[2], after["assistant"]), "assistant": _without(talk[1], after["user"])}
    answer = _without(asked[1], after["user"])
    start = None if before["user"] is None else _without(asked[0], before["user"], end=True)
    if None in (*before.values(), answer, start):
        return None
    default = None
    told = pieces([system, user])
    if told:
        after["system"] = _without(told[1], before["user"], end=True)
        if after["system"] is None:
            return None
        opening = told[0]
        if start.startswith(opening) and start.endswith(after["system"]) and len(start) > len(opening):
            default = start[len(opening) : len(start) - len(after["system"])]
            start = ""
        before["system"] = _without(opening, start)
        if before["system"] is None:
            return None
    order = [role for role in ROLES if role in before]
    return Turns(start, {r: before[r] for r in order}, {r: after[r] for r in order}, answer, default)


def _without(text, part, end=False):
    """``text`` without what it begins (or ends) with; None if it does not."""
    if end:
        return text.removesuffix(part) if text.endswith(part) else None
    return text.removeprefix(part) if text.startswith(part) else None


def _chats(with_system) -> list[Chat]:
    """Chats to compare two templates by."""
    words = ["Why is the sky blue?", "Rayleigh:\n\nshort waves scatter.", "And at dusk?", "Red – l'été.", "Thanks!"]
    roles = ["user", "assistant"] * 2 + ["user"]
    talks = [[{"role": role, "content": word} for role, word in zip(roles, words, strict=True)][:n] for n in (1, 3, 5)]
    told = [[{"role": "system", "content": "Be brief."}, *talk] for talk in talks]
    return talks + told if with_system else talks


def _adds_bos(tokenizer):
    """Whether the tokenizer itself begins a text with its first token, as llama.cpp then does too."""
    return tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]


def _stops(tokenizer, turns):
    """The tokens that end an answer, and the text after it."""
    stops = [tokenizer.decode([number]).strip() for number in sorted(tokenizer.eos_token_ids)]
    if not isinstance(turns, str):
        stops.append(turns.after["assistant"].strip() or turns.before["user"].strip())
    return [stop for stop in dict.fromkeys(stops) if stop and stop.isprintable() and '"' not in stop]


def _parameters(source):
    path = source / "generation_config.json"
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:  # mlx-lm does not read it
        config = {}
    return {name: config[key] for key, name in PARAMETERS.items() if isinstance(config.get(key), int | float)}
