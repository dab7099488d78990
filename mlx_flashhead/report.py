"""What a conversion tells: the summary on the terminal and the model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from mlx_flashhead.calibration import CONFIDENCE, ProbeChoice
from mlx_flashhead.config import FlashHeadConfig, Quantization
from mlx_flashhead.evaluation.comparison import Comparison
from mlx_flashhead.measure import HeadBytes

_TAGS = ("mlx", "flashhead")
_PAPER = "https://arxiv.org/abs/2603.14591"


@dataclass(frozen=True)
class ComparedHeads:
    """The new head and a dense 4-bit one, beside the source's head in float.

    Attributes:
        num_positions: Positions of built-in text that they were compared on.
        flash: Figures of the FlashHead.
        dense_4bit: Figures of the rival.
    """

    num_positions: int
    flash: Comparison
    dense_4bit: Comparison

    def rows(self) -> list[tuple[str, str, str]]:
        """Return name, FlashHead's figure and the dense 4-bit head's, as text."""
        ours, rival = self.flash, self.dense_4bit
        return [
            (
                "agreement with the source's head",
                f"{ours.agreement.value:.1%}",
                f"{rival.agreement.value:.1%}",
            ),
            (
                "KL divergence from it, nats",
                f"{ours.kl_divergence:.4f}",
                f"{rival.kl_divergence:.4f}",
            ),
        ]


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote and how good it is.

    Attributes:
        source: Folder or Hub id of the source model, as given.
        path: The new folder.
        config: Settings of the head.
        head: Its bytes.
        choice: Its probes on held-out positions; ``None`` without calibration.
        heads: Its accuracy on a few hundred positions of text, beside a rival's.
        model_bytes: All weights of the model.
        plain_4bit_bytes: The same with a dense 4-bit head in place of the new one.
        seconds: Time taken.
    """

    source: str
    path: Path
    config: FlashHeadConfig
    head: HeadBytes
    choice: ProbeChoice | None
    heads: ComparedHeads
    model_bytes: int
    plain_4bit_bytes: int
    seconds: float

    def summary(self) -> str:
        """Return the lines that end a conversion: what there is and what to type."""
        config = self.config
        more = _megabytes(self.model_bytes - self.plain_4bit_bytes)
        lines = [
            f"Wrote {self.path} in {self.seconds:.0f} s.",
            f"  centroids   {_centroids(config)}",
            f"  rows        {_bits(config.rows, config.dtype)}",
            f"  probes      {_probes(config)}",
            f"  memory      {_megabytes(self.model_bytes)} MB, {more} MB more than "
            "with a dense 4-bit head",
            *(f"  {line}" for line in self._recall_lines()),
            f"  {'':<34}{'FlashHead':>10}{'dense 4-bit':>13}",
            *(f"  {a:<34}{b:>10}{c:>13}" for a, b, c in self.table()),
            "Try it:",
            f'  mlx_lm.generate --model {self.path} --prompt "Hello"',
        ]
        return "\n".join(lines)

    def table(self) -> list[tuple[str, str, str]]:
        """Return name, FlashHead's figure and the dense 4-bit head's, as text."""
        read = self.head.read_per_token, self.head.dense_4bit
        ours, rival = (_megabytes(size) for size in read)
        return [*self.heads.rows(), ("MB of head read per token", ours, rival)]

    def recall(self) -> str:
        """Return what is known of the recall, in a sentence without a full stop."""
        if self.choice is None:
            return "recall not measured: converted without calibration"
        return (
            f"recall {self.choice.recall:.2%} on {self.choice.num_positions} positions "
            f"held out; at least {self.choice.least_recall:.2%} with "
            f"{CONFIDENCE:.0%} confidence"
        )

    def _recall_lines(self) -> list[str]:
        choice = self.choice
        lines = [self.recall()]
        if choice is not None and choice.target is not None and not choice.is_reached:
            remedy = (
                "more --calibration-positions may show it"
                if choice.recall >= choice.target
                else "more probes would read more than a dense 4-bit head"
            )
            lines.append(f"the target of {choice.target:.2%} is not shown: {remedy}")
        return lines


def model_card(result: Conversion, source_folder: Path) -> ModelCard:
    """Return the card of a converted model, based on the source's if it has one.

    Args:
        result: The conversion.
        source_folder: The source model's folder on this machine.
    """
    of_source = source_folder / "README.md"
    data = ModelCard.load(of_source).data if of_source.is_file() else ModelCardData()
    data.library_name = "mlx"
    data.pipeline_tag = "text-generation"
    data.tags = [*(data.tags or []), *(t for t in _TAGS if t not in (data.tags or []))]
    if not Path(result.source).exists():
        data.base_model = result.source
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{_card_text(result)}")


def _card_text(result: Conversion) -> str:
    config, head = result.config, result.head
    name = result.path.name
    table = [
        *result.table(),
        (
            "MB of all weights",
            _megabytes(result.model_bytes),
            _megabytes(result.plain_4bit_bytes),
        ),
    ]
    figures = "\n".join(f"| {' | '.join(row)} |" for row in table)
    return f"""
# {name}

{_link(result.source)} with a FlashHead in place of its vocabulary head: the
model's text, with {_megabytes(head.read_per_token)} MB of head read per token instead
of {_megabytes(head.dense_4bit)} MB. Made by mlx-flashhead, an independent
implementation of [FlashHead]({_PAPER}) for MLX.

## Use

```bash
pip install mlx-flashhead
mlx_lm.generate --model {name} --prompt "Hello"
```

Every command and function of mlx-lm works as with any other model.

## Measured at conversion

On {result.heads.num_positions} positions of built-in text of several kinds, against the
source's head in float:

| | FlashHead | dense 4-bit head |
|---|---|---|
{figures}

Recall is the share of positions at which the rows read hold the token that the source's
head ranks first: {result.recall()}.

## Parameters

| | |
|---|---|
| base architecture | {config.base_model_type} |
| centroids | {_centroids(config)} |
| rows | {_bits(config.rows, config.dtype)} |
| scored exactly | {_probes(config)} |
| always scored | {config.num_pinned * config.cluster_size} rows |
| sampling | {config.sampling} |
"""


def _centroids(config: FlashHeadConfig) -> str:
    of_rows = f" for {config.cluster_size} rows each" if config.cluster_size > 1 else ""
    return (
        f"{config.num_clusters}{of_rows}, {config.centroid_dims} dimensions, "
        f"{_bits(config.centroids, config.dtype)}"
    )


def _probes(config: FlashHeadConfig) -> str:
    rows = config.num_probed * config.cluster_size
    return f"{rows} rows per token ({rows / config.num_slots:.1%})"


def _link(source: str) -> str:
    """Return a link to a Hub model, or the name of a folder."""
    if Path(source).exists():
        return Path(source).resolve().name
    return f"[{source}](https://huggingface.co/{source})"


def _bits(packing: Quantization | None, dtype: str) -> str:
    if packing is None:
        return dtype
    kind = "" if packing.mode == "affine" else f" ({packing.mode})"
    return f"{packing.bits} bits{kind}, group size {packing.group_size}"


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f}"
