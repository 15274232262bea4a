"""Pretrain the tiny Llama that `ember-mlx demo` fine-tunes, from nothing but docstrings and comments.

    python examples/02_pretrain_demo_model.py --steps 20                       # a quick try: the standard library only
    python examples/02_pretrain_demo_model.py --packages numpy scipy pandas    # more text, from installed packages

The text is read from source files (ember_mlx/demo/corpus.py), the tokenizer and then the model are trained on it, and
the folder can be loaded with mlx_lm.load. The tokens stay in --work, where the next run finds them, so that they can be
made on one machine and trained on at another. How the bundled model was made is told in training.json beside it: 3.5
minutes on an H100, which would be days on a CPU.
"""

import argparse
import importlib.metadata
import json
import math
import platform
import sys
import sysconfig
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import tokenizers
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ember_mlx.demo import corpus

REPOSITORY = Path(__file__).resolve().parents[1]

# 1.64 million parameters, 3.3 MB in bfloat16: 0.4 s for a training step of 4 x 64 tokens on two CPU cores.
# fmt: off
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4096, "tie_word_embeddings": False,
    "hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}
# fmt: on
PAD, BEGIN, END, USER, ASSISTANT = SPECIAL = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def prepare(work: Path, site_packages: Path, packages: list[str]) -> None:
    """Write tokenizer.json, train.npy and valid.npy (uint16 token streams), and sources.json to `work`."""
    work.mkdir(parents=True, exist_ok=True)
    installed = importlib.metadata.distributions(path=[str(site_packages)])
    distributions = [distribution for distribution in installed if distribution.name in packages]
    missing = set(packages) - {distribution.name for distribution in distributions}
    if missing:
        sys.exit(f"not installed in {site_packages}: {', '.join(sorted(missing))}; install them or change --packages")
    folders = {
        site_packages / file.parts[0]
        for distribution in distributions
        for file in distribution.files or ()
        if len(file.parts) == 2 and file.name == "__init__.py"
    }
    files = corpus.pretraining_files(sorted(folders))
    texts = {"train": [], "valid": []}
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        found = corpus.pretraining_text(files, partial(pool.map, chunksize=64))
        for (_, module), (documents, pairs) in zip(files, found, strict=True):
            # One file in a hundred is for validation, chosen by a hash of its name: the same ones in every run.
            split = texts["valid" if zlib.crc32(module.encode()) % 100 == 0 else "train"]
            split += [f"{BEGIN}{document}{END}" for document in documents]
            split += [f"{BEGIN}{USER}{pair['prompt']}{END}{ASSISTANT}{pair['completion']}{END}" for pair in pairs]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=CONFIG["vocab_size"], special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts["train"], trainer)
    tokenizer.save(str(work / "tokenizer.json"), pretty=False)
    sizes = {}
    for name, split in texts.items():
        encodings = tokenizer.encode_batch_fast(split, add_special_tokens=False)
        tokens = np.concatenate([np.asarray(encoding.ids, np.uint16) for encoding in encodings])
        np.save(work / f"{name}.npy", tokens)
        sizes[name] = {"texts": len(split), "characters": sum(map(len, split)), "tokens": len(tokens)}
    sources = {"python": platform.python_version(), "tokenizers": tokenizers.__version__, "files": len(files), **sizes}
    sources["packages"] = {
        distribution.name: {"version": distribution.version, "license": licence(distribution.metadata)}
        for distribution in sorted(distributions, key=lambda distribution: distribution.name.lower())
    }
    (work / "sources.json").write_text(json.dumps(sources, indent=1) + "\n")


def licence(metadata: importlib.metadata.PackageMetadata) -> str:
    """What a package says about its licence, in whichever of the three fields it says it."""
    classifiers = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier", []) if line.startswith("License")]
    return metadata.get("License-Expression") or ", ".join(classifiers) or metadata.get("License", "not stated")


def loss_fn(model: Model, batch: mx.array) -> mx.array:
    """Mean cross entropy, in nats, of each token after the first one."""
    return nn.losses.cross_entropy(model(batch[:, :-1]).astype(mx.float32), batch[:, 1:], reduction="mean")


def validation_loss(model: Model, tokens: np.ndarray, length: int) -> float:
    windows = tokens[: len(tokens) // length * length].reshape(-1, length)[:1024].astype(np.int32)
    batches = np.array_split(windows, max(1, len(windows) // 32))
    return sum(loss_fn(model, mx.array(batch)).item() * len(batch) for batch in batches) / len(windows)


def train(model: Model, tokens: np.ndarray, valid: np.ndarray, args: argparse.Namespace) -> None:
    """AdamW with warm-up and cosine decay, on windows that begin half at a text's beginning and half anywhere."""
    length = args.seq_length + 1
    rng = np.random.default_rng(args.seed)
    beginnings = np.flatnonzero(tokens[:-length] == CONFIG["bos_token_id"])
    warmup = min(500, args.steps // 10 + 1)
    rise = optim.linear_schedule(0.0, args.learning_rate, warmup)
    fall = optim.cosine_decay(args.learning_rate, args.steps - warmup)
    schedule = optim.join_schedules([rise, fall], [warmup])
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.95], weight_decay=0.1, bias_correction=True)
    loss_and_grad = nn.value_and_grad(model, loss_fn)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: mx.array) -> mx.array:
        loss, gradients = loss_and_grad(model, batch)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        return loss

    start = time.perf_counter()
    for i in range(1, args.steps + 1):
        anywhere = rng.integers(len(tokens) - length, size=args.batch_size // 2)
        places = np.concatenate([rng.choice(beginnings, args.batch_size - len(anywhere)), anywhere])
        loss = step(mx.array(tokens[places[:, None] + np.arange(length)].astype(np.int32)))
        mx.eval(state, loss)
        if i % args.report == 0 or i == args.steps:
            speed = ((i - 1) % args.report + 1) * args.batch_size * args.seq_length / (time.perf_counter() - start)
            losses = f"loss {loss.item():.3f}, validation {validation_loss(model, valid, length):.3f} nats"
            print(f"step {i}: {losses}, {speed:.0f} tokens/s", flush=True)
            start = time.perf_counter()


def save(model: Model, folder: Path, work: Path) -> None:
    """A folder that mlx_lm.load reads: weights in bfloat16, configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(tree_map(lambda weight: weight.astype(mx.bfloat16), model.parameters())))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    (folder / "tokenizer.json").write_bytes((work / "tokenizer.json").read_bytes())
    # fmt: off
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "bos_token": BEGIN, "eos_token": END,
        "model_max_length": CONFIG["max_position_embeddings"], "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    # fmt: on
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    site_packages = Path(sysconfig.get_path("purelib"))
    build = REPOSITORY / "build/demo_model"  # the bundled model is replaced only by asking for it
    parser.add_argument("--out", type=Path, default=build / "model", help="folder of the model")
    parser.add_argument("--work", type=Path, default=build / "tokens", help="folder of the tokens")
    parser.add_argument("--packages", nargs="*", default=[], help="installed packages (pip's names) to read too")
    parser.add_argument("--site-packages", type=Path, default=site_packages, help="where they are installed")
    parser.add_argument("--steps", type=int, default=2000, help="0: only make the tokens")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--report", type=int, default=500, help="steps between two validations")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    if not (args.work / "sources.json").exists():
        prepare(args.work, args.site_packages, args.packages)
    sources = json.loads((args.work / "sources.json").read_text())
    if args.packages and set(args.packages) != set(sources["packages"]):
        sys.exit(f"{args.work} holds the tokens of other packages: delete it, or give another --work")
    print(f"text: {sources['train']}, validation {sources['valid']}")
    if args.steps == 0:
        return
    tokens, valid = np.load(args.work / "train.npy"), np.load(args.work / "valid.npy")
    mx.random.seed(args.seed)
    model = Model(ModelArgs.from_dict(CONFIG))
    start = time.perf_counter()
    train(model, tokens, valid, args)
    save(model, args.out, args.work)
    provenance = {
        "made_by": "examples/02_pretrain_demo_model.py",
        "parameters": sum(weight.size for _, weight in tree_flatten(model.parameters())),
        "validation_loss_nats_per_token": round(validation_loss(model, valid, args.seq_length + 1), 4),
        "ln_vocab_size": round(math.log(CONFIG["vocab_size"]), 4),
        "settings": {key: value for key, value in vars(args).items() if isinstance(value, int | float)},
        "tokens_trained_on": args.steps * args.batch_size * args.seq_length,
        "seconds": round(time.perf_counter() - start),
        "machine": str(mx.device_info().get("device_name", platform.processor())),
        "versions": {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")},
        "text": sources,
        "held_out_for_the_demo": sorted(corpus.HELD_OUT),
    }
    (args.out / "training.json").write_text(json.dumps(provenance, indent=1) + "\n")
    loss, chance = provenance["validation_loss_nats_per_token"], provenance["ln_vocab_size"]
    print(f"{args.out}: validation loss {loss} nats a token, ln V is {chance}")


if __name__ == "__main__":
    main()
