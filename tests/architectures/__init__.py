"""mlx-lm's architectures in miniature, and what tracing says about their token tables; `python -m architectures`."""
