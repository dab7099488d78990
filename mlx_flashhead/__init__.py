"""FlashHead for MLX: a fast, accurate vocabulary head for small language models."""

from mlx_flashhead.conversion import convert
from mlx_flashhead.loading import load
from mlx_flashhead.replacement import replace_head

__all__ = ["convert", "load", "replace_head"]
