"""The recipes of ``ember-mlx recipes``: files for ``ember-mlx train --config``, with a reason for each value."""

from pathlib import Path

__all__ = ["RECIPES"]

RECIPES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
"""Path of each recipe, by its name."""
