"""What a model is given to go on with: prompts, and single random tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_flashhead.calibration.prompts import PROMPTS
from mlx_flashhead.positions import spread
from mlx_flashhead.vocabulary import Vocabulary


def built_in_prompts(tokenizer: Any, count: int) -> tuple[list[list[int]], np.ndarray]:
    """Return token ids of ``count`` prompts, and the number of each one's kind.

    Fewer than there are come from all kinds; more come over again.
    """
    texts, kinds = [], []
    for number, (kind, beginnings) in enumerate(PROMPTS.items()):
        texts += [encode_prompt(tokenizer, kind, text) for text in beginnings]
        kinds += [number] * len(beginnings)
    chosen = spread(np.arange(len(texts))[:, None], count)[:, 0]
    _, kind_numbers = np.unique(np.array(kinds)[chosen], return_inverse=True)
    return [texts[i] for i in chosen], kind_numbers


def encode_prompt(tokenizer: Any, kind: str, text: str) -> list[int]:
    """Return a prompt's token ids; as a chat message if it is one and there is chat."""
    if kind.startswith("chat") and tokenizer.has_chat_template:
        return _chat(tokenizer, text)
    return list(tokenizer.encode(text))


def random_starts(
    tokenizer: Any, vocabulary: Vocabulary, vocab_size: int, count: int, seed: int
) -> list[list[int]]:
    """Return texts of one random token, behind what the model wants to start with."""
    start = list(tokenizer.encode(""))
    if not start and tokenizer.has_chat_template:
        start = _chat(tokenizer, "Write a text.")
    usable = np.setdiff1d(np.arange(vocab_size), list(vocabulary.unlikely))
    chosen = np.random.default_rng(seed).choice(usable, count, count > len(usable))
    return [[*start, int(token)] for token in chosen]


def _chat(tokenizer: Any, message: str) -> list[int]:
    """Return the token ids of a user's message and of the start of the answer."""
    messages = [{"role": "user", "content": message}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
