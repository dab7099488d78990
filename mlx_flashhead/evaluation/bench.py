"""Run a model and set heads beside the truth on its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flashhead.build import Progress
from mlx_flashhead.evaluation.compare import (
    compare_heads,
    finished_logits,
    parts_of,
)
from mlx_flashhead.evaluation.results import HeadResult, Trial
from mlx_flashhead.head import FlashHead
from mlx_flashhead.heads import Head, after_head, probing_head
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

    def trial(
        self,
        truth_name: str,
        truth: Head,
        heads: Sequence[Head],
        positions: Positions,
        prompts: np.ndarray | None = None,
    ) -> Trial:
        """Compare heads with the truth at positions, and as greedy texts if asked."""
        loss, results = self._compared(
            truth, heads, positions, self._stage(f"Comparing with {truth_name}")
        )
        if prompts is not None:
            firsts = self._first_differences(truth, heads, prompts)
            results = [
                replace(result, first_differences=first)
                for result, first in zip(results, firsts, strict=True)
            ]
        return Trial(truth_name, loss, truth.bytes_per_token, results)

    def sweep(
        self, truth: Head, positions: Positions, counts: Sequence[int]
    ) -> list[HeadResult]:
        """Compare FlashHead with the truth at several numbers of probes."""
        results = []
        stage = self._stage(f"Trying {len(counts)} numbers of probes")
        for number, num_probes in enumerate(counts):
            head = probing_head(self.flash, num_probes)
            _, (result,) = self._compared(truth, [head], positions, lambda share: None)
            stage((number + 1) / len(counts))
            results.append(replace(result, num_probes=num_probes))
        return results

    def _compared(
        self,
        truth: Head,
        heads: Sequence[Head],
        positions: Positions,
        on_share: Callable[[float], None],
    ) -> tuple[float, list[HeadResult]]:
        """Return the truth's perplexity and each head's figures."""
        loss, found = compare_heads(truth, heads, positions, self._finish, on_share)
        results = [
            HeadResult(head.name, head.bytes_per_token, figures)
            for head, figures in zip(heads, found, strict=True)
        ]
        return loss, results

    def _first_differences(
        self, truth: Head, heads: Sequence[Head], prompts: np.ndarray
    ) -> list[list[int | None]]:
        """Return where each head's greedy texts leave the truth's, head by head.

        Up to its first difference a greedy text is the truth's, so the truth's hidden
        states tell where that is: no head but the truth has to write.
        """
        texts = self.continued(truth, prompts, CONTINUATION_LENGTH, 0.0)
        written = self.positions(texts, prompts.shape[1])
        shape = (len(prompts), CONTINUATION_LENGTH)
        stage = self._stage("Comparing greedy texts")
        # Not the tokens written one by one, whose last bits may differ.
        right = self._tokens(truth, written.hidden)
        firsts: list[list[int | None]] = []
        for head in heads:
            differs = (self._tokens(head, written.hidden) != right).reshape(shape)
            firsts.append([int(d.argmax()) if d.any() else None for d in differs])
            stage(len(firsts) / len(heads))
        return firsts

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
