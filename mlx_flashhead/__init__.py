"""FlashHead for MLX: a fast, accurate vocabulary head for small language models."""

from mlx_flashhead.build import replace_head
from mlx_flashhead.conversion import convert
from mlx_flashhead.loading import load

__all__ = ["convert", "load", "replace_head"]
