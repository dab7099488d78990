"""What a conversion tells: the summary on the terminal and the model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from mlx_flashhead.config import FlashHeadConfig, Quantization
from mlx_flashhead.measure import HeadBytes, HeadFigures

_TAGS = ("mlx", "flashhead")
_PAPER = "https://arxiv.org/abs/2603.14591"


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote and how good it is.

    Attributes:
        source: Folder or Hub id of the source model, as given.
        path: The new folder.
        config: Settings of the head.
        head: Its bytes.
        figures: Its accuracy on a few hundred positions of text.
        model_bytes: All weights of the model.
        plain_4bit_bytes: The same with a dense 4-bit head in place of the new one.
        seconds: Time taken.
    """

    source: str
    path: Path
    config: FlashHeadConfig
    head: HeadBytes
    figures: HeadFigures
    model_bytes: int
    plain_4bit_bytes: int
    seconds: float

    def summary(self) -> str:
        """Return the lines that end a conversion: what there is and what to type."""
        config, head, figures = self.config, self.head, self.figures
        more = _megabytes(self.model_bytes - self.plain_4bit_bytes)
        return f"""\
Wrote {self.path} in {self.seconds:.0f} s.
  clusters    {config.num_clusters} of {config.cluster_size} rows, \
{config.num_pinned} of them pinned
  probes      {config.num_probes} clusters per token \
({config.num_probes / config.num_clusters:.1%} of the rows)
  bits        rows {_bits(config.rows, config.dtype)}; \
centroids {_bits(config.centroids, config.dtype)}
  memory      {_megabytes(self.model_bytes)} MB, {more} MB more than with a dense \
4-bit head
  head reads  {_megabytes(head.read_per_token)} MB per token; a dense 4-bit head \
{_megabytes(head.dense_4bit)} MB
  recall      {figures.recall:.1%}: the dense head's token lies in a probed cluster \
({figures.num_positions} positions)
  agreement   {figures.agreement:.1%} with the source's head; a dense 4-bit head \
{figures.dense_4bit_agreement:.1%}
Try it:
  mlx_lm.generate --model {self.path} --prompt "Hello\""""


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
    config, head, figures = result.config, result.head, result.figures
    name = result.path.name
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

On {figures.num_positions} positions of built-in text of several kinds:

| | FlashHead | dense 4-bit head |
|---|---|---|
| agreement with the source's head | {figures.agreement:.1%} | \
{figures.dense_4bit_agreement:.1%} |
| MB of head read per token | {_megabytes(head.read_per_token)} | \
{_megabytes(head.dense_4bit)} |
| MB of all weights | {_megabytes(result.model_bytes)} | \
{_megabytes(result.plain_4bit_bytes)} |

The dense head's token lies in a probed cluster at {figures.recall:.1%} of them.

## Parameters

| | |
|---|---|
| base architecture | {config.base_model_type} |
| clusters | {config.num_clusters} of {config.cluster_size} rows |
| always scored | {config.num_pinned} clusters |
| scored per token | {config.num_probes} clusters |
| rows | {_bits(config.rows, config.dtype)} |
| centroids | {_bits(config.centroids, config.dtype)} |
"""


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
