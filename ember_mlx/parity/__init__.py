"""Parity: every implementation of Ember, in every framework, against one float64 oracle."""

__all__ = []
