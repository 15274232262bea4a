"""What was trained, in the forms of other programs: peft, GGUF, Ollama."""

__all__ = []
