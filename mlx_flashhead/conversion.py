"""The pipeline: load, quantize, replace the head, measure, save."""

from __future__ import annotations

import contextlib
import io
import time
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import quantize_model

from mlx_flashhead.attach import DenseHead, find_head, replace_module
from mlx_flashhead.build import Progress, build_head, float_rows
from mlx_flashhead.config import MODEL_TYPE, Quantization
from mlx_flashhead.forward import hidden_states
from mlx_flashhead.head import FlashHead
from mlx_flashhead.loading import Source, load_source
from mlx_flashhead.measure import HeadFigures, head_bytes, measure_head
from mlx_flashhead.positions import sample_windows
from mlx_flashhead.report import Conversion
from mlx_flashhead.saving import save_folder, upload
from mlx_flashhead.vocabulary import read_vocabulary

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
    cluster_size: int = 16,
    num_probes: int | None = None,
    head_bits: int | Literal["source"] | None = None,
    centroid_bits: int = 4,
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
        head_bits: As in ``replace_head``; default: 8 with ``quantize``, else
            ``source``.
        centroid_bits: As in ``replace_head``.
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
    if head_bits is None:
        is_float = dense.rows.quantization is None
        head_bits = _DEFAULT_HEAD_BITS if quantize and is_float else "source"
    head = build_head(
        dense,
        read_vocabulary(source.tokenizer, dense.rows.num_rows),
        base_model_type=source.config["model_type"],
        cluster_size=cluster_size,
        num_probes=num_probes,
        head_bits=head_bits,
        head_group_size=body.group_size if body.mode == "affine" else 64,
        centroid_bits=centroid_bits,
        seed=seed,
        progress=progress,
    )
    figures = _measure(source, dense, head, progress)
    replace_module(source.model, dense.path, head)
    arrays: Any = tree_flatten(source.model.parameters())
    model_bytes = sum(array.nbytes for _, array in arrays)
    sizes = head_bytes(head)
    result = Conversion(
        source=str(hf_path),
        path=target,
        config=head.config,
        head=sizes,
        figures=figures,
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


def _measure(
    source: Source, dense: DenseHead, head: FlashHead, progress: Progress | None
) -> HeadFigures:
    """Compare the new head with the source's on the built-in texts."""
    stage = "Measuring on a few hundred positions"
    if progress:
        progress(stage, 0.0)
    token_ids = sample_windows(source.tokenizer)
    hidden = hidden_states(source.model, dense.path, token_ids)
    rows = float_rows(dense.rows)
    figures = measure_head(head, rows, hidden)
    if progress:
        progress(stage, 1.0)
    return figures
