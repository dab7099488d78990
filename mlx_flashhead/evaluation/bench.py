"""Run a model and set heads beside the truth on its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flashhead.blocks import probed_count
from mlx_flashhead.build import Progress
from mlx_flashhead.evaluation.compare import (
    Contest,
    compare_contests,
    finished_logits,
    parts_of,
)
from mlx_flashhead.evaluation.paper import PAPER, paper_method
from mlx_flashhead.evaluation.results import HeadResult, Trial
from mlx_flashhead.evaluation.sweep import Method, compare_probes
from mlx_flashhead.head import FlashHead
from mlx_flashhead.heads import Head, after_head
from mlx_flashhead.positions import (
    CONTINUATION_LENGTH,
    Positions,
    continuations,
    positions_in,
)


class Bench:
    """A model, and what is measured on it."""

    def __init__(self, model: nn.Module, seed: int, progress: Progress | None) -> None:
        self._model, self._seed, self._progress = model, seed, progress
        self.flash = next(m for m in model.modules() if isinstance(m, FlashHead))
        config = self.flash.config
        self._path = config.head_path
        self._finish = after_head(model, self._path, config.vocab_size)

    def continued(
        self, head: Head, prompts: np.ndarray, num_tokens: int, temperature: float
    ) -> np.ndarray:
        """Return prompts and what the model writes after them with ``head``."""

        def logits(hidden: mx.array) -> mx.array:
            return head.logits(hidden[:, 0].astype(mx.float32))[:, None]

        kind = "greedily" if temperature == 0 else "at random"
        return continuations(
            self._model,
            self._path,
            logits,
            prompts,
            num_tokens,
            temperature=temperature,
            seed=self._seed,
            on_share=self._stage(f"Continuing {len(prompts)} prompts {kind}"),
        )

    def positions(self, token_ids: np.ndarray, num_given: int) -> Positions:
        """Return the positions of texts ``(B, L)`` after the given tokens."""
        on_share = self._stage("Running the model's body")
        return positions_in(self._model, self._path, token_ids, num_given, on_share)

    def trials(self, contests: Sequence[Contest], positions: Positions) -> list[Trial]:
        """Compare heads with truths."""
        stage = self._stage(
            f"Comparing heads on {len(positions.next_tokens)} positions"
        )
        compared = compare_contests(contests, positions, self._finish, stage)
        trials = []
        for contest, (loss, figures) in zip(contests, compared, strict=True):
            results = [
                HeadResult(head.name, head.bytes_per_token, own)
                for head, own in zip(contest.heads, figures, strict=True)
            ]
            truth_bytes = contest.truth.bytes_per_token
            trials.append(Trial(contest.truth_name, loss, truth_bytes, results))
        return trials

    def with_greedy_texts(
        self, trial: Trial, contest: Contest, prompts: np.ndarray
    ) -> Trial:
        """Add where each head's greedy texts leave the truth's.

        Up to its first difference a greedy text is the truth's, so the truth's hidden
        states tell where that is: no head but the truth has to write.
        """
        texts = self.continued(contest.truth, prompts, CONTINUATION_LENGTH, 0.0)
        written = self.positions(texts, prompts.shape[1])
        shape = (len(prompts), CONTINUATION_LENGTH)
        stage = self._stage("Comparing greedy texts")
        # Not the tokens written one by one, whose last bits may differ.
        right = self._tokens(contest.truth, written.hidden)
        results = []
        for head, result in zip(contest.heads, trial.heads, strict=True):
            differs = (self._tokens(head, written.hidden) != right).reshape(shape)
            firsts = [int(d.argmax()) if d.any() else None for d in differs]
            results.append(replace(result, first_differences=firsts))
            stage(len(results) / len(contest.heads))
        return replace(trial, heads=results)

    def sweep(
        self, method: Method, truth: Head, stored: Head, positions: Positions
    ) -> list[HeadResult]:
        """Compare a way to choose rows with the truth, at several numbers of probes."""
        count = len(method.counts)
        stage = self._stage(f"{method.name}: trying {count} numbers of probes")
        figures = compare_probes(truth, method, stored, positions, self._finish, stage)
        num_clusters = method.head.config.num_clusters
        return [
            HeadResult(
                method.name,
                method.bytes_at(num_probes),
                own,
                probed_count(num_clusters, num_probes),
            )
            for num_probes, own in zip(method.counts, figures, strict=True)
        ]

    def paper_method(self, rows: np.ndarray) -> Method:
        """Return the paper's method over the stored rows; it clusters ``rows``."""
        stage = self._stage(f"{PAPER}: clustering {len(rows)} rows")
        return paper_method(
            self.flash, rows, seed=self._seed, on_clustering=lambda done, _: stage(done)
        )

    def _tokens(self, head: Head, hidden: mx.array) -> np.ndarray:
        """Return the best token at each position, ``(N,)``."""
        tokens = [
            finished_logits(head, hidden[part], self._finish).argmax(axis=1)
            for part, _ in parts_of(len(hidden), head.vocab_size)
        ]
        return np.concatenate(tokens)

    def _stage(self, name: str) -> Callable[[float], None]:
        """Begin a stage; return what reports the share of it that is done."""
        progress = self._progress
        if progress is None:
            return lambda share: None
        progress(name, 0.0)
        return lambda share: progress(name, share)
