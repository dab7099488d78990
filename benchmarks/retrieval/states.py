"""Models and their hidden states, made once and kept in a folder."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import prompts
from decoding import Decoder, continue_texts
from mlx_lm import load

from mlx_flashhead.vocabulary import read_vocabulary

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = {
    "smollm2": REPOSITORY / "examples" / "smollm2_from_pypi.py",
    "gemma": REPOSITORY / "benchmarks" / "gemma_from_pypi.py",
}
SEEDS = {"calibration": 11, "test": 12, "random": 13}
TOKENS_PER_TEXT = {"calibration": 64, "test": 80, "random": 12}
RANDOM_TEXTS = 256
QUICK_SHARE = 6


@dataclass(frozen=True)
class States:
    """Positions of one set of texts.

    Attributes:
        hidden: ``(N, D)``, float32.
        best: Arg max of the dense float head, ``(N,)``.
        kind: Kind of text, ``(N,)``, strings.
        text: Id of the text, ``(N,)``: what the bootstrap draws.
        mean_probabilities: Mean softmax of the positions, ``(V,)``.
    """

    hidden: np.ndarray
    best: np.ndarray
    kind: np.ndarray
    text: np.ndarray
    mean_probabilities: np.ndarray


@dataclass(frozen=True)
class Subject:
    """A model's head and the states it is judged by.

    Attributes:
        rows: The head's rows, ``(V, D)``, float32.
        unlikely: Special, byte and unused tokens, skipped by the id-based prior.
        calibration: Continuations of the calibration prompts.
        random: Continuations of single random tokens.
        test: Continuations of the test prompts.
    """

    rows: np.ndarray
    unlikely: list[int]
    calibration: States
    random: States
    test: States


def load_subject(name: str, folder: Path, quick: bool) -> Subject:
    """Return a model's head and states, made if they are not in ``folder`` yet."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n", "utf-8")
    subprocess.run([sys.executable, SCRIPTS[name], folder / name], check=True)
    model, tokenizer, *_ = load(str(folder / name))
    decoder = Decoder(model)
    vocabulary = read_vocabulary(tokenizer, len(decoder.rows))
    sets = {
        split: _states(
            folder / f"{name}-{split}{'-quick' if quick else ''}.npz",
            split,
            decoder,
            tokenizer,
            vocabulary.unlikely,
            quick,
        )
        for split in ("test", "calibration", "random")
    }
    return Subject(decoder.rows, sorted(vocabulary.unlikely), **sets)


def _states(
    path: Path,
    split: str,
    decoder: Decoder,
    tokenizer: Any,
    unlikely: frozenset[int],
    quick: bool,
) -> States:
    """Read a set of states, or make and write it."""
    if not path.exists():
        texts, kinds = (
            _random_texts(tokenizer, len(decoder.rows), unlikely)
            if split == "random"
            else _prompt_texts(split, tokenizer)
        )
        if quick:
            texts, kinds = texts[::QUICK_SHARE], kinds[::QUICK_SHARE]
        found = continue_texts(
            decoder,
            texts,
            max_tokens=TOKENS_PER_TEXT[split],
            stop=set(tokenizer.eos_token_ids),
            seed=SEEDS[split],
            progress=lambda done, total: print(
                f"{path.stem}: {done} of {total} texts", file=sys.stderr, flush=True
            ),
        )
        np.savez(
            path,
            hidden=found.hidden,
            best=found.best,
            kind=np.array(kinds)[found.text],
            text=found.text,
            mean_probabilities=found.mean_probabilities,
        )
    with np.load(path) as arrays:
        return States(**{name: arrays[name] for name in arrays.files})


def _prompt_texts(split: str, tokenizer: Any) -> tuple[list[list[int]], list[str]]:
    """Return the token ids and the kind of each built-in prompt."""
    texts, kinds = [], []
    by_kind = prompts.TEST if split == "test" else prompts.CALIBRATION
    for kind, beginnings in by_kind.items():
        for beginning in beginnings:
            if kind.startswith("chat"):
                texts.append(_chat(tokenizer, beginning))
            else:
                texts.append(list(tokenizer.encode(beginning)))
            kinds.append(kind)
    return texts, kinds


def _random_texts(
    tokenizer: Any, vocab_size: int, unlikely: frozenset[int]
) -> tuple[list[list[int]], list[str]]:
    """Return texts of one random token, behind what the model wants to start with."""
    start = list(tokenizer.encode("")) or _chat(tokenizer, "Write a text.")
    usable = np.setdiff1d(np.arange(vocab_size), list(unlikely))
    chosen = np.random.default_rng(SEEDS["random"]).choice(usable, RANDOM_TEXTS, False)
    return [[*start, int(token)] for token in chosen], ["random"] * RANDOM_TEXTS


def _chat(tokenizer: Any, message: str) -> list[int]:
    """Return the token ids of a user's message and the start of the answer."""
    messages = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer.encode(text, add_special_tokens=False))
