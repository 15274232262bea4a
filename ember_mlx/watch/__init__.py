"""``ember-mlx watch``: the page of runs that are under way, served on this machine alone."""

__all__ = []
