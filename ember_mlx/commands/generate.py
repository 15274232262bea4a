"""``ember-mlx generate``: mlx_lm.generate, whose ``--adapter-path`` takes token tables too."""

from ember_mlx.commands.mlx_lm_command import run_mlx_lm

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Write text."""
    run_mlx_lm("generate", arguments)
