"""``ember-mlx chat``: mlx_lm.chat, whose ``--adapter-path`` takes token tables too."""

from contextlib import suppress

from ember_mlx.commands.of_mlx_lm import run_command, texts

__all__ = ["main"]

HELP = {
    "model": texts("model", "adapter_path", "trust_remote_code")
    | {"system_prompt": ("TEXT", "A system message before each question. Default: none.")},
    "sampling": {"max_tokens": ("N", "Write at most N tokens an answer.")}
    | texts("temp", "top_p", "xtc_probability", "xtc_threshold")
    | {"seed": ("N", "Seed of the sampling.")},
    "memory": {"max_kv_size": ("TOKENS", "Keep at most so many tokens of the chat. Default: all.")}
    | texts("prefill_step_size", "pipeline"),
}
EPILOG = """\
In the chat, q leaves, r starts anew, h helps.

examples:
  ember-mlx chat --model Qwen/Qwen3-0.6B --adapter-path adapters
      with what `ember-mlx train` saved
  ember-mlx chat --model fused_model --temp 0.7 --max-tokens 1000
      with what `ember-mlx fuse` wrote"""


def main(arguments: list[str]) -> None:
    """Chat in the terminal: mlx_lm.chat with our ``load`` in the place of its own, which cannot load token tables.

    Raises:
        InputError: for whatever mlx-lm raises.
    """
    with suppress(EOFError):  # Ctrl-D, or the end of a pipe, leaves as q does
        run_command("chat", arguments, "Chat with a model, and with an adapter and its token tables.", HELP, EPILOG)
