"""Positions to look at a head on: of given texts, or of what the model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_flashhead.forward import Project, exchanged_head, hidden_states
from mlx_flashhead.sample_text import SAMPLE_TEXT

PROMPT_LENGTH = 16
CONTINUATION_LENGTH = 32
WINDOW_LENGTH = 64

# As people sample: at 1.0 the text of a small model falls apart.
TEMPERATURE = 0.7

_WINDOWS_PER_CALL = 16

Logits = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Positions:
    """Hidden states, and the token that follows each of them.

    Attributes:
        hidden: ``(N, D)``, float32.
        next_tokens: ``(N,)``, integers.
    """

    hidden: mx.array
    next_tokens: np.ndarray


def read_texts(paths: Sequence[str | Path]) -> list[str]:
    """Read text files.

    Raises:
        FileNotFoundError: If one is not there.
        ValueError: If one is no UTF-8 text.
    """
    texts = []
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file; name a text to read.")
        try:
            texts.append(path.read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is no UTF-8 text; save it as UTF-8 first."
            ) from error
    return texts


def windows(tokenizer: Any, text: str, length: int) -> np.ndarray:
    """Cut a text into windows, ``(W, B + length)``, each begun as the model expects.

    Args:
        tokenizer: The model's; B is 1 if it starts texts with a token, else 0.
        text: What to cut; the rest that fills no window is dropped.
        length: Tokens of text in a window.
    """
    start = [t for t in tokenizer.encode("")[:1] if t == tokenizer.bos_token_id]
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    count = len(token_ids) // length
    body = np.array(token_ids[: count * length], np.int64).reshape(count, length)
    return np.hstack([np.full((count, len(start)), start, np.int64), body])


def sample_windows(tokenizer: Any) -> mx.array:
    """Return the built-in text in windows, ``(W, B + 64)``."""
    return mx.array(windows(tokenizer, SAMPLE_TEXT, WINDOW_LENGTH))


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """Return ``count`` of the rows, at even distances; over again if there are less."""
    if count > len(rows):
        return np.resize(rows, (count, rows.shape[1]))
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]


def positions_in(
    model: nn.Module,
    head_path: str,
    token_ids: np.ndarray,
    num_given: int,
    on_share: Callable[[float], None],
) -> Positions:
    """Run the body over texts.

    Args:
        model: The model.
        head_path: Where its head is.
        token_ids: ``(B, L)``.
        num_given: Leading tokens of each text that are not looked at, at least 1.
        on_share: Called with the share done.

    Returns:
        ``B * (L - num_given)`` positions, text by text.
    """
    hidden = []
    for start in range(0, len(token_ids), _WINDOWS_PER_CALL):
        part = token_ids[start : start + _WINDOWS_PER_CALL]
        states = hidden_states(model, head_path, mx.array(part[:, :-1]))
        states = states.reshape(len(part), part.shape[1] - 1, -1)[:, num_given - 1 :]
        hidden.append(states.reshape(-1, states.shape[-1]))
        mx.eval(hidden)
        on_share(min(1.0, (start + len(part)) / len(token_ids)))
    return Positions(mx.concatenate(hidden), token_ids[:, num_given:].reshape(-1))


def continuations(
    model: nn.Module,
    head_path: str,
    logits: Logits,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    num_tokens: int,
    *,
    temperature: float,
    seed: int,
    on_share: Callable[[float], None],
) -> np.ndarray:
    """Let a model go on, all prompts at once, past any end of sequence.

    Prompts longer than the shortest are fed their own tokens at first.

    Args:
        model: The model.
        head_path: Where its head is.
        logits: The head to use instead: ``(B, 1, D)`` to ``(B, 1, V)``.
        prompts: Token ids of B prompts, of L tokens at most.
        num_tokens: Tokens to add to the longest, T; shorter ones get more.
        temperature: 0 takes the best token.
        seed: Of the sampling.
        on_share: Called with the share done.

    Returns:
        Prompts and continuations, ``(B, L + T)``.
    """

    def wrap(_: Project) -> Project:
        return lambda _, hidden: logits(hidden[:, -1:])

    lengths = np.array([len(prompt) for prompt in prompts])
    shortest, longest = int(lengths.min()), int(lengths.max())
    own = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in zip(own, prompts, strict=True):
        row[: len(prompt)] = prompt
    num_steps = longest - shortest + num_tokens
    keys = mx.random.split(mx.random.key(seed), num_steps)
    cache = make_prompt_cache(model)
    texts = [mx.array(own[:, :shortest])]
    with exchanged_head(model, head_path, wrap, keep_weights=True):
        for step in range(num_steps):
            scores = model(texts[-1], cache=cache)[:, -1].astype(mx.float32)
            if temperature:
                tokens = mx.random.categorical(scores / temperature, key=keys[step])
            else:
                tokens = mx.argmax(scores, axis=-1)
            if (column := shortest + step) < longest:
                given = mx.array(own[:, column])
                tokens = mx.where(mx.array(column < lengths), given, tokens)
            texts.append(tokens[:, None].astype(texts[0].dtype))
            mx.eval(texts)
            on_share((step + 1) / num_steps)
    return np.array(mx.concatenate(texts, axis=1))
