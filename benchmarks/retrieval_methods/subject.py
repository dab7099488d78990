"""A model's head, the states it is judged by and those it is calibrated on.

All of them are made once and kept in a folder.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import load

from mlx_flashhead.attach import DenseHead, find_head
from mlx_flashhead.calibration import (
    DEFAULT_POSITIONS,
    CalibrationSet,
    sample_states,
)
from mlx_flashhead.calibration.beginnings import encode_prompt
from mlx_flashhead.clustering import token_prior
from mlx_flashhead.measure import dense_tokens
from mlx_flashhead.packing import float_rows
from mlx_flashhead.positions import continuations
from mlx_flashhead.vocabulary import Vocabulary, read_vocabulary
from retrieval_methods.prompts import PROMPTS

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = {
    "smollm2": REPOSITORY / "examples" / "smollm2_from_pypi.py",
    "gemma": REPOSITORY / "benchmarks" / "gemma_from_pypi.py",
}
SEED = 12  # not the calibration's
TOKENS_PER_TEXT = 80
QUICK_SHARE = 6


@dataclass(frozen=True)
class States:
    """Positions at which the model samples its continuation of the test prompts.

    Attributes:
        hidden: ``(N, D)``, float32.
        best: Arg max of the dense float head, ``(N,)``.
        kind: Kind of text, ``(N,)``, strings.
        text: Id of the text, ``(N,)``: what the bootstrap draws.
    """

    hidden: np.ndarray
    best: np.ndarray
    kind: np.ndarray
    text: np.ndarray


@dataclass(frozen=True)
class Subject:
    """A model's head and the states that go with it.

    Attributes:
        rows: The head's rows, ``(V, D)``, float32.
        vocabulary: Its tokens' kinds.
        id_prior: Frequency of each token as guessed from its id, ``(V,)``.
        test: What methods are judged by.
        calibration: What the converter calibrates on, given a number of positions.
        positions: How many it takes by default.
    """

    rows: np.ndarray
    vocabulary: Vocabulary
    id_prior: np.ndarray
    test: States
    calibration: Callable[[int], list[CalibrationSet]]
    positions: int


def load_subject(name: str, folder: Path, quick: bool) -> Subject:
    """Return a model's head and states, made if they are not in ``folder`` yet."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n", "utf-8")
    subprocess.run([sys.executable, SCRIPTS[name], folder / name], check=True)
    model, tokenizer, *_ = load(str(folder / name))
    dense = find_head(model)
    rows = float_rows(dense.rows)
    vocabulary = read_vocabulary(tokenizer, len(rows))

    @cache
    def calibration(num_positions: int) -> list[CalibrationSet]:
        path = folder / f"{name}-calibration-{num_positions}.npz"
        if not path.exists():
            sets = sample_states(
                model,
                tokenizer,
                dense,
                rows,
                vocabulary,
                num_positions=num_positions,
                progress=_report,
            )
            arrays = {
                f"{k}_{i}": v for i, s in enumerate(sets) for k, v in vars(s).items()
            }
            np.savez(path, **arrays)
        with np.load(path) as arrays:
            return [
                CalibrationSet(
                    *(arrays[f"{f.name}_{i}"] for f in fields(CalibrationSet))
                )
                for i in (0, 1)
            ]

    path = folder / f"{name}-test{'-quick' if quick else ''}.npz"
    if not path.exists():
        states = _test_states(model, tokenizer, dense, rows, quick)
        np.savez(path, **vars(states))
    with np.load(path) as arrays:
        test = States(*(arrays[f.name] for f in fields(States)))
    return Subject(
        rows,
        vocabulary,
        token_prior(len(rows), skip=vocabulary.unlikely),
        test,
        calibration,
        DEFAULT_POSITIONS // (QUICK_SHARE if quick else 1),
    )


def _test_states(
    model: nn.Module, tokenizer: Any, dense: DenseHead, rows: np.ndarray, quick: bool
) -> States:
    """Let the model go on with the test prompts, to the end of sequence."""
    kinds = [kind for kind, texts in PROMPTS.items() for _ in texts]
    beginnings = [text for texts in PROMPTS.values() for text in texts]
    texts = [
        encode_prompt(tokenizer, kind, text)
        for kind, text in zip(kinds, beginnings, strict=True)
    ]
    if quick:
        texts, kinds = texts[::QUICK_SHARE], kinds[::QUICK_SHARE]
    states: list[np.ndarray] = []

    def logits(hidden: mx.array) -> mx.array:
        states.append(np.array(hidden[:, 0].astype(mx.float32)))
        return mx.array(states[-1] @ rows.T)[:, None]

    written = continuations(
        model,
        dense.path,
        logits,
        texts,
        TOKENS_PER_TEXT,
        temperature=1.0,
        seed=SEED,
        on_share=lambda share: _report("Continuing the test prompts", share),
    )
    shortest = min(map(len, texts))
    hidden, owner = [], []
    for i, text in enumerate(texts):
        own = written[i, len(text) : len(text) + TOKENS_PER_TEXT]
        ends = np.flatnonzero(np.isin(own, list(tokenizer.eos_token_ids)))
        # The position that chose the end counts, those behind it do not.
        count = ends[0] + 1 if len(ends) else len(own)
        first = len(text) - shortest
        hidden += [step[i] for step in states[first : first + count]]
        owner += [i] * count
    found = np.array(hidden)
    best = dense_tokens(mx.array(found), rows)
    return States(found, best, np.array(kinds)[owner], np.array(owner))


def _report(stage: str, share: float) -> None:
    print(f"\r{stage}: {share:4.0%} ", end="", file=sys.stderr, flush=True)
