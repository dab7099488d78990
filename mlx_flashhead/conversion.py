"""The pipeline: load, quantize, replace the head, measure, save."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import quantize_model

from mlx_flashhead.attach import DenseHead, find_head, replace_module
from mlx_flashhead.build import Progress
from mlx_flashhead.calibration import DEFAULT_POSITIONS
from mlx_flashhead.config import MODEL_TYPE, Quantization
from mlx_flashhead.evaluation.compare import compare_heads
from mlx_flashhead.head import FlashHead
from mlx_flashhead.heads import after_head, dense_4bit_head, float_head, probing_head
from mlx_flashhead.loading import Source, load_source
from mlx_flashhead.measure import head_bytes
from mlx_flashhead.options import HeadOptions
from mlx_flashhead.packing import float_rows
from mlx_flashhead.positions import WINDOW_LENGTH, positions_in, windows
from mlx_flashhead.replacement import Calibration, calibrated_head
from mlx_flashhead.report import ComparedHeads, Conversion
from mlx_flashhead.sample_text import SAMPLE_TEXT
from mlx_flashhead.saving import save_folder, upload

# With -q from floats: few rows are read, so precision is cheap, and a 4-bit head
# misses the float head's token at 15 % of positions (SmolLM2-135M).
_DEFAULT_HEAD_BITS = 8

# mlx-lm's own: mode -> (bits, group size).
_BODY_DEFAULTS = {
    "affine": (4, 64),
    "mxfp4": (4, 32),
    "nvfp4": (4, 16),
    "mxfp8": (8, 32),
}

DTYPES = ("float16", "bfloat16", "float32")


def convert(
    hf_path: str | Path,
    mlx_path: str | Path | None = None,
    *,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    dtype: str | None = None,
    upload_repo: str | None = None,
    trust_remote_code: bool = False,
    cluster_size: int = 1,
    num_probes: int | None = None,
    target_recall: float = 0.999,
    calibrate: bool = True,
    calibration_texts: Sequence[str | Path] = (),
    calibration_positions: int = DEFAULT_POSITIONS,
    head_bits: int | Literal["source"] | None = None,
    centroid_bits: int | None = None,
    sampling: str = "deterministic",
    seed: int = 0,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a model to a folder with a FlashHead that plain mlx-lm loads.

    Options named as in ``mlx_lm.convert`` mean the same. The folder appears whole or
    not at all.

    Args:
        hf_path: Folder or Hub id of the source model, float or quantized.
        mlx_path: The folder to write, which must not exist; default: the source's
            name with ``-FlashHead``, in the current folder.
        quantize: Quantize the body as mlx-lm does.
        q_bits: Bits of the body.
        q_group_size: Group size of the body, and of rows quantized here.
        q_mode: Quantization mode of the body.
        dtype: Cast floats to ``float16``, ``bfloat16`` or ``float32``.
        upload_repo: Hub repository to upload the folder to.
        trust_remote_code: Let code in the source's folder run.
        cluster_size: As in ``replace_head``.
        num_probes: As in ``replace_head``.
        target_recall: As in ``replace_head``.
        calibrate: As in ``replace_head``.
        calibration_texts: As in ``replace_head``.
        calibration_positions: As in ``replace_head``.
        head_bits: As in ``replace_head``; default: 8 with ``quantize``, else
            ``source``.
        centroid_bits: As in ``replace_head``.
        sampling: As in ``replace_head``.
        seed: As in ``replace_head``.
        progress: As in ``replace_head``.

    Returns:
        What was written.

    Raises:
        FileExistsError: If ``mlx_path`` exists.
        FileNotFoundError: If the source is not there or lacks a file.
        ValueError: If the source is damaged, unknown, or a FlashHead already, or an
            option is out of range.
    """
    started = time.perf_counter()
    target = _target_folder(hf_path, mlx_path)
    body = _body_quantization(q_bits, q_group_size, q_mode)
    options = HeadOptions(
        cluster_size=cluster_size,
        num_probes=num_probes,
        target_recall=target_recall,
        head_bits="source" if head_bits is None else head_bits,
        head_group_size=body.group_size if body.mode == "affine" else 64,
        centroid_bits=centroid_bits,
        sampling=sampling,
        seed=seed,
    )
    source = load_source(hf_path, trust_remote_code=trust_remote_code)
    if source.config.get("model_type") == MODEL_TYPE:
        raise ValueError(
            f"{hf_path} is a FlashHead model already; convert the model it was made "
            "from."
        )
    _cast(source.model, dtype)
    if quantize:
        _quantize_body(source, body)
    dense = find_head(source.model)
    if head_bits is None and quantize and dense.rows.quantization is None:
        options = replace(options, head_bits=_DEFAULT_HEAD_BITS)
    rows = float_rows(dense.rows)
    built = calibrated_head(
        source.model,
        source.tokenizer,
        dense,
        rows,
        options,
        Calibration(calibrate, calibration_texts, calibration_positions),
        base_model_type=source.config["model_type"],
        progress=progress,
    )
    heads = _compared(source, dense, rows, built.head, progress)
    replace_module(source.model, dense.path, built.head)
    arrays: Any = tree_flatten(source.model.parameters())
    model_bytes = sum(array.nbytes for _, array in arrays)
    sizes = head_bytes(built.head)
    result = Conversion(
        source=str(hf_path),
        path=target,
        config=built.head.config,
        head=sizes,
        choice=built.choice,
        heads=heads,
        model_bytes=model_bytes,
        plain_4bit_bytes=model_bytes - sizes.stored + sizes.dense_4bit,
        seconds=time.perf_counter() - started,
    )
    save_folder(source, result, progress)
    if upload_repo is not None:
        upload(target, upload_repo)
    return result


def _target_folder(hf_path: str | Path, mlx_path: str | Path | None) -> Path:
    """Return the folder to write, which must not exist."""
    if mlx_path is None:
        mlx_path = f"{Path(hf_path).resolve().name}-FlashHead"
    target = Path(mlx_path)
    if target.exists():
        raise FileExistsError(
            f"{target} exists already; delete it or name another with --mlx-path."
        )
    return target


def _cast(model: nn.Module, dtype: str | None) -> None:
    """Cast a model's floats, but those its architecture keeps, as mlx-lm does."""
    if dtype is None:
        return
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
    is_cast = getattr(model, "cast_predicate", lambda _: True)

    def cast(path: str, array: mx.array) -> mx.array:
        is_float = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(getattr(mx, dtype)) if is_float and is_cast(path) else array

    model.update(tree_map_with_path(cast, model.parameters()))


def _body_quantization(
    bits: int | None, group_size: int | None, mode: str
) -> Quantization:
    """Return what the options ask for, mlx-lm's defaults filled in."""
    default_bits, default_group_size = _BODY_DEFAULTS.get(mode, (4, 64))
    return Quantization(bits or default_bits, group_size or default_group_size, mode)


def _quantize_body(source: Source, body: Quantization) -> None:
    """Quantize all of a model but its head, as ``mlx_lm.convert -q`` would."""
    if "quantization" in source.config:
        raise ValueError(
            f"{source.name} is quantized already: leave out -q, and its weights are "
            "kept as they are."
        )
    head_path = find_head(source.model).path
    of_model = getattr(source.model, "quant_predicate", None)

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path == head_path:
            return False
        return True if of_model is None else of_model(path, module)

    # mlx-lm prints its bits per weight, which would count the head as a float one.
    with contextlib.redirect_stdout(io.StringIO()):
        source.model, source.config = quantize_model(
            source.model,
            source.config,
            body.group_size,
            body.bits,
            mode=body.mode,
            quant_predicate=predicate,
        )


def _compared(
    source: Source,
    dense: DenseHead,
    rows: np.ndarray,
    flash: FlashHead,
    progress: Progress | None,
) -> ComparedHeads:
    """Set the new head and a dense 4-bit one beside the source's, on built-in text."""
    stage = "Measuring on a few hundred positions"

    def on_share(share: float) -> None:
        if progress:
            progress(stage, share)

    on_share(0.0)
    token_ids = windows(source.tokenizer, SAMPLE_TEXT, WINDOW_LENGTH)
    positions = positions_in(source.model, dense.path, token_ids, 1, lambda _: None)
    finish = after_head(source.model, dense.path, len(rows))
    heads = [probing_head(flash), dense_4bit_head(flash, rows)]
    _, (ours, rival) = compare_heads(
        float_head(flash, rows), heads, positions, finish, on_share
    )
    return ComparedHeads(len(positions.next_tokens), ours, rival)
