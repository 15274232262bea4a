"""The commands, a file each with ``main(arguments)``; :mod:`ember_mlx.cli` finds them by name."""

__all__ = []
