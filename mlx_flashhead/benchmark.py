"""Dense heads and a FlashHead side by side, in one process on one model body."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from mlx_flashhead.attach import replace_module
from mlx_flashhead.build import Progress
from mlx_flashhead.forward import hidden_states
from mlx_flashhead.head import FlashHead
from mlx_flashhead.heads import truth_rows
from mlx_flashhead.loading import load
from mlx_flashhead.measure import dense_tokens, head_bytes, head_tokens, rounded_rows
from mlx_flashhead.packing import affine
from mlx_flashhead.positions import sample_windows

_DENSE_BITS = (4, 8)
_FLOAT, _FLASHHEAD = "float", "FlashHead"


@dataclass(frozen=True)
class HeadResult:
    """One head's figures.

    Attributes:
        name: What the head is.
        tokens_per_second: Decoding speed, median of the trials, first token excluded.
        agreement: Share of positions at which it picks the float head's token.
        bytes_per_token: Bytes of head read for a token.
        text: Its greedy answer.
    """

    name: str
    tokens_per_second: float
    agreement: float
    bytes_per_token: int
    text: str


@dataclass(frozen=True)
class BenchmarkResult:
    """The heads' figures, and what they were measured on.

    Attributes:
        heads: One a head, FlashHead last.
        num_positions: Positions that agreement is measured on.
        num_tokens: Tokens decoded in a trial.
        num_trials: Trials.
        truth: Whose arg max agreement is measured against.
    """

    heads: list[HeadResult]
    num_positions: int
    num_tokens: int
    num_trials: int
    truth: str

    def table(self) -> str:
        """Return the figures as lines that fit in a terminal."""
        speeds = {head.name: head.tokens_per_second for head in self.heads}
        lines = [
            f"{'head':<14}{'tokens/s':>10}{'vs 4-bit':>10}{'agreement':>11}"
            f"{'MB/token':>10}"
        ]
        for head in self.heads:
            ratio = head.tokens_per_second / speeds[_dense_name(4)]
            lines.append(
                f"{head.name:<14}{head.tokens_per_second:>10.1f}{ratio:>9.2f}x"
                f"{head.agreement:>11.1%}{head.bytes_per_token / 1e6:>10.1f}"
            )
        lines.append(
            f"Median of {self.num_trials} runs of {self.num_tokens} tokens; agreement "
            f"with {self.truth} on {self.num_positions} positions."
        )
        return "\n".join(lines)

    def texts(self) -> str:
        """Return each head's answer under its name."""
        return "\n\n".join(f"[{head.name}]\n{head.text}" for head in self.heads)


def benchmark(
    model: str,
    *,
    reference: str | None = None,
    prompt: str = "Write a short story about a lighthouse keeper.",
    max_tokens: int = 64,
    num_trials: int = 3,
    progress: Progress | None = None,
) -> BenchmarkResult:
    """Decode with dense heads and with FlashHead on the same body.

    Args:
        model: A converted model: folder or Hub id.
        reference: The model it was made from, whose head is then the truth; default:
            the converted model's own rows.
        prompt: What to answer, a chat message if the model has a chat template.
        max_tokens: Tokens decoded in a run, end of sequence or not; at least 2.
        num_trials: Runs of each head, in turn, after one that does not count.
        progress: Called with what is being done and the share of it done, 0 to 1.

    Returns:
        Figures of the float head (with ``reference``), the dense head at 4 and 8 bits
        and FlashHead.

    Raises:
        FileNotFoundError: If a model is not there.
        ValueError: If ``model`` is not a FlashHead model, ``reference`` has another
            head, or a number is out of range.
    """
    if max_tokens < 2 or num_trials < 1:
        raise ValueError(
            f"max_tokens={max_tokens} must be at least 2 and num_trials={num_trials} "
            "at least 1."
        )
    body, tokenizer = load(model)
    flash = next(m for m in body.modules() if isinstance(m, FlashHead))
    rows = truth_rows(flash, reference)
    heads = _dense_heads(flash, rows, with_float=reference is not None)
    tokens = _picked_tokens(body, tokenizer, flash, rows)
    del rows
    prompt_ids = _encode(tokenizer, prompt)

    def answer(head: nn.Module) -> tuple[float, list[int]]:
        replace_module(body, flash.config.head_path, head)
        return _decode(body, prompt_ids, max_tokens)

    speeds, answers = _in_turn(answer, heads, num_trials, progress)
    return BenchmarkResult(
        heads=[
            HeadResult(
                name=name,
                tokens_per_second=statistics.median(speeds[name]),
                agreement=float((tokens[name] == tokens[_FLOAT]).mean()),
                bytes_per_token=_bytes_read(head),
                text=_text(tokenizer, answers[name]),
            )
            for name, head in heads.items()
        ],
        num_positions=len(tokens[_FLOAT]),
        num_tokens=max_tokens,
        num_trials=num_trials,
        truth=f"the head of {reference}" if reference else "all its own rows",
    )


def _dense_heads(
    flash: FlashHead, rows: np.ndarray, *, with_float: bool
) -> dict[str, nn.Module]:
    """Return the heads to compare, by name, FlashHead last."""
    weight = mx.array(rows).astype(getattr(mx, flash.config.dtype))
    heads = {_FLOAT: _dense_module(flash, weight, bits=16)} if with_float else {}
    for bits in _DENSE_BITS:
        heads[_dense_name(bits)] = _dense_module(flash, weight, bits=bits)
    mx.eval([head.parameters() for head in heads.values()])
    return heads | {_FLASHHEAD: flash}


def _dense_module(flash: FlashHead, weight: mx.array, *, bits: int) -> nn.Module:
    """Return MLX's own layer over rows ``(V, D)``, quantized as mlx-lm does."""
    vocab_size, hidden_size = weight.shape
    layer: nn.Module
    if flash.config.tied:
        layer = nn.Embedding(vocab_size, hidden_size)
    else:
        layer = nn.Linear(hidden_size, vocab_size, bias="bias" in flash)
        if "bias" in flash:
            layer.bias = flash.bias
    layer.weight = weight
    packing = affine(bits, hidden_size)
    if packing is None:
        return layer
    return layer.to_quantized(packing.group_size, packing.bits)


def _picked_tokens(
    body: nn.Module, tokenizer: Any, flash: FlashHead, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """Return each head's best tokens at the positions of built-in text, by its name.

    Leaves the body with the float head.
    """
    path, bias = flash.config.head_path, flash.get("bias")
    # Hidden states come from the body with the truth's own embedding.
    replace_module(body, path, _dense_module(flash, mx.array(rows), bits=16))
    hidden = hidden_states(body, path, sample_windows(tokenizer))
    tokens = {
        _dense_name(bits): dense_tokens(hidden, rounded_rows(rows, bits), bias)
        for bits in _DENSE_BITS
    }
    tokens[_FLOAT] = dense_tokens(hidden, rows, bias)
    tokens[_FLASHHEAD] = head_tokens(flash, hidden)
    return tokens


def _in_turn(
    answer: Callable[[nn.Module], tuple[float, list[int]]],
    heads: dict[str, nn.Module],
    num_trials: int,
    progress: Progress | None,
) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Return each head's speeds, the first run's left out, and its answer, by name."""
    report = progress or (lambda stage, share: None)
    speeds: dict[str, list[float]] = {name: [] for name in heads}
    answers = {}
    for trial in range(num_trials + 1):
        for number, (name, head) in enumerate(heads.items()):
            done = (trial * len(heads) + number) / ((num_trials + 1) * len(heads))
            report(f"Decoding with the {name} head", done)
            speed, answers[name] = answer(head)
            if trial:
                speeds[name].append(speed)
    report("Decoding", 1.0)
    return speeds, answers


def _encode(tokenizer: Any, prompt: str) -> mx.array:
    """Return a prompt's token ids as ``mlx_lm.generate`` would make them."""
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}]
        token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    else:
        token_ids = tokenizer.encode(prompt)
    return mx.array(token_ids)


def _decode(
    body: nn.Module, prompt_ids: mx.array, num_tokens: int
) -> tuple[float, list[int]]:
    """Decode greedily, past any end of sequence; return tokens per second and ids."""
    steps = generate_step(prompt_ids, body, max_tokens=num_tokens)
    tokens = [int(next(steps)[0])]
    started = time.perf_counter()
    tokens += [int(token) for token, _ in steps]
    return (len(tokens) - 1) / (time.perf_counter() - started), tokens


def _text(tokenizer: Any, tokens: list[int]) -> str:
    """Return the text up to the end of sequence."""
    ends = [i for i, token in enumerate(tokens) if token in tokenizer.eos_token_ids]
    return tokenizer.decode(tokens[: ends[0]] if ends else tokens)


def _bytes_read(head: nn.Module) -> int:
    """Return the bytes of head that a token reads."""
    if isinstance(head, FlashHead):
        return head_bytes(head).read_per_token
    arrays: Any = tree_flatten(head.parameters())
    return sum(array.nbytes for _, array in arrays)


def _dense_name(bits: int) -> str:
    return f"dense {bits}-bit"
