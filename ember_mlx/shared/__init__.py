"""The ground: what needs neither MLX nor PyTorch, and what both packages share."""

__all__ = []
