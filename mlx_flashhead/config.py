"""Settings of a FlashHead: their names, their validity rules, their JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mlx_flashhead.blocks import probed_count

FORMAT_VERSION = 2
MODEL_TYPE = "flashhead"

SAMPLINGS = ("deterministic", "stochastic", "corrected")

# mx.quantize's own combinations: mode -> (bits, group sizes).
_QUANTIZATIONS = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}


@dataclass(frozen=True)
class Quantization:
    """How rows are packed, in the words of ``mx.quantize``.

    Attributes:
        bits: Bits per weight.
        group_size: Weights that share a scale.
        mode: ``affine``, ``mxfp4``, ``nvfp4`` or ``mxfp8``.

    Raises:
        ValueError: If MLX has no such quantization.
    """

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in _QUANTIZATIONS:
            raise ValueError(
                f"quantization mode {self.mode!r} is unknown; "
                f"use one of {', '.join(_QUANTIZATIONS)}."
            )
        bits, group_sizes = _QUANTIZATIONS[self.mode]
        if self.bits not in bits:
            raise ValueError(
                f"{self.bits} bits are not supported in mode {self.mode}; "
                f"use one of {', '.join(map(str, bits))}."
            )
        if self.group_size not in group_sizes:
            raise ValueError(
                f"group size {self.group_size} is not supported in mode {self.mode}; "
                f"use one of {', '.join(map(str, group_sizes))}."
            )


@dataclass(frozen=True, kw_only=True)
class FlashHeadConfig:
    """Everything but the arrays that a FlashHead is made of.

    Attributes:
        base_model_type: ``model_type`` of the model whose head is replaced.
        head_path: Dotted path of the module replaced, as in ``model.named_modules()``.
        tied: Whether that module is the token embedding as well.
        vocab_size: Rows of the dense head, V.
        hidden_size: Length of a row, D.
        cluster_size: Rows in a cluster, C; 1 where each row has a centroid of its own.
        centroid_dims: Length of a centroid, d.
        num_probes: Clusters scored exactly per position, P, pinned ones included.
        num_pinned: Clusters that are always scored exactly.
        dtype: Float type of unquantized rows and of scales: ``float32``,
            ``float16`` or ``bfloat16``.
        rows: Quantization of the rows, ``None`` if they are stored in ``dtype``.
        centroids: Quantization of the centroids, ``None`` as for ``rows``.
        has_bias: Whether the dense head adds a bias to the logits.
        sampling: How clusters are chosen: ``deterministic`` takes the best;
            ``stochastic`` draws them by their probability, as the paper does;
            ``corrected`` weights what it draws, so that tokens sampled at temperature
            1 follow the dense distribution on average. Below 1, or where the model
            scales or caps logits after the head, that is only roughly so; greedy
            decoding is for ``deterministic``.

    Raises:
        ValueError: If a value is out of its range or two contradict each other.
    """

    base_model_type: str
    head_path: str
    tied: bool
    vocab_size: int
    hidden_size: int
    cluster_size: int
    centroid_dims: int
    num_probes: int
    num_pinned: int
    dtype: str
    rows: Quantization | None
    centroids: Quantization | None
    has_bias: bool = False
    sampling: str = "deterministic"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "cluster_size", "centroid_dims"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.cluster_size > self.vocab_size:
            raise ValueError(
                f"cluster_size={self.cluster_size} must be in [1, {self.vocab_size}]: "
                "a cluster cannot hold more rows than the vocabulary has."
            )
        if self.centroid_dims > self.hidden_size:
            raise ValueError(
                f"centroid_dims={self.centroid_dims} must be in "
                f"[1, {self.hidden_size}]: centroids are no longer than rows."
            )
        if not 0 <= self.num_pinned <= self.num_clusters:
            raise ValueError(
                f"num_pinned={self.num_pinned} must be in [0, {self.num_clusters}]."
            )
        # Not min(num_pinned + 1, K): with every cluster pinned P = K is meant.
        lowest = max(1, self.num_pinned)
        if not lowest <= self.num_probes <= self.num_clusters:
            raise ValueError(
                f"num_probes={self.num_probes} must be in "
                f"[{lowest}, {self.num_clusters}]: at least the pinned clusters, "
                "at most every cluster."
            )
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(
                f"dtype={self.dtype!r} must be float32, float16 or bfloat16."
            )
        if self.sampling not in SAMPLINGS:
            raise ValueError(
                f"sampling={self.sampling!r} must be one of {', '.join(SAMPLINGS)}."
            )
        for name, packing, length in (
            ("rows", self.rows, self.hidden_size),
            ("centroids", self.centroids, self.centroid_dims),
        ):
            if packing is not None and length % packing.group_size:
                raise ValueError(
                    f"{name}: group size {packing.group_size} does not divide their "
                    f"length {length}."
                )

    @property
    def num_clusters(self) -> int:
        """Clusters, K = ceil(V / C)."""
        return -(-self.vocab_size // self.cluster_size)

    @property
    def num_slots(self) -> int:
        """Stored rows, padding included: K * C."""
        return self.num_clusters * self.cluster_size

    @property
    def max_probed_positions(self) -> int:
        """Positions per call above which the dense path is taken.

        From there on probing reads at least as many rows as the whole head has.
        """
        return max(1, self.num_clusters // self.num_probed)

    @property
    def num_probed(self) -> int:
        """Clusters scored exactly per position: P, rounded up in each block."""
        return probed_count(self.num_clusters, self.num_probes)

    def to_json(self) -> dict[str, Any]:
        """Return the ``"flashhead"`` object of ``config.json``."""
        return {"version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FlashHeadConfig:
        """Read the ``"flashhead"`` object of ``config.json``.

        Raises:
            ValueError: If its version is another than this package's, a key is
                missing or a value is invalid.
        """
        version = values.get("version")
        if not isinstance(version, int) or version < FORMAT_VERSION:
            raise ValueError(
                f'config.json: the "flashhead" object has "version" {version!r}, not '
                f"{FORMAT_VERSION}; convert the model again."
            )
        if version > FORMAT_VERSION:
            raise ValueError(
                f"This model has FlashHead format version {version}; this "
                f"mlx-flashhead reads {FORMAT_VERSION}: "
                "pip install -U mlx-flashhead."
            )
        required = {field.name for field in fields(cls)} - {"has_bias", "sampling"}
        if missing := sorted(required - set(values)):
            raise ValueError(
                f'config.json: the "flashhead" object lacks {", ".join(missing)}; '
                "convert the model again."
            )
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        try:
            for name in ("rows", "centroids"):
                if known[name] is not None:
                    known[name] = Quantization(**known[name])
            return cls(**known)
        except TypeError as error:
            raise ValueError(
                f'config.json: the "flashhead" object has a value of a wrong kind '
                f"({error}); convert the model again."
            ) from error
