"""The bundled model and its data, for ``ember-mlx demo``."""

from pathlib import Path

__all__ = ["MODEL"]

MODEL = Path(__file__).parent / "model"
