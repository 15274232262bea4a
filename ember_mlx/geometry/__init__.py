"""``ember-mlx geometry``: train as ``train`` does, measure the token tables' gradients, and report."""

__all__ = []
