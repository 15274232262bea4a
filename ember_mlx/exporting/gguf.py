"""GGUF, the file of llama.cpp, LM Studio and Ollama: by llama.cpp's own converter, or by mlx-lm's where that is right.

llama.cpp's ``convert_hf_to_gguf.py`` is run as a program on a model folder. mlx-lm's converter needs nothing else, but
knows Llama's weights alone, with a tokenizer of SentencePiece's kind. Four things that it writes are put right here:

- the kinds of tokens are signed numbers: llama.cpp refuses a file with unsigned ones;
- a token's score is the rank of its merge: with one score for all, as it writes them, text is split in other places;
- special tokens that were added are control tokens, which llama.cpp does not print;
- rows of a padded table have tokens: llama.cpp refuses a table with more rows than tokens.
"""

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import gguf

from ember_mlx.exporting.inputs import SENTENCEPIECE, Fused, export_folder, write_fused
from ember_mlx.exporting.ollama import MODELFILE, write_modelfile
from ember_mlx.finetune import safe_reading
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.replacing import replaced

__all__ = ["OUTTYPES", "Converter", "choose_converter", "convert_by_mlx_lm", "not_by_mlx_lm", "script_of", "write_gguf"]

OUTTYPES = ("f16", "bf16", "f32", "q8_0")
SCRIPT = "convert_hf_to_gguf.py"
FILES = ("model-*.gguf", MODELFILE)
MODELS = ("llama", "mistral")  # mlx-lm's converter takes mixtral too, but leaves its experts under MLX's names
WEIGHTS = re.compile(
    r"token_embd|output|output_norm|blk\.\d+\.(attn_norm|attn_q|attn_k|attn_v|attn_output|ffn_norm|ffn_gate|ffn_up|ffn_down)"
)
GET_IT = "git clone --depth 1 https://github.com/ggml-org/llama.cpp"
TOKENS, SCORES, KINDS = (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))
SPLIT_ELSEWHERE = "some words will be split in other places than in training"
NO_MERGE = -1e6  # below that of any merge


@dataclass(frozen=True)
class Converter:
    """Who converts, in words, with what cannot be done; and how: ``convert(fused, folder, path)``."""

    words: str
    convert: Callable[[Fused, Path, Path], None]
    copies: int  # of the weights on the disk, at the most


def write_gguf(folder: Path, fused: Fused, converter: Converter, outtype: str) -> str:
    """Write a GGUF file, and the Modelfile for Ollama beside it.

    Returns:
        What was written, in words.

    Raises:
        InputError: for whatever the converter has against the model, and what keeps the folder from being written.
    """
    name = f"model-{outtype}.gguf"
    with export_folder(folder, fused.nbytes * converter.copies, FILES) as partial:
        converter.convert(fused, partial, partial / name)
        return f"{name}; {write_modelfile(partial, name, fused)}"


def script_of(llama_cpp: str) -> Path:
    """The converter in the folder that ``--llama-cpp`` names.

    Raises:
        InputError: for a folder without it.
    """
    script = Path(llama_cpp) if Path(llama_cpp).name == SCRIPT else Path(llama_cpp) / SCRIPT
    if not script.is_file():
        raise InputError(f"--llama-cpp {llama_cpp}: has no {SCRIPT}; give the folder of llama.cpp: {GET_IT}")
    return script


def choose_converter(fused: Fused, llama_cpp: str | None, outtype: str) -> Converter:
    """The converter for a model: llama.cpp's if it is named, or else mlx-lm's, or else llama.cpp's on the PATH.

    Raises:
        InputError: for a folder without the converter, and when there is none for this model.
    """
    if llama_cpp is not None:
        return _llama_cpp(script_of(llama_cpp), fused, outtype)
    reason = not_by_mlx_lm(fused, outtype)
    if reason is None:
        return Converter(f"mlx-lm's converter, as f16{_other_splits(fused)}{_spaces(fused)}", convert_by_mlx_lm, 1)
    found = shutil.which(SCRIPT)
    if found:
        return _llama_cpp(Path(found), fused, outtype)
    raise InputError(
        f"--format gguf: mlx-lm's converter cannot write this model: {reason}; name the folder of llama.cpp as "
        f"--llama-cpp: {GET_IT}"
    )


def not_by_mlx_lm(fused: Fused, outtype: str = "f16") -> str | None:
    """Why mlx-lm's converter would write a wrong file, in words; None where it would not."""
    config = fused.config
    kind = config.get("model_type")
    if kind not in MODELS:
        return f"it is of type {kind}, not {' or '.join(MODELS)}"
    if outtype != "f16":
        return f"it writes f16 alone, not {outtype}"
    other = [name for name in fused.weights if not WEIGHTS.fullmatch(_ggml_name(name).removesuffix(".weight"))]
    if other:
        return f"it has no name for {other[0]}"
    if config.get("head_dim") not in (None, config["hidden_size"] // config["num_attention_heads"]):
        return f"it does not write head_dim {config['head_dim']}"
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key) or {}
        if scaling.get("rope_type", scaling.get("type", "default")) not in ("default", "linear"):
            return f"it does not write {key} {scaling}"
    if "sliding_attention" in (config.get("layer_types") or ()):
        return "it does not write sliding windows"
    if not _is_sentencepiece(fused):
        return "its tokenizer is not of SentencePiece's kind"
    return None


def convert_by_mlx_lm(fused: Fused, folder: Path, path: Path) -> None:
    """Write a GGUF file in f16 with mlx-lm's converter, put right; ``folder`` takes what it reads, for a while.

    Raises:
        InputError: for a weight that f16 cannot hold.
        Exception: whatever MLX or the tokenizer has against it.
    """
    half = {name: array.astype(mx.float16) for name, array in fused.weights.items()}
    safe_reading.check_finite(
        half, "GGUF: as f16", "use `ember-mlx export --format gguf --llama-cpp` with --outtype bf16"
    )
    tokenizer = folder / "tokenizer"
    fused.tokenizer.save_pretrained(str(tokenizer))
    prepare = gguf.prepare_metadata

    def prepared(config, vocabulary):
        return _corrected(prepare(config, vocabulary), fused)

    heads = {"num_key_value_heads": fused.config["num_attention_heads"]}
    # It prints the name of a file that is not in its place yet.
    with replaced(gguf, "prepare_metadata", prepared), redirect_stdout(io.StringIO()):
        gguf.convert_to_gguf(tokenizer, half, heads | fused.config, str(path))
    shutil.rmtree(tokenizer)


def _llama_cpp(script, fused, outtype):
    def convert(fused, folder, path):
        model = folder / "fused"
        write_fused(model, fused)
        _run(script, [str(model), "--outfile", str(path), "--outtype", outtype])
        shutil.rmtree(model)
        if not _is_gguf(path):
            raise InputError(f"--llama-cpp: {script} wrote no GGUF file; give a newer llama.cpp: {GET_IT}")

    words = f"llama.cpp's converter {script}, as {outtype}{_spaces(fused)}"
    if _is_sentencepiece(fused) and not (fused.source / SENTENCEPIECE).is_file():
        words += f"; the model has no {SENTENCEPIECE}, without which it gives all tokens one score: {SPLIT_ELSEWHERE}"
    return Converter(words, convert, 2)


def _is_gguf(path):
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _run(script, arguments):
    try:
        command = [sys.executable, str(script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise InputError(f"--llama-cpp: {script} does not start ({error}); give a newer llama.cpp: {GET_IT}") from error
    if done.returncode:
        last = next((line.strip() for line in reversed((done.stdout + done.stderr).splitlines()) if line.strip()), "")
        remedy = "give a newer llama.cpp, or another model"
        if "ModuleNotFoundError" in last:
            remedy = f"pip install -r {script.parent / 'requirements.txt'}"
        raise InputError(f"--llama-cpp: {script} failed with {done.returncode}: {last or 'it says nothing'}; {remedy}")


def _ggml_name(name):
    return gguf.translate_weight_names(name)


def _is_sentencepiece(fused):
    """Whether the tokenizer is a BPE over characters with ▁ for spaces, as llama.cpp splits text with scores."""
    model = _tokenizer_json(fused)["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback")) and not model.get("ignore_merges")


def _other_splits(fused):
    """llama.cpp merges all neighbours that are a token together, as SentencePiece does, which knows no other merges."""
    vocabulary, merges = _tokenizer_json(fused)["model"]["vocab"], set(_merges(fused))
    splits = ((token[:i], token[i:]) for token in vocabulary for i in range(1, len(token)))
    if all(split in merges for split in splits if split[0] in vocabulary and split[1] in vocabulary):
        return ""
    return f"; its tokenizer lacks merges that SentencePiece's have: {SPLIT_ELSEWHERE}"


def _merges(fused):
    merges = _tokenizer_json(fused)["model"]["merges"]
    return [tuple(merge if isinstance(merge, list) else merge.split(" ")) for merge in merges]


def _spaces(fused):
    """What becomes of added words that take the space before them in, as they do with SentencePiece's tokenizers."""
    added = getattr(fused.tokenizer._tokenizer, "added_tokens_decoder", {}).values()
    words = [token.content for token in added if token.normalized and not token.special]
    if not words or not _is_sentencepiece(fused):
        return ""
    return f"; llama.cpp will read the spaces around added words, such as {words[0]!r}, as tokens of their own"


def _tokenizer_json(fused):
    """What a tokenizer.json would hold."""
    backend = getattr(fused.tokenizer._tokenizer, "backend_tokenizer", None)
    return json.loads(backend.to_str()) if backend is not None else {"model": {}}


def _corrected(metadata: dict[str, Any], fused: Fused) -> dict[str, Any]:
    """mlx-lm's metadata, put right as the module's text says."""
    tokens, kinds = list(metadata[TOKENS]), metadata[KINDS].tolist()
    for number, token in getattr(fused.tokenizer._tokenizer, "added_tokens_decoder", {}).items():
        if token.special and number < len(kinds):
            kinds[number] = gguf.TokenType.CONTROL.value
    rows = fused.model.model.embed_tokens.weight.shape[0]
    more = range(len(tokens), rows)
    tokens += [f"[PAD{number}]" for number in more]
    kinds += [gguf.TokenType.UNUSED.value for _ in more]
    ranks = {}
    for rank, merge in enumerate(_merges(fused)):
        ranks.setdefault("".join(merge), rank)
    scores = [float(-ranks[token]) if token in ranks else NO_MERGE for token in tokens]
    corrected = {TOKENS: tokens, SCORES: mx.array(scores, mx.float32), KINDS: mx.array(kinds, mx.int32)}
    template = fused.tokenizer.chat_template
    if isinstance(template, str):
        corrected["tokenizer.chat_template"] = template
    return metadata | corrected
