"""``ember-mlx geometry``: train as ``train`` does, measure the shape of the token tables' gradients, and tell of it."""

__all__ = []
