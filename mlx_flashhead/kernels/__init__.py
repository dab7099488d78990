"""The three steps of FlashHead decoding, one file a step (paper, section 3)."""

from mlx_flashhead.kernels._launch import use_kernels

__all__ = ["use_kernels"]
