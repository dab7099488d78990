"""What a user may choose about a head, and whether it makes sense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlx_flashhead.config import SAMPLINGS

HEAD_BITS = (4, 5, 6, 8, 16)
CENTROID_BITS = (2, 4, 8, 16)

# Together the centroids of a row's clusters have a third of its length: less misses
# more tokens than it saves bytes, more saves few rows (docs/retrieval.md).
_CENTROID_SHARE = 3


@dataclass(frozen=True)
class HeadOptions:
    """Choices about a head.

    Attributes:
        cluster_size: Rows in a cluster, C. With 1, each row has a centroid of its own.
        num_probes: Clusters scored exactly per position, P; ``None`` leaves the choice
            to calibration, or to a share of all clusters without it.
        target_recall: Recall that calibration chooses P for, in (0, 1).
        head_bits: Bits of the stored rows, 4, 5, 6, 8 or 16; ``source`` moves the
            rows as they are, bit for bit.
        head_group_size: Group size of rows that are quantized here.
        centroid_bits: Bits of the centroids, 2, 4, 8 or 16; ``None``: 2 if
            ``cluster_size`` is 1, else 4.
        seed: Of the clustering, of the centroids' rotation and of calibration.
        sampling: As in ``FlashHeadConfig``.

    Raises:
        ValueError: If a value is out of its range.
    """

    cluster_size: int = 1
    num_probes: int | None = None
    target_recall: float = 0.999
    head_bits: int | Literal["source"] = "source"
    head_group_size: int = 64
    centroid_bits: int | None = None
    seed: int = 0
    sampling: str = "deterministic"

    def __post_init__(self) -> None:
        if self.cluster_size < 1:
            raise ValueError(f"cluster_size={self.cluster_size} must be at least 1.")
        if not 0 < self.target_recall < 1:
            raise ValueError(
                f"target_recall={self.target_recall} must lie between 0 and 1; "
                "0.999 is one miss in a thousand tokens."
            )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0.")
        for name, value, allowed in (
            ("head_bits", self.head_bits, ("source", *HEAD_BITS)),
            ("centroid_bits", self.centroid_bits, (None, *CENTROID_BITS)),
            ("sampling", self.sampling, SAMPLINGS),
        ):
            if value not in allowed:
                names = ", ".join(str(v) for v in allowed if v is not None)
                raise ValueError(f"{name}={value!r} must be one of {names}.")

    @property
    def stored_centroid_bits(self) -> int:
        """Bits of the centroids."""
        if self.centroid_bits is not None:
            return self.centroid_bits
        return 2 if self.cluster_size == 1 else 4

    def centroid_dims(self, hidden_size: int, *, is_calibrated: bool) -> int:
        """Return the length of a centroid, d: what the kernels and packing take.

        Args:
            hidden_size: Length of a row, D.
            is_calibrated: Whether the directions that matter are known; else all do.
        """
        wanted = hidden_size
        if is_calibrated:
            wanted = min(wanted, hidden_size * self.cluster_size // _CENTROID_SHARE)
        for step in (64, 32):
            if hidden_size >= step:
                nearest = max(1, round(wanted / step)) * step
                return min(nearest, hidden_size // step * step)
        return max(1, wanted)
