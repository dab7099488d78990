"""Draw an evaluation: agreement and divergence against the bytes read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_flashhead.evaluation.results import Evaluation, HeadResult

_MISSING = (
    "The plot needs matplotlib, which is not installed: "
    'pip install "mlx-flashhead[plot]".'
)


def check_plot(path: Path) -> None:
    """Check that a plot can be drawn to a file of this name.

    Raises:
        ValueError: If matplotlib is missing or does not know the file's suffix.
    """
    known = sorted(_canvas_class().get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise ValueError(
            f"{path} has no suffix that names a kind of picture; "
            f"use one of {', '.join(known)}."
        )


def draw_plot(evaluation: Evaluation, path: Path) -> None:
    """Write a picture of an evaluation with a sweep.

    Args:
        evaluation: What to draw.
        path: The file to write; its suffix names the kind of picture.
    """
    canvas_class = _canvas_class()
    from matplotlib.figure import Figure

    # Not pyplot: it would choose a window system by the environment.
    figure = Figure(figsize=(7, 7), layout="constrained")
    canvas_class(figure)
    upper, lower = figure.subplots(2, sharex=True)
    _draw_curves(upper, lower, evaluation)
    _draw_dense(upper, lower, evaluation)
    chosen = evaluation.trials[-1].heads[0]
    label = f"as converted, {evaluation.num_probes} probes"
    _draw_point(upper, lower, chosen, label, "o")
    upper.set_ylabel("agreement, %")
    lower.set_ylabel("KL divergence, nats")
    lower.set_yscale("log")
    lower.set_xscale("log")
    lower.set_xlabel("MB of head read per token")
    upper.set_title(
        f"{Path(evaluation.model).name} against {evaluation.trials[-1].truth}\n"
        f"{evaluation.num_positions} positions; band: 95 % confidence",
        fontsize="medium",
        wrap=True,
    )
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    upper.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def _draw_curves(upper: Any, lower: Any, evaluation: Evaluation) -> None:
    """Draw FlashHead over its numbers of probes."""
    sweep = evaluation.sweep
    read = [_megabytes(head.bytes_per_token) for head in sweep]
    shares = [head.figures.agreement for head in sweep]
    upper.plot(read, [100 * s.value for s in shares], ".-", label="FlashHead")
    low, high = [100 * s.low for s in shares], [100 * s.high for s in shares]
    upper.fill_between(read, low, high, alpha=0.2)
    lower.plot(read, [head.figures.kl_divergence for head in sweep], ".-")


def _draw_dense(upper: Any, lower: Any, evaluation: Evaluation) -> None:
    """Mark the dense heads; the truth's divergence, zero, is below any log scale."""
    trial = evaluation.trials[-1]
    for head, marker in zip(trial.heads[1:], "sD^", strict=False):
        _draw_point(upper, lower, head, head.name, marker)
    for axes in (upper, lower):
        axes.axvline(
            _megabytes(trial.truth_bytes_per_token),
            color="gray",
            linestyle=":",
            label="dense head",
        )


def _draw_point(
    upper: Any, lower: Any, head: HeadResult, label: str, marker: str
) -> None:
    """Mark one head in both panels."""
    read, style = _megabytes(head.bytes_per_token), {"marker": marker, "s": 60}
    points = upper.scatter(
        read, 100 * head.figures.agreement.value, **style, label=label
    )
    lower.scatter(
        read, head.figures.kl_divergence, **style, color=points.get_facecolor()
    )


def _canvas_class() -> Any:
    """Return what draws without a window."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ValueError(_MISSING) from error
    return FigureCanvasAgg


def _megabytes(size_bytes: int) -> float:
    return size_bytes / 1e6
