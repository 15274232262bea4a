"""``ember-mlx server``: mlx_lm.server, whose adapters, also those that a request names, take token tables too."""

import os
import socket
import sys
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from threading import Event

from huggingface_hub.constants import HF_HUB_CACHE

from ember_mlx.commands.of_mlx_lm import run_command, texts
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.replacing import replaced

__all__ = ["main"]

HELP = {
    "model": {
        "model": ("MODEL", "A model folder, or a name on the Hugging Face hub. Default: the one that a request names.")
    }
    | texts("adapter_path", "trust_remote_code", "draft_model", "num_draft_tokens")
    | {
        "chat_template": ("TEXT", "A chat template of your own. Default: the tokenizer's."),
        "chat_template_args": ("JSON", "Settings of the chat template, a JSON object."),
    }
    | texts("use_default_chat_template"),
    "where it listens": {
        "host": ("HOST", "Name or address to listen at."),
        "port": ("PORT", "Port to listen at."),
        "allowed_origins": ("ORIGINS", "Web pages that may ask, by commas; *: any."),
        "log_level": (None, "Least level of the lines in the log."),
    },
    "sampling, where a request does not say": {"max_tokens": ("N", "Write at most N tokens an answer.")}
    | texts("temp", "top_p", "top_k", "min_p"),
    "memory and speed": {
        "decode_concurrency": ("N", "Answer at most N requests together."),
        "prompt_concurrency": ("N", "Read at most N prompts together."),
        "prompt_cache_size": ("N", "Keep the key-value caches of at most N prompts."),
        "prompt_cache_bytes": ("SIZE", "Keep at most so many bytes of them, such as 2GB. Default: no limit."),
        "kv_bits": ("BITS", "Quantize the key-value cache; requests then go one by one. Default: not quantized."),
    }
    | texts("kv_group_size", "quantized_kv_start", "prefill_step_size", "pipeline"),
}
EPILOG = """\
A request may name another adapter folder as "adapters", and another model as "model". The model that is served
has its adapter, named or not.

examples:
  ember-mlx server --model Qwen/Qwen3-0.6B --adapter-path adapters
      with what `ember-mlx train` saved, at http://127.0.0.1:8080/v1
  ember-mlx server --model fused_model --port 1234 --temp 0.7
      with what `ember-mlx fuse` wrote"""


def main(arguments: list[str]) -> None:
    """Serve a model: mlx_lm.server with our ``load`` in the place of its own, which cannot load token tables.

    Where mlx-lm's listens at once and goes on without a model that does not load, this one ends.

    Raises:
        InputError: for whatever mlx-lm raises.
    """
    module = import_module("mlx_lm.server")
    description = "Serve a model, and adapters with their token tables, by the interface of OpenAI."
    with ExitStack() as stack:

        class Provider(module.ModelProvider):
            """Asked in the thread that generates: what MLX has not computed yet, no other thread can use."""

            def __init__(self, args):
                super().__init__(args)
                self.tried = Event()
                self.error = None

            def load_default(self):
                try:
                    super().load_default()
                except Exception as error:  # which the main thread then raises
                    self.error = error
                finally:
                    self.tried.set()

            def load(self, model_path, adapter_path=None, draft_model_path=None):
                # mlx-lm's gives the default model the default adapter, whatever adapter the request names, and where
                # the request names the model, as clients do that ask /v1/models, none.
                if model_path == "default_model" or _is_same(model_path, self.cli_args.model):
                    model_path = "default_model" if adapter_path is None else self.cli_args.model
                return super().load(model_path, adapter_path, draft_model_path)

        class Generator(module.ResponseGenerator):
            """Is there once the model is loaded."""

            def __init__(self, provider, prompt_cache):
                super().__init__(provider, prompt_cache)
                stack.callback(self.stop_and_join)
                provider.tried.wait()
                if provider.error:
                    raise provider.error

        def run(host, port, provider):
            _check_address(host, port)
            with suppress(OSError):  # mlx-lm lists it for /v1/models, and fails where it does not exist
                Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
            stock_run(host, port, provider)

        stock_run = module.run
        for name, ours in (("ModelProvider", Provider), ("ResponseGenerator", Generator), ("run", run)):
            stack.enter_context(replaced(module, name, ours))
        run_command("server", arguments, description, HELP, EPILOG)
    # Threads of requests may still be in MLX, and Python would abort where it ends beneath them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _is_same(named, served):
    """Whether a request names the model that is served, by its name or by its folder, as /v1/models lists it."""
    return served is not None and (named == served or os.path.realpath(named) == os.path.realpath(served))


def _check_address(host, port):
    """Before the model is loaded, which may take a minute."""
    if not 0 <= port < 2**16:  # the resolver would take it modulo 2^16
        raise InputError(f"--port {port}: must be from 0 to {2**16 - 1}")
    try:
        [family, kind, protocol, _, address], *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself sets it
            probe.bind(address)
    except OSError as error:
        where = f"--host {host} --port {port}"
        raise InputError(
            f"{where}: cannot listen there ({error.strerror or error}); give another --port or --host"
        ) from error
