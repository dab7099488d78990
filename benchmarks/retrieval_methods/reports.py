"""Tables of what becomes of the whole distribution."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

from mlx_flashhead.measure import rounded_rows
from mlx_flashhead.options import HeadOptions
from retrieval_methods.candidates import (
    Candidate,
    candidate,
    coarse_stage,
    half_projected,
    half_variance,
    known,
    with_bias,
)
from retrieval_methods.recall import DENSE_BITS, recall_cell, row_bytes
from retrieval_methods.subject import States, Subject
from retrieval_methods.tables import Method, default_sets
from retrieval_methods.tails import (
    Tails,
    fitted_level,
    measure_rounded_head,
    measure_tails,
    some_states,
)

TAIL_POSITIONS = 1000
TAIL_SHARES = (32, 16)
# Bytes read for a position, as shares of the dense 4-bit head's.
BUDGETS = (0.2, 0.25, 0.3, 0.35)
DIMS = (64, 128, 192, 256)

_COLUMNS = "KL | KL, p99 | TV | tail mass | dense tail mass |"


def print_splits(subject: Subject) -> None:
    """Print what equal bytes give, spent on dimensions or on rows."""
    vocab_size, hidden_size = subject.rows.shape
    few = some_states(subject.test, TAIL_POSITIONS)
    knowledge = known(subject, default_sets(subject))
    judged = []
    for dims in DIMS:
        chosen = candidate(coarse_stage(subject, knowledge, dims=dims), knowledge)
        needed = chosen.rows_needed(subject.test.hidden, subject.test.best)
        judged.append((dims, chosen, needed))
    print(f"| bytes | rows' bits | d | rows | recall | {_COLUMNS}")
    print("|---" * 10 + "|")
    for bits, budget, (dims, chosen, needed) in product((8, 4), BUDGETS, judged):
        to_spend = budget * row_bytes(hidden_size, DENSE_BITS) * vocab_size
        left = to_spend - chosen.coarse_bytes
        rows = int(left / row_bytes(hidden_size, bits))
        if rows < vocab_size // 256:
            continue
        cell = recall_cell(needed <= rows, subject.test)
        tails = _with_level(subject, few, chosen, rows)[1].cells(few.text)
        share = vocab_size / rows
        print(
            f"| {budget:.0%} | {bits} | {dims} | V/{share:.0f} | {cell} | {tails} |",
            flush=True,
        )


def uncertain_methods(subject: Subject) -> Iterator[Method]:
    """Yield the product, tokens raised by shares of half their error's variance."""
    knowledge = known(subject, default_sets(subject))
    stage = coarse_stage(subject, knowledge)
    chosen = candidate(stage, knowledge)
    half = half_variance(chosen, stage, knowledge)
    for share in (0, 0.25, 0.5, 1):
        bias = chosen.centroids.bias + share * half
        yield f"score + {share:g} · variance / 2", partial(with_bias, chosen, bias)


def print_tails(subject: Subject) -> None:
    """Print the stand-ins of several coarse stages beside the dense 4-bit head."""
    rows, few = subject.rows, some_states(subject.test, TAIL_POSITIONS)
    _print_heading()
    rounded = measure_rounded_head(rows, rounded_rows(rows, 4), few.hidden)
    _print_line("dense 4-bit", "V", "none", rounded, few)
    knowledge = known(subject, default_sets(subject))
    for name, options in (
        ("default", HeadOptions()),
        ("--cluster-size 16", HeadOptions(cluster_size=16)),
    ):
        stage = coarse_stage(subject, knowledge, options)
        chosen = candidate(stage, knowledge)
        half = half_variance(chosen, stage, knowledge)
        for share in TAIL_SHARES:
            count = len(rows) // share
            measure = partial(measure_tails, rows, few.hidden, chosen, count)
            _print_line(name, f"V/{share}", "score", measure(), few)
            level, tails = _with_level(subject, few, chosen, count)
            _print_line(name, f"V/{share}", f"score {level:+.2f}, fitted", tails, few)
            _print_line(name, f"V/{share}", "score + variance / 2", measure(half), few)
    halves = half_projected(candidate(coarse_stage(subject, knowledge), knowledge))
    for share in TAIL_SHARES:
        level, tails = _with_level(subject, few, halves, len(rows) // share)
        name = "default, projected in bfloat16"
        _print_line(name, f"V/{share}", f"score {level:+.2f}, fitted", tails, few)
    nothing = known(subject, [])
    chosen = candidate(coarse_stage(subject, nothing), nothing)
    for share in TAIL_SHARES:
        tails = measure_tails(rows, few.hidden, chosen, len(rows) // share)
        _print_line("--no-calibration", f"V/{share}", "score", tails, few)


def print_fitted_tails(subject: Subject, methods: Iterator[Method]) -> None:
    """Print what methods give, each with its own level of the tails."""
    few = some_states(subject.test, TAIL_POSITIONS)
    _print_heading()
    for name, build in methods:
        chosen = build()
        for share in TAIL_SHARES:
            level, tails = _with_level(subject, few, chosen, len(subject.rows) // share)
            _print_line(name, f"V/{share}", f"{level:+.2f}", tails, few)


def _with_level(
    subject: Subject, few: States, chosen: Candidate, num_rows: int
) -> tuple[float, Tails]:
    """Return the level that the converter gives the tails, and what comes of it."""
    level = fitted_level(subject.rows, default_sets(subject), chosen, num_rows)
    return level, measure_tails(subject.rows, few.hidden, chosen, num_rows, level)


def _print_heading() -> None:
    print(f"| head | rows | stand-in | {_COLUMNS}")
    print("|---" * 8 + "|")


def _print_line(
    head: str, rows_read: str, stand_in: str, tails: Tails, states: States
) -> None:
    print(
        f"| {head} | {rows_read} | {stand_in} | {tails.cells(states.text)} |",
        flush=True,
    )
