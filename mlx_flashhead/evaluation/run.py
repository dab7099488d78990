"""How good a FlashHead model is: its head beside the dense one, figure by figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flashhead.build import Progress
from mlx_flashhead.config import FlashHeadConfig
from mlx_flashhead.evaluation.bench import Bench
from mlx_flashhead.evaluation.results import Evaluation
from mlx_flashhead.head import FlashHead
from mlx_flashhead.heads import (
    Head,
    dense_4bit_head,
    float_head,
    probing_head,
    stored_head,
    truth_rows,
)
from mlx_flashhead.loading import load
from mlx_flashhead.positions import (
    CONTINUATION_LENGTH,
    PROMPT_LENGTH,
    TEMPERATURE,
    WINDOW_LENGTH,
    read_texts,
    spread,
    windows,
)
from mlx_flashhead.sample_text import SAMPLE_TEXT

_POSITIONS_ON_CPU, _POSITIONS_ON_GPU = 512, 2048
_GREEDY_TEXTS = 16
_OWN_ROWS = "all its own rows"


def evaluate(
    model: str | Path,
    *,
    reference: str | None = None,
    texts: Sequence[str | Path] = (),
    num_positions: int | None = None,
    seed: int = 0,
    sweep: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare a FlashHead with dense heads on the hidden states of its own model.

    Args:
        model: A converted model: folder or Hub id.
        reference: The model it was made from; adds comparisons with its float head.
        texts: UTF-8 text files to take positions from, in equal parts; default: the
            model's own continuations of built-in prompts.
        num_positions: Positions at most; default 512, on a GPU 2048.
        seed: Of the continuations' sampling.
        sweep: Measure at other numbers of probes as well.
        progress: Called with what is being done and the share of it done, 0 to 1.

    Returns:
        All figures.

    Raises:
        FileNotFoundError: If a model or text is not there.
        ValueError: If ``model`` is not a FlashHead model, ``reference`` has another
            head, a text is too short, or a number is out of range.
    """
    if num_positions is None:
        on_gpu = mx.default_device() == mx.gpu
        num_positions = _POSITIONS_ON_GPU if on_gpu else _POSITIONS_ON_CPU
    if num_positions < 1:
        raise ValueError(f"num_positions={num_positions} must be at least 1.")
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0.")
    contents = read_texts(texts)
    body, tokenizer = load(model)
    bench = Bench(body, seed, progress)
    heads = _heads(bench.flash, reference)
    truth = heads.pop(0)
    if contents:
        token_ids, num_given = (
            _text_windows(tokenizer, contents, texts, num_positions),
            1,
        )
        prompts = token_ids[:, : PROMPT_LENGTH + 1]
    else:
        length = min(CONTINUATION_LENGTH, num_positions)
        prompts = windows(tokenizer, SAMPLE_TEXT, PROMPT_LENGTH)
        prompts = spread(prompts, num_positions // length)
        token_ids = bench.continued(truth, prompts, length, TEMPERATURE)
        num_given = prompts.shape[1]
    positions = bench.positions(token_ids, num_given)
    prompts = spread(prompts, min(len(prompts), _GREEDY_TEXTS))
    trials = []
    if reference:
        # The rows as stored: what is lost then is lost by retrieval alone.
        flash, stored = heads[:2]
        trials.append(bench.trial(_OWN_ROWS, stored, [flash], positions))
    counts = _probe_counts(bench.flash.config)
    name = f"the head of {reference}" if reference else _OWN_ROWS
    trials.append(bench.trial(name, truth, heads, positions, prompts))
    return Evaluation(
        model=str(model),
        text=", ".join(map(str, texts)) or "its own continuations",
        num_positions=len(positions.next_tokens),
        num_probes=bench.flash.config.num_probes,
        num_clusters=bench.flash.config.num_clusters,
        trials=trials,
        sweep=bench.sweep(truth, positions, counts) if sweep else [],
    )


def _heads(flash: FlashHead, reference: str | None) -> list[Head]:
    """Return the truth, then what is compared with it, the FlashHead first."""
    rows, stored = truth_rows(flash, reference), stored_head(flash)
    four_bit = dense_4bit_head(flash, rows)
    if reference is None:
        return [stored, probing_head(flash), four_bit]
    return [float_head(flash, rows), probing_head(flash), stored, four_bit]


def _text_windows(
    tokenizer: Any,
    contents: Sequence[str],
    names: Sequence[str | Path],
    num_positions: int,
) -> np.ndarray:
    """Cut texts into windows ``(W, L)``, as many of each, of equal length."""
    share = num_positions // len(contents)
    if share == 0:
        raise ValueError(
            f"num_positions={num_positions} must be at least {len(contents)}: "
            "one of each text."
        )
    lengths = [len(tokenizer.encode(t, add_special_tokens=False)) for t in contents]
    if min(lengths) < 2:
        raise ValueError(
            f"{names[int(np.argmin(lengths))]} has {min(lengths)} tokens; a position "
            "and what follows it are 2."
        )
    length = min(WINDOW_LENGTH, share + 1, *lengths)
    parts = [windows(tokenizer, text, length) for text in contents]
    counts = [min(len(p), max(1, share // (p.shape[1] - 1))) for p in parts]
    return np.vstack([spread(p, n) for p, n in zip(parts, counts, strict=True)])


def _probe_counts(config: FlashHeadConfig) -> list[int]:
    """Return the powers of two up to half of all clusters, and the chosen P."""
    lowest = max(1, config.num_pinned)
    powers = [2**n for n in range(config.num_clusters.bit_length())]
    usual = {n for n in powers if lowest <= n <= config.num_clusters // 2}
    return sorted(usual | {config.num_probes})
