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
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    canvas_class(figure)
    left, right = figure.subplots(1, 2)
    trial = evaluation.trials[-1]
    chosen, *dense = trial.heads
    _draw_agreement(left, evaluation.sweep, "C0", "o-", "FlashHead")
    _draw_agreement(left, evaluation.paper, "C1", "s--", "the paper's method")
    _draw_divergence(right, evaluation)
    for head, color in zip(dense, ("C2", "C3"), strict=False):
        _draw_head(left, right, head, color, "D", head.name)
    (read,) = _megabytes([chosen])
    _draw_head(left, right, chosen, "C0", "*", f"as converted, {read:.1f} MB")
    for axes in (left, right):
        _draw_frame(axes, trial.truth_bytes_per_token / 1e6)
    # Room for what is written at the upper edge.
    low, high = right.get_ylim()
    right.set_ylim(low, high * (high / low) ** 0.3)
    left.set_ylabel("agreement with the truth, %")
    right.set_ylabel("KL divergence from the truth, nats")
    labelled = left.get_legend_handles_labels()
    figure.legend(*labelled, loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(
        f"{Path(evaluation.model).name} against {trial.truth}, "
        f"{evaluation.num_positions} positions",
        fontsize="medium",
    )
    figure.savefig(path, dpi=150)


def _draw_agreement(
    axes: Any, heads: list[HeadResult], color: str, style: str, label: str
) -> None:
    """Draw agreement over numbers of probes, with its confidence intervals."""
    read = _megabytes(heads)
    shares = [head.figures.agreement for head in heads]
    values, low, high = (
        [100 * getattr(share, name) for share in shares]
        for name in ("value", "low", "high")
    )
    axes.plot(read, values, style, color=color, ms=4, label=label)
    axes.fill_between(read, low, high, color=color, alpha=0.15, lw=0)


def _draw_divergence(axes: Any, evaluation: Evaluation) -> None:
    """Draw the FlashHead's divergence; the paper's is off any scale."""
    divergences = [head.figures.kl_divergence for head in evaluation.sweep]
    axes.plot(_megabytes(evaluation.sweep), divergences, "o-", color="C0", ms=4)
    axes.set_yscale("log")
    read = _megabytes(evaluation.paper)
    # At the upper edge, whatever the scale.
    at_edge = axes.get_xaxis_transform()
    axes.plot(read, [0.97] * len(read), "^", color="C1", ms=5, transform=at_edge)
    axes.text(
        read[0],
        0.94,
        "the paper's method: infinite, for it\nleaves out the tokens it does not read",
        transform=at_edge,
        color="C1",
        fontsize="small",
        va="top",
    )


def _draw_head(
    left: Any, right: Any, head: HeadResult, color: str, marker: str, label: str
) -> None:
    """Mark one head in both panels."""
    (read,), figures = _megabytes([head]), head.figures
    style: dict[str, Any] = {"color": color, "marker": marker, "ls": "", "zorder": 3}
    style |= {"ms": 14 if marker == "*" else 7, "mec": "black", "mew": 0.8}
    left.plot(read, 100 * figures.agreement.value, **style, label=label)
    right.plot(read, figures.kl_divergence, **style)


def _draw_frame(axes: Any, truth_megabytes: float) -> None:
    """Lay out the axis of bytes, and mark what the truth reads on it."""
    from matplotlib.ticker import LogLocator, NullLocator

    label = f"the truth, {truth_megabytes:.1f} MB"
    axes.axvline(truth_megabytes, color="gray", ls=":", label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("MB of head read per token")
    axes.grid(alpha=0.3)


def _canvas_class() -> Any:
    """Return what draws without a window."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ValueError(_MISSING) from error
    return FigureCanvasAgg


def _megabytes(heads: list[HeadResult]) -> list[float]:
    return [head.bytes_per_token / 1e6 for head in heads]
