"""Step 0: hidden states in the metric and the dimensions of the centroids."""

import mlx.core as mx


def project(hidden: mx.array, projection: mx.array) -> mx.array:
    """Return ``hidden @ projection.T``.

    Args:
        hidden: Final hidden states, ``(N, D)``.
        projection: ``(d + 1, D)``.

    Returns:
        ``(N, d + 1)``, in the dtype of ``projection``; on the CPU, where MLX sums
        halves in halves, in float32.
    """
    dtype = projection.dtype if mx.default_device() == mx.gpu else mx.float32
    return hidden.astype(dtype) @ projection.astype(dtype).T
