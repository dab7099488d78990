"""FlashHead for MLX: a fast, accurate vocabulary head for small language models."""
