"""``ember-mlx generate``: mlx_lm.generate, whose ``--adapter-path`` takes token tables too."""

from ember_mlx.commands.of_mlx_lm import run_command, texts

__all__ = ["main"]

HELP = {
    "model": texts("model", "adapter_path", "trust_remote_code", "draft_model", "num_draft_tokens")
    | {"quantize_activations": (None, "Quantize activations as the layer's weights are.")},
    "prompt": {
        "prompt": ("TEXT", "What to answer; - reads it from the standard input."),
        "system_prompt": ("TEXT", "A system message before it. Default: none."),
        "prefill_response": ("TEXT", "How the answer begins. Default: as the model likes."),
        "image": ("FILE", "Images for the prompt's placeholders, in their order. Default: none."),
        "ignore_chat_template": (None, "Give the prompt to the model as it is, without the chat template."),
        "chat_template_config": ("JSON", "Settings of the chat template, a JSON object. Default: none."),
    }
    | texts("use_default_chat_template"),
    "sampling": {
        "max_tokens": ("N", "Write at most N tokens."),
        "extra_eos_token": ("TOKEN", "More tokens that end the answer. Default: none."),
        "min_tokens_to_keep": ("N", "Keep at least N tokens under --min-p."),
        "seed": ("N", "Seed of the sampling. Default: MLX's own."),
    }
    | texts("temp", "top_p", "top_k", "min_p", "xtc_probability", "xtc_threshold"),
    "memory and output": {
        "max_kv_size": ("TOKENS", "Keep at most so many tokens in the key-value cache. Default: all."),
        "prompt_cache_file": ("FILE", "A key-value cache that mlx_lm.cache_prompt saved. Default: none."),
        "kv_bits": ("BITS", "Quantize the key-value cache. Default: it is not quantized."),
    }
    | texts("kv_group_size", "quantized_kv_start", "prefill_step_size")
    | {"verbose": ("BOOL", "True reports speed and memory too; False prints the answer alone. Default: True.")},
}
EPILOG = """\
examples:
  ember-mlx generate --model Qwen/Qwen3-0.6B --adapter-path adapters --prompt "Hello"
      with what `ember-mlx train` saved
  ember-mlx generate --model fused_model --prompt "Hello" --max-tokens 400 --temp 0.7
      with what `ember-mlx fuse` wrote
  cat question.txt | ember-mlx generate --model Qwen/Qwen3-0.6B --prompt - --verbose False
      from and to a pipe"""


def main(arguments: list[str]) -> None:
    """Write text: mlx_lm.generate with our ``load`` in the place of its own, which cannot load token tables.

    Raises:
        InputError: for whatever mlx-lm raises.
    """
    description = "Write text with a model, and with an adapter whose token tables mlx-lm cannot load."
    run_command("generate", arguments, description, HELP, EPILOG)
