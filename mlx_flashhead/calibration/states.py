"""Hidden states of a model, sampled from what it writes itself or from given texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flashhead.attach import DenseHead
from mlx_flashhead.calibration.beginnings import built_in_prompts, random_starts
from mlx_flashhead.heads import dense_head
from mlx_flashhead.positions import (
    WINDOW_LENGTH,
    continuations,
    positions_in,
    read_texts,
    spread,
    windows,
)
from mlx_flashhead.statistics import HiddenStatistics, hidden_statistics
from mlx_flashhead.vocabulary import Vocabulary

# Positions, of which half begin with a prompt or a text and half with a random token:
# the first show what the model is used for, the second what else it can write.
DEFAULT_POSITIONS = 6144
LEAST_POSITIONS = 256
_TOKENS_PER_PROMPT = 48
_TOKENS_PER_RANDOM_START = 16

# Texts written at a time: their attention caches take memory.
_TEXTS_PER_BATCH = 32
NUM_FOLDS = 4

# 16 MiB of logits: larger arrays are given back to the system after each chunk, and
# taking them again costs more than filling them.
_VALUES_PER_CHUNK = 1 << 22

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class CalibrationSet:
    """Positions of one sort, in folds that have no text in common.

    Attributes:
        hidden: ``(N, D)``, float32.
        best_tokens: Arg max of the dense head, ``(N,)``.
        fold: 0 to 3, ``(N,)``.
        softmax_sums: Sums of softmaxes over each fold, ``(4, V)``, float64.
    """

    hidden: np.ndarray
    best_tokens: np.ndarray
    fold: np.ndarray
    softmax_sums: np.ndarray

    def statistics(self, held_out: int | None = None) -> HiddenStatistics:
        """Return the statistics of all positions, or of all but one fold's."""
        is_in = self.fold != held_out
        sums = self.softmax_sums[np.arange(NUM_FOLDS) != held_out].sum(axis=0)
        return hidden_statistics(self.hidden[is_in], sums / is_in.sum())


def sample_states(
    model: nn.Module,
    tokenizer: Any,
    dense: DenseHead,
    rows: np.ndarray,
    vocabulary: Vocabulary,
    *,
    texts: Sequence[str | Path] = (),
    num_positions: int = DEFAULT_POSITIONS,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[CalibrationSet]:
    """Collect hidden states of a model: of prompts or texts, and of random starts.

    Args:
        model: The model, its dense head in place.
        tokenizer: Its tokenizer.
        dense: Its head.
        rows: The head's rows, ``(V, D)``, float32.
        vocabulary: Its tokens' kinds; a random start is a likely one.
        texts: UTF-8 files to read positions from in place of what the model writes
            after the built-in prompts.
        num_positions: Positions, at most.
        seed: Of the sampling.
        progress: Called with what is being done and the share of it done, 0 to 1.

    Raises:
        FileNotFoundError: If a text is not there.
        ValueError: If texts are no UTF-8 or too short, or ``num_positions`` too few.
    """
    if num_positions < LEAST_POSITIONS:
        raise ValueError(
            f"calibration_positions={num_positions} must be at least {LEAST_POSITIONS}."
        )
    writer = _Writer(model, tokenizer, dense, rows, seed, progress)
    half = num_positions // 2
    count = half // _TOKENS_PER_RANDOM_START
    starts = random_starts(tokenizer, vocabulary, len(rows), count, seed)
    if texts:
        first = writer.read(read_texts(texts), half)
    else:
        prompts, kind = built_in_prompts(tokenizer, half // _TOKENS_PER_PROMPT)
        first = writer.write(prompts, kind % NUM_FOLDS, _TOKENS_PER_PROMPT, "prompts")
    return [
        first,
        writer.write(
            starts,
            np.arange(count) % NUM_FOLDS,
            _TOKENS_PER_RANDOM_START,
            "random tokens",
        ),
    ]


class _Writer:
    """A model that writes on, and what its head makes of the hidden states."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        dense: DenseHead,
        rows: np.ndarray,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self._model, self._tokenizer, self._path = model, tokenizer, dense.path
        self._dense_logits = dense_head("dense", rows, dense.bias, rows.nbytes).logits
        self._vocab_size = len(rows)
        self._seed, self._progress = seed, progress

    def write(
        self, texts: list[list[int]], fold: np.ndarray, num_tokens: int, name: str
    ) -> CalibrationSet:
        """Sample continuations, to the end of sequence, and keep their positions."""
        on_share = self._on_share(f"Calibrating: continuing {len(texts)} {name}")
        # Texts of about one length side by side: the others wait for the longest.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = []
        for start in range(0, len(order), _TEXTS_PER_BATCH):
            batch = order[start : start + _TEXTS_PER_BATCH]
            done, size = start / len(order), len(batch) / len(order)
            hidden, owner = self._continued(
                [texts[i] for i in batch],
                num_tokens,
                start,
                _scaled(on_share, done, size),
            )
            parts.append((hidden, fold[batch][owner]))
        hidden, owner = (np.concatenate(part) for part in zip(*parts, strict=True))
        return self._collected(hidden, owner, name)

    def _continued(
        self,
        texts: list[list[int]],
        num_tokens: int,
        number: int,
        on_share: Callable[[float], None],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return hidden states ``(N, D)`` and the text that each is of, ``(N,)``."""
        states: list[mx.array] = []

        def logits(hidden: mx.array) -> mx.array:
            states.append(hidden[:, 0].astype(mx.float32))
            return self._dense_logits(states[-1])[:, None]

        written = continuations(
            self._model,
            self._path,
            logits,
            texts,
            num_tokens,
            temperature=1.0,
            seed=self._seed + number,
            on_share=on_share,
        )
        lengths = np.array([len(text) for text in texts])
        ends = set(self._tokenizer.eos_token_ids)
        is_kept = _before_the_end(written, lengths, num_tokens, ends)
        is_kept = is_kept[:, lengths.min() :]
        hidden = np.array(mx.stack(states, axis=1))
        return hidden[is_kept], np.nonzero(is_kept)[0]

    def read(self, texts: list[str], num_positions: int) -> CalibrationSet:
        """Run over texts, and keep the positions of windows spread over them."""
        cut = [windows(self._tokenizer, text, WINDOW_LENGTH) for text in texts]
        cuts = np.vstack([w for w in cut if len(w)] or [np.empty((0, 1), np.int64)])
        if len(cuts) < 2:
            raise ValueError(
                "The calibration text is too short: it needs two stretches of "
                f"{WINDOW_LENGTH} tokens; give more, or leave out --calibration-text "
                "to use built-in prompts."
            )
        cuts = spread(cuts, min(len(cuts), num_positions // WINDOW_LENGTH))
        found = positions_in(
            self._model,
            self._path,
            cuts,
            1,
            self._on_share("Calibrating: reading texts"),
        )
        # Runs of windows, not every fourth: neighbours tell about each other.
        fold = np.arange(len(cuts)) * NUM_FOLDS // len(cuts)
        return self._collected(
            np.array(found.hidden), fold.repeat(cuts.shape[1] - 1), "texts"
        )

    def _collected(
        self, hidden: np.ndarray, fold: np.ndarray, name: str
    ) -> CalibrationSet:
        """Add what the dense head answers."""
        on_share = self._on_share(f"Calibrating: the dense head's answers to {name}")
        sums = 0.0
        best = np.empty(len(hidden), np.int64)
        of_fold = np.eye(NUM_FOLDS, dtype=np.float32)[fold]
        step = max(1, _VALUES_PER_CHUNK // self._vocab_size)
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            logits = np.array(self._dense_logits(mx.array(hidden[part])))
            best[part] = logits.argmax(axis=1)
            logits -= logits.max(axis=1, keepdims=True)
            softmax = np.exp(logits, out=logits)
            softmax /= softmax.sum(axis=1, keepdims=True)
            sums = sums + (of_fold[part].T @ softmax).astype(np.float64)
            on_share(min(1.0, (start + step) / len(hidden)))
        return CalibrationSet(hidden, best, fold, np.array(sums))

    def _on_share(self, stage: str) -> Callable[[float], None]:
        progress = self._progress
        return (lambda share: progress(stage, share)) if progress else lambda _: None


def _scaled(
    on_share: Callable[[float], None], done: float, size: float
) -> Callable[[float], None]:
    """Return what reports shares of a part of the work as shares of all."""
    return lambda share: on_share(done + share * size)


def _before_the_end(
    written: np.ndarray, lengths: np.ndarray, num_tokens: int, ends: set[int]
) -> np.ndarray:
    """Return which tokens of texts were sampled, the first end included, ``(B, L)``."""
    column = np.arange(written.shape[1])
    since = column - lengths[:, None]
    is_end = np.isin(written, list(ends)) & (since >= 0)
    has_ended = (is_end.cumsum(axis=1) - is_end) > 0
    kept: np.ndarray = (since >= 0) & (since < num_tokens) & ~has_ended
    return kept
