"""What an evaluation found: as lines for a terminal, as JSON for machines."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from mlx_flashhead.evaluation.comparison import Comparison, Share


@dataclass(frozen=True)
class HeadResult:
    """One head's figures against the truth.

    Attributes:
        name: What the head is.
        bytes_per_token: Bytes of head read for a token.
        figures: Its comparison with the truth, over all positions.
        num_probes: In a sweep, clusters probed, those that blocks add included.
        first_differences: For each greedy text, after how many tokens it leaves the
            truth's, ``None`` if it does not; ``None`` if none was written.
    """

    name: str
    bytes_per_token: int
    figures: Comparison
    num_probes: int | None = None
    first_differences: list[int | None] | None = None


@dataclass(frozen=True)
class Trial:
    """Heads compared with one truth.

    Attributes:
        truth: What the truth is.
        truth_perplexity: Perplexity of the text under it.
        truth_bytes_per_token: Bytes of head that it reads for a token.
        heads: The heads, FlashHead first.
    """

    truth: str
    truth_perplexity: float
    truth_bytes_per_token: int
    heads: list[HeadResult]


@dataclass(frozen=True)
class Evaluation:
    """All that was measured on a model.

    Attributes:
        model: Folder or Hub id, as given.
        text: Where the positions come from.
        num_positions: Positions looked at.
        num_probes: Clusters the model probes, those that blocks add included.
        num_clusters: Clusters it has.
        sampling: How it chooses them when it decodes; the best were taken here.
        trials: Comparisons with the dense product over its own rows and, last, with
            the reference's head if one was named.
        sweep: FlashHead at several numbers of probes, fewest first, against the last
            trial's truth; empty if not asked for.
        paper: The paper's method likewise. It leaves out the tokens that it does not
            read, so its divergence and perplexity are infinite.
    """

    model: str
    text: str
    num_positions: int
    num_probes: int
    num_clusters: int
    sampling: str
    trials: list[Trial]
    sweep: list[HeadResult]
    paper: list[HeadResult]

    def to_json(self) -> str:
        """Return everything as a JSON object; what is infinite is null."""
        return json.dumps(_finite(asdict(self)), indent=2, allow_nan=False) + "\n"

    def table(self) -> str:
        """Return the figures as lines of at most 80 columns, but for long names."""
        lines = [
            f"{self.num_probes} of {self.num_clusters} clusters probed; "
            f"{self.num_positions} positions of {self.text}",
            "in brackets: 95 % confidence intervals",
        ]
        if self.sampling != "deterministic":
            lines.insert(1, f"the best clusters, not a {self.sampling} draw of them")
        for trial in self.trials:
            lines += ["", *_trial_lines(trial)]
        if self.sweep:
            lines += ["", f"against {self.trials[-1].truth}; * as converted"]
            lines += _curve_lines(self.sweep, self.num_probes)
            lines += _curve_lines(self.paper)
        return "\n".join(lines)


def _finite(value: Any) -> Any:
    """Return JSON values with ``None`` for infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if value == math.inf else value


def _trial_lines(trial: Trial) -> list[str]:
    """Return a table with a column for each head."""
    lines = [
        f"against {trial.truth}",
        f"(perplexity {trial.truth_perplexity:.2f}, "
        f"{trial.truth_bytes_per_token / 1e6:.1f} MB per token)",
    ]
    columns = [_column(head) for head in trial.heads]
    for cells in zip(_LABELS, *columns, strict=True):
        lines.append(f"{cells[0]:<20}" + "".join(f"{c:<19}" for c in cells[1:]))
    return [line.rstrip() for line in lines]


_LABELS = (
    "",
    "agreement %",
    "recall %",
    "in top 3 / 10 %",
    "KL divergence",
    "total variation",
    "perplexity",
    "exact mass (truth)",
    "greedy texts differ",
    "  first, median at",
    "MB per token",
)


def _column(head: HeadResult) -> list[str]:
    """Return a head's cells, one for each label."""
    figures = head.figures
    mass = "all"
    if figures.exact_mass is not None and figures.truth_exact_mass is not None:
        mass = f"{figures.exact_mass:.1%} ({figures.truth_exact_mass:.1%})"
    firsts = head.first_differences or []
    places = [first for first in firsts if first is not None]
    return [
        head.name,
        _share(figures.agreement),
        "all" if figures.recall is None else _share(figures.recall),
        f"{figures.top3 * 100:.1f} / {figures.top10 * 100:.1f}",
        f"{figures.kl_divergence:.5f}",
        f"{figures.total_variation:.5f}",
        f"{figures.perplexity:.2f}",
        mass,
        f"{len(places)} of {len(firsts)}" if firsts else "-",
        f"{min(places)}, {statistics.median(places):g}" if places else "-",
        f"{head.bytes_per_token / 1e6:.1f}",
    ]


def _curve_lines(heads: list[HeadResult], chosen: int | None = None) -> list[str]:
    """Return a line for each number of probes, the chosen one marked."""
    lines = [
        "",
        heads[0].name,
        f"{'probes':>7} {'MB/token':>9}  {'recall %':<20}{'agreement %':<20}"
        f"{'KL':>8}{'TV':>8}",
    ]
    for head in heads:
        figures = head.figures
        mark = "*" if head.num_probes == chosen else " "
        lines.append(
            f"{head.num_probes:>7}{mark}{head.bytes_per_token / 1e6:>9.2f}  "
            f"{_share(figures.recall):<20}{_share(figures.agreement):<20}"
            f"{figures.kl_divergence:>8.4f}{figures.total_variation:>8.4f}"
        )
    return lines


def _share(share: Share | None) -> str:
    if share is None:
        return ""
    value, low, high = (f"{x * 100:.1f}" for x in (share.value, share.low, share.high))
    return f"{value} [{low}-{high}]"
