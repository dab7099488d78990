"""The command lines: options in, progress and one clear sentence out."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def convert_main(argv: Sequence[str] | None = None) -> int:
    """Run ``mlx_flashhead.convert``; return a process exit status."""
    args = vars(_convert_parser().parse_args(argv))

    def run() -> None:
        from mlx_flashhead.conversion import convert

        with _ProgressBar() as progress:
            result = convert(**args, progress=progress)
        print(result.summary())
        if args["upload_repo"]:
            print(f"Uploaded to https://huggingface.co/{args['upload_repo']}")

    return _without_traceback(run)


def benchmark_main(argv: Sequence[str] | None = None) -> int:
    """Run ``mlx_flashhead.benchmark``; return a process exit status."""
    args = vars(_benchmark_parser().parse_args(argv))
    show_text = args.pop("show_text")

    def run() -> None:
        from mlx_flashhead.benchmark import benchmark

        with _ProgressBar() as progress:
            result = benchmark(**args, progress=progress)
        if show_text:
            print(result.texts(), end="\n\n")
        print(result.table())

    return _without_traceback(run)


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """Run ``mlx_flashhead.evaluate``; return a process exit status."""
    args = vars(_evaluate_parser().parse_args(argv))
    plot, json = args.pop("plot"), args.pop("json")

    def run() -> None:
        from mlx_flashhead.evaluation import evaluate
        from mlx_flashhead.evaluation.files import check_target, written_whole
        from mlx_flashhead.evaluation.plot import check_plot, draw_plot

        # Before minutes of work whose result could not be kept.
        for path in filter(None, (plot, json)):
            check_target(path)
        if plot:
            check_plot(plot)
            args["sweep"] = True
        with _ProgressBar() as progress:
            result = evaluate(**args, progress=progress)
        print(result.table())
        if json:
            with written_whole(json) as file:
                file.write_text(result.to_json(), "utf-8")
        if plot:
            with written_whole(plot) as file:
                draw_plot(result, file)

    return _without_traceback(run)


def _convert_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_flashhead.convert",
        description="Give a model a FlashHead and save it as a folder that mlx-lm "
        "loads like any other. Options named as in mlx_lm.convert mean the same.",
    )
    add = parser.add_argument
    add(
        "--hf-path",
        "--model",
        required=True,
        help="The source model: a folder or a Hugging Face Hub id, float or quantized.",
    )
    add(
        "--mlx-path",
        help="Folder to write; it must not exist. Default: the source's name with "
        "-FlashHead, in the current folder.",
    )
    add("-q", "--quantize", action="store_true", help="Quantize the body of the model.")
    add("--q-bits", type=int, help="Bits of the body. Default: mlx-lm's, 4.")
    add("--q-group-size", type=int, help="Group size. Default: mlx-lm's, 64.")
    add(
        "--q-mode",
        default="affine",
        choices=("affine", "mxfp4", "nvfp4", "mxfp8"),
        help="Quantization mode of the body. Default: affine.",
    )
    add(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="Cast floats to this type. Default: leave them.",
    )
    add("--upload-repo", help="Hugging Face repository to upload the folder to.")
    add(
        "--trust-remote-code",
        action="store_true",
        help="Run code in the source's folder, if its tokenizer or model needs it.",
    )
    add(
        "--target-recall",
        type=float,
        default=0.999,
        metavar="SHARE",
        help="Read the fewest rows that hold the source head's token at this share of "
        "positions, shown with 95 %% confidence on text held out. Default: 0.999.",
    )
    add(
        "--num-probes",
        type=int,
        help="Clusters scored exactly per token, whatever the recall. Default: chosen "
        "by --target-recall; with --no-calibration one in 16.",
    )
    add(
        "--calibration-text",
        action="append",
        default=[],
        dest="calibration_texts",
        metavar="FILE",
        help="UTF-8 text to calibrate on; may be repeated. Default: what the model "
        "itself writes after built-in prompts in several languages, code and chat.",
    )
    add(
        "--calibration-positions",
        type=int,
        default=6144,
        metavar="N",
        help="Tokens to calibrate on, at most; time grows with them. Default: 6144.",
    )
    add(
        "--no-calibration",
        action="store_false",
        dest="calibrate",
        help="Build the head from its rows alone: faster to make, more bytes to read.",
    )
    add(
        "--cluster-size",
        type=int,
        default=1,
        help="Rows in a cluster. Default: 1, a centroid for each row.",
    )
    add(
        "--head-bits",
        type=lambda bits: bits if bits == "source" else int(bits),
        metavar="{4,5,6,8,16,source}",
        help="Bits of the head's rows; source keeps them bit for bit. Default: 8 with "
        "-q from a float source, where a dense 4-bit head would pick another token at "
        "one position in seven; else source.",
    )
    add(
        "--centroid-bits",
        type=int,
        metavar="{2,4,8,16}",
        help="Bits of the centroids. Default: 2; 4 for clusters of several rows.",
    )
    add(
        "--sampling",
        default="deterministic",
        choices=("deterministic", "stochastic", "corrected"),
        help="How clusters are chosen when the model decodes: the best; drawn at "
        "random as in the paper; or drawn and weighted, so that sampled tokens follow "
        "the dense distribution. Default: deterministic.",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="Seed of calibration, of the clustering and of the centroids' rotation. "
        "Default: 0.",
    )
    return parser


def _benchmark_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_flashhead.benchmark",
        description="Decode with a FlashHead model and with dense heads in its place, "
        "in one process: tokens per second, agreement, bytes of head read.",
    )
    add = parser.add_argument
    add("--model", required=True, help="A converted model: folder or Hub id.")
    add(
        "--reference",
        help="The model it was converted from. Its head, in float, is then the truth "
        "for agreement; default: the converted model's own rows, all of them read.",
    )
    add(
        "--prompt",
        default="Write a short story about a lighthouse keeper.",
        help="What to answer; as a chat message if the model has a chat template.",
    )
    add("--max-tokens", type=int, default=64, help="Tokens a run. Default: 64.")
    add("--num-trials", type=int, default=3, help="Runs of each head. Default: 3.")
    add("--show-text", action="store_true", help="Print the answers as well.")
    return parser


def _evaluate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_flashhead.evaluate",
        description="Compare a FlashHead model's head with dense heads, figure by "
        "figure: tokens, distributions, perplexity, greedy texts, bytes.",
    )
    add = parser.add_argument
    add("--model", required=True, help="A converted model: folder or Hub id.")
    add(
        "--reference",
        help="The model it was converted from; adds its head in float as the truth, "
        "and that head at 4 bits as a rival. Default: only the converted model's own "
        "rows, all of them read.",
    )
    add(
        "--text",
        action="append",
        default=[],
        dest="texts",
        metavar="FILE",
        help="UTF-8 text to take positions from; may be repeated. Default: what the "
        "model itself writes after built-in prompts.",
    )
    add(
        "--num-positions",
        type=int,
        help="Positions, at most; time grows with them. Default: 1024, which takes "
        "100 s of one x86 core for SmolLM2-135M; on a GPU 2048.",
    )
    add("--seed", type=int, default=0, help="Seed of the sampling. Default: 0.")
    add(
        "--sweep",
        action="store_true",
        help="Measure at other numbers of probes as well, from one cluster in 256 to "
        "one in two, and the paper's method over the same rows; its k-means takes "
        "minutes where the vocabulary is large.",
    )
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="Draw agreement and divergence against bytes read, with a sweep; the "
        "suffix names the kind of picture.",
    )
    add("--json", type=Path, metavar="FILE", help="Write all figures as JSON.")
    return parser


def _without_traceback(run: Callable[[], None]) -> int:
    """Run a command; report a mistake of the user's in one sentence."""
    # Killed politely, a command cleans up as it does after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


class _ProgressBar:
    """Shows what a library function reports, one line a stage, on a terminal only."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._share = 0.0

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, stage: str, share: float) -> None:
        """Show that ``share`` of ``stage`` is done; less than before is a new stage."""
        from huggingface_hub.utils import tqdm

        if self._bar is None or share < self._share:
            self._close()
            bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
            self._bar = tqdm(total=1.0, disable=None, bar_format=bar_format)
            self._share = 0.0
        self._bar.set_description_str(stage, refresh=False)
        self._bar.update(share - self._share)
        self._share = share

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
