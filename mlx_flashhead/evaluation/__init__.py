"""A FlashHead beside dense heads, position by position: figures, table, plot."""

from mlx_flashhead.evaluation.run import evaluate

__all__ = ["evaluate"]
