"""``ember-mlx chat``: mlx_lm.chat, whose ``--adapter-path`` takes token tables too."""

from contextlib import suppress

from ember_mlx.commands.of_mlx_lm import run_command

__all__ = ["main"]

HELP = {
    "model": {
        "model": (
            "MODEL",
            "A model folder, or a name on the Hugging Face hub. Default: mlx-community/Llama-3.2-3B-Instruct-4bit.",
        ),
        "adapter_path": ("FOLDER", "An adapter folder, with token tables or without. Default: the model alone."),
        "trust_remote_code": (None, "Run code that comes with the model or its tokenizer."),
        "system_prompt": ("TEXT", "A system message before each question. Default: none."),
    },
    "sampling": {
        "max_tokens": ("N", "Write at most N tokens an answer."),
        "temp": ("T", "Temperature; 0: always the likeliest token."),
        "top_p": ("P", "Draw from the likeliest tokens that add up to P; 1: from all."),
        "xtc_probability": ("P", "How often XTC sampling leaves out the likeliest tokens."),
        "xtc_threshold": ("P", "Which tokens XTC sampling may leave out: those above P."),
        "seed": ("N", "Seed of the sampling."),
    },
    "memory": {
        "max_kv_size": ("TOKENS", "Keep at most so many tokens of the chat. Default: all."),
        "prefill_step_size": ("TOKENS", "Read a question in parts of so many tokens; fewer take less memory."),
        "pipeline": (None, "On several machines, split the model by layers; without, by tensors."),
    },
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
