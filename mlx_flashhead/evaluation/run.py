"""How good a FlashHead model is: its head beside the dense one, figure by figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flashhead.build import Progress
from mlx_flashhead.evaluation.bench import Bench
from mlx_flashhead.evaluation.compare import Contest
from mlx_flashhead.evaluation.results import Evaluation, HeadResult
from mlx_flashhead.evaluation.sweep import own_method
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

_POSITIONS_ON_CPU, _POSITIONS_ON_GPU = 1024, 2048
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

    A head that draws its clusters at random is measured with the best ones in their
    place.

    Args:
        model: A converted model: folder or Hub id.
        reference: The model it was made from; adds comparisons with its float head.
        texts: UTF-8 text files to take positions from, in equal parts; default: the
            model's own continuations of built-in prompts.
        num_positions: Positions at most; default 1024, on a GPU 2048.
        seed: Of the continuations' sampling.
        sweep: Measure at other numbers of probes as well, and the paper's method over
            the same rows, which takes a k-means of all of them.
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
    rows = truth_rows(bench.flash, reference)
    contests = _contests(bench.flash, rows, reference)
    truth, stored = contests[-1].truth, contests[0].truth
    if contents:
        token_ids = _text_windows(tokenizer, contents, texts, num_positions)
        prompts, num_given = token_ids[:, : PROMPT_LENGTH + 1], 1
    else:
        token_ids, prompts = _own_texts(bench, tokenizer, truth, num_positions)
        num_given = prompts.shape[1]
    positions = bench.positions(token_ids, num_given)
    prompts = spread(prompts, min(len(prompts), _GREEDY_TEXTS))
    trials = bench.trials(contests, positions)
    trials[-1] = bench.with_greedy_texts(trials[-1], contests[-1], prompts)
    curves: list[list[HeadResult]] = [[], []]
    if sweep:
        methods = own_method(bench.flash), bench.paper_method(rows)
        curves = [bench.sweep(m, truth, stored, positions) for m in methods]
    return Evaluation(
        model=str(model),
        text=", ".join(map(str, texts)) or "its own continuations",
        num_positions=len(positions.next_tokens),
        num_probes=bench.flash.config.num_probed,
        num_clusters=bench.flash.config.num_clusters,
        sampling=bench.flash.config.sampling,
        trials=trials,
        sweep=curves[0],
        paper=curves[1],
    )


def _own_texts(
    bench: Bench, tokenizer: Any, truth: Head, num_positions: int
) -> tuple[np.ndarray, np.ndarray]:
    """Let the model go on with built-in prompts; return all texts, and the prompts."""
    length = min(CONTINUATION_LENGTH, num_positions)
    prompts = windows(tokenizer, SAMPLE_TEXT, PROMPT_LENGTH)
    prompts = spread(prompts, num_positions // length)
    return bench.continued(truth, prompts, length, TEMPERATURE), prompts


def _contests(
    flash: FlashHead, rows: np.ndarray, reference: str | None
) -> list[Contest]:
    """Return what is compared: with its own rows and, last, with the reference's."""
    stored, ours = stored_head(flash), probing_head(flash)
    rival = dense_4bit_head(flash, rows)
    if reference is None:
        return [Contest(_OWN_ROWS, stored, [ours, rival])]
    # The rows as stored: what is lost then is lost by retrieval alone.
    own = Contest(_OWN_ROWS, stored, [ours])
    name = f"the head of {reference}"
    return [own, Contest(name, float_head(flash, rows), [ours, stored, rival])]


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
