"""Pictures of runs."""

__all__ = []
