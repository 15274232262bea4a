"""A tiny model with a tokenizer of SentencePiece's kind: BPE over characters, ▁ for spaces, bytes for the rest."""

import json

import mlx.core as mx
from mlx_lm.models import llama, qwen3
from mlx_lm.utils import save_config, save_model
from tiny_models import CHAT_TEMPLATE
from tokenizers import Tokenizer, decoders, models, normalizers

WORDS = ["he", "▁t", "▁the", "em", "the", "them", "▁them", "an", "▁an", "and", "▁and", "ma", "▁ma", "man", "▁man"]
SPARE_ROWS = 5


def write_model(folder, kind="llama", tied=True, **config):
    """The folder, with a random model of ``kind`` in float32, whose tables have SPARE_ROWS rows without a token."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = write_tokenizer(folder) + SPARE_ROWS
    config = {
        **{"architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind, "hidden_size": 32},
        **{"num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"rms_norm_eps": 1e-5, "vocab_size": rows, "tie_word_embeddings": tied, "max_position_embeddings": 64},
        **{"head_dim": 8, "rope_theta": 1e4, "eos_token_id": 2},
        **config,
    }
    mx.random.seed(1)
    module = {"llama": llama, "mistral": llama, "qwen3": qwen3}[kind]
    model = module.Model(module.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


def write_tokenizer(folder):
    """The number of tokens."""
    characters = ["▁", *"abcdefghijklmnopqrstuvwxyz.0123456789"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *WORDS]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    # As SentencePiece's have them: by the rank of what is made, all that make it.
    splits = ((word[:i], word[i:]) for word in WORDS for i in range(1, len(word)))
    merges = [split for split in splits if split[0] in vocabulary and split[1] in vocabulary]
    bpe = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"unk_token": "<unk>", "chat_template": CHAT_TEMPLATE})
    )
    return len(tokens)
