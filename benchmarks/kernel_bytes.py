"""Bytes that one decoding step of the Metal kernels asks of memory.

Runs the kernels in the harness of ``tests/metal_on_cpu`` on heads of the shapes of
well-known models and prints the tables of ``docs/kernels.md``. Needs a C++ compiler,
about 3 GB of memory and a minute; no Mac and no download: the counts depend on shapes
alone.

    python benchmarks/kernel_bytes.py [--write docs/kernels.md]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from metal_on_cpu import Report, metal_kernel  # noqa: E402

from mlx_flashhead.blocks import num_blocks, probed_count  # noqa: E402
from mlx_flashhead.config import Quantization  # noqa: E402
from mlx_flashhead.kernels import centroid_scores as step_1  # noqa: E402
from mlx_flashhead.kernels import cluster_logits as step_3  # noqa: E402
from mlx_flashhead.kernels._launch import build_kernel, use_kernels  # noqa: E402
from mlx_flashhead.kernels.probe_threshold import probe_threshold  # noqa: E402
from mlx_flashhead.packing import PackedRows  # noqa: E402

# The default head: each row has a centroid a third as long; one row in 32 is read.
CENTROID_BITS = 2
CENTROID_SHARE = 3
PROBE_SHARE = 32
GROUP_SIZE = 64
LINE_BYTES = 128
MARKER = "<!-- made by benchmarks/kernel_bytes.py -->"

# GB/s, as Apple states them (newsroom: M2 June 2022, M4 May 2024, M5 October 2025; the
# Max chips October 2021, January 2023, October 2023, October 2024). Apple gave none for
# the M1: 128 bits of LPDDR4X-4266.
BANDWIDTHS = {
    "M1": 68,
    "M2": 100,
    "M3": 100,
    "M4": 120,
    "M5": 153,
    "M1 Max": 400,
    "M2 Max": 400,
    "M3 Max": 400,
    "M4 Max": 546,
}


@dataclass(frozen=True)
class Model:
    """Shape of a model: all parameters, layers, vocabulary size and hidden size."""

    name: str
    parameters: int
    layers: int
    vocab_size: int
    hidden_size: int

    @property
    def centroid_dims(self) -> int:
        """Length of a centroid, d: a multiple of a group."""
        groups = round(self.hidden_size / CENTROID_SHARE / GROUP_SIZE)
        return max(1, groups) * GROUP_SIZE

    @property
    def body_bytes(self) -> int:
        """Bytes of everything but the (tied) head, at 4 bits."""
        others = self.parameters - self.vocab_size * self.hidden_size
        return others * 9 // 16

    @property
    def dense_bytes(self) -> int:
        """Bytes that the dense 4-bit head reads and writes."""
        return self.vocab_size * (self.hidden_size * 9 // 16 + 2)


MODELS = (
    Model("Gemma-3-270M", 268_098_176, 18, 262144, 640),
    Model("Qwen3-0.6B", 596_049_920, 28, 151936, 1024),
    Model("Llama-3.2-1B", 1_235_814_400, 16, 128256, 2048),
    Model("Gemma-3-1B", 999_885_952, 26, 262144, 1152),
)


@dataclass(frozen=True)
class Step:
    """What one kernel asked for, and the least it could, in bytes.

    Attributes:
        requested: All bytes that threads read and wrote.
        minimum: Each array once, of the rows only the probed.
        in_lines: The lines of memory that threadgroups read from, and what they wrote.
        full_share: Share of the lines of weights that are read from end to end.
    """

    requested: int
    minimum: int
    in_lines: int
    full_share: float | None


def random_words(num_rows: int, depth: int, bits: int) -> PackedRows:
    """Return rows of random words; what they stand for does not matter."""
    random = np.random.default_rng(bits)
    shape = (num_rows, depth * bits // 32)
    words = random.integers(0, 2**32, shape, np.uint32)
    scales = mx.ones((num_rows, depth // GROUP_SIZE), mx.bfloat16)
    return PackedRows(mx.array(words), scales, scales, Quantization(bits, GROUP_SIZE))


def measure(model: Model, head_bits: int) -> dict[str, Step]:
    """Run one decoding step and return the counts of each kernel."""
    vocab_size, dims = model.vocab_size, model.centroid_dims
    num_probes = -(-vocab_size // PROBE_SHARE)
    hidden, projected = (
        mx.random.normal((1, size), key=mx.random.key(0)).astype(mx.bfloat16)
        for size in (model.hidden_size, dims)
    )
    centroids = random_words(vocab_size, dims, CENTROID_BITS)
    rows = random_words(vocab_size, model.hidden_size, head_bits)
    bias = mx.zeros((vocab_size,), mx.float16)

    logits = step_1.centroid_scores(projected, centroids, bias, mx.zeros((1,)))
    threshold = probe_threshold(logits, num_probes=num_probes)
    step_3.cluster_logits(
        hidden,
        rows,
        logits,
        threshold,
        num_probes=num_probes,
        vocab_size=vocab_size,
        cluster_tokens=None,
        token_slots=None,
        head_bias=None,
    )
    row_bytes = rows.nbytes // vocab_size * probed_count(vocab_size, num_probes)
    # One product of MLX's own, of which every weight is read.
    projection = (dims + 1) * model.hidden_size * 2
    return {
        "projection": Step(projection, projection, projection, None),
        "centroid_scores": _step(
            build_kernel("centroid_scores", step_1._INPUTS).report,
            centroids.nbytes + bias.nbytes + logits.nbytes,
        ),
        "probe_threshold": _step(
            build_kernel("probe_threshold", THRESHOLD_INPUTS).report,
            logits.nbytes + 8 * num_blocks(vocab_size),
        ),
        "cluster_logits": _step(
            build_kernel("cluster_logits", step_3._INPUTS).report,
            row_bytes + logits.nbytes + vocab_size * 2,
        ),
    }


WEIGHTS = ("weight", "scales", "biases")
THRESHOLD_INPUTS = ("centroid_logits", "limits")
# Read over and over from the constant or the first-level cache.
CACHED = ("hidden", "projected", "offset", "threshold", "limits")


def _step(report: Report, minimum: int) -> Step:
    """Return the counts of a launch."""
    buffers = [
        buffer
        for name, buffer in report.buffers.items()
        if name not in CACHED and not name.endswith("_shape")
    ]
    written = sum(b.bytes_written for b in buffers)
    weights = [report.buffers[n] for n in WEIGHTS if n in report.buffers]
    lines = sum(b.lines_read for b in weights)
    full = sum(b.lines_read_fully for b in weights)
    return Step(
        sum(b.bytes_read for b in buffers) + written,
        minimum,
        sum(b.lines_read for b in buffers) * LINE_BYTES + written,
        full / lines if lines else None,
    )


def megabytes(size: int) -> str:
    """Return a size in MB."""
    return f"{size / 1e6:.3f}" if size < 1e6 else f"{size / 1e6:.2f}"


def bytes_table(results: dict[tuple[Model, int], dict[str, Step]]) -> list[str]:
    """Return the table of bytes by kernel."""
    lines = [
        "| model | rows | kernel | minimum, MB | requested, MB | full lines "
        "| whole lines, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, bits), steps in results.items():
        for name, step in steps.items():
            sizes = (megabytes(n) for n in (step.minimum, step.requested))
            share = "" if step.full_share is None else f"{step.full_share:.1%}"
            lines.append(
                f"| {model.name} | {bits}-bit | `{name}` | {' | '.join(sizes)} "
                f"| {share} | {megabytes(step.in_lines)} |"
            )
        minimum, requested, in_lines = (
            sum(getattr(step, kind) for step in steps.values())
            for kind in ("minimum", "requested", "in_lines")
        )
        lines.append(
            f"| {model.name} | {bits}-bit | **all; dense 4-bit head "
            f"{megabytes(model.dense_bytes)}** | {megabytes(minimum)} "
            f"| {megabytes(requested)} | | **{megabytes(in_lines)}** |"
        )
    return lines


def milliseconds(model: Model, head_bytes: int, bandwidth: int) -> float:
    """Return the time to read the whole model once at full bandwidth."""
    return (model.body_bytes + head_bytes) / bandwidth / 1e6


def speed_table(results: dict[tuple[Model, int], dict[str, Step]]) -> list[str]:
    """Return the table of what bandwidth allows."""
    lines = [
        "| model | rows | speed-up bound | "
        + " | ".join(f"{chip}, {gb} GB/s" for chip, gb in BANDWIDTHS.items())
        + " |",
        "|---" * (len(BANDWIDTHS) + 3) + "|",
    ]
    for (model, bits), steps in results.items():
        head = sum(step.in_lines for step in steps.values())
        dense_total = model.body_bytes + model.dense_bytes
        cells = []
        for bandwidth in BANDWIDTHS.values():
            dense = 1000 / milliseconds(model, model.dense_bytes, bandwidth)
            ours = 1000 / milliseconds(model, head, bandwidth)
            cells.append(f"{dense:,.0f} → {ours:,.0f}")
        speed_up = dense_total / (model.body_bytes + head)
        lines.append(
            f"| {model.name} | {bits}-bit | {speed_up:.2f} | {' | '.join(cells)} |"
        )
    return lines


def main() -> None:
    """Print the tables, or put them into a document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="Markdown file with two markers.")
    args = parser.parse_args()
    mx.fast.metal_kernel = metal_kernel
    results = {}
    with use_kernels("metal"):
        for model in MODELS:
            for bits in (4, 8):
                print(f"{model.name}, {bits}-bit rows", file=sys.stderr)
                results[model, bits] = measure(model, bits)
    text = "\n".join([*bytes_table(results), "", *speed_table(results)])
    if args.write is None:
        print(text)
        return
    before, _, after = args.write.read_text("utf-8").split(MARKER)
    args.write.write_text(f"{before}{MARKER}\n\n{text}\n\n{MARKER}{after}", "utf-8")


if __name__ == "__main__":
    main()
