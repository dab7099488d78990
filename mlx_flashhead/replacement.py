"""Give a model a FlashHead: calibrate on what it writes, build, put in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_flashhead.attach import DenseHead, find_head, replace_module
from mlx_flashhead.build import BuiltHead, Progress, build_head, check_options
from mlx_flashhead.calibration import (
    DEFAULT_POSITIONS,
    CalibrationSet,
    sample_states,
)
from mlx_flashhead.options import HeadOptions
from mlx_flashhead.packing import float_rows
from mlx_flashhead.vocabulary import read_vocabulary


@dataclass(frozen=True)
class Calibration:
    """What a head is calibrated on.

    Attributes:
        is_wanted: Whether it is.
        texts: UTF-8 files, in place of what the model writes after built-in prompts.
        num_positions: Hidden states, at most.
    """

    is_wanted: bool
    texts: Sequence[str | Path]
    num_positions: int


def replace_head(
    model: nn.Module,
    tokenizer: Any,
    *,
    cluster_size: int = 1,
    num_probes: int | None = None,
    target_recall: float = 0.999,
    calibrate: bool = True,
    calibration_texts: Sequence[str | Path] = (),
    calibration_positions: int = DEFAULT_POSITIONS,
    head_bits: int | Literal["source"] = "source",
    centroid_bits: int | None = None,
    sampling: str = "deterministic",
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """Give a model loaded by mlx-lm a FlashHead, in place and in memory only.

    Args:
        model: Any model of mlx-lm whose logits come from one linear or embedding
            layer, quantized or not.
        tokenizer: The model's tokenizer, of mlx-lm or of transformers; its
            end-of-sequence and special tokens are always scored exactly.
        cluster_size: As in ``HeadOptions``.
        num_probes: As in ``HeadOptions``.
        target_recall: As in ``HeadOptions``.
        calibrate: Whether the model's own hidden states shape the head.
        calibration_texts: UTF-8 files to calibrate on, in place of what the model
            writes after built-in prompts.
        calibration_positions: Hidden states to calibrate on, at most.
        head_bits: As in ``HeadOptions``.
        centroid_bits: As in ``HeadOptions``.
        sampling: As in ``FlashHeadConfig``.
        seed: As in ``HeadOptions``.
        progress: Called with what is being done and the share of it done, 0 to 1.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: If a calibration text is not there.
        ValueError: If the head cannot be found, a setting is out of range, or rows
            hold NaN or infinity.
    """
    options = HeadOptions(
        cluster_size=cluster_size,
        num_probes=num_probes,
        target_recall=target_recall,
        head_bits=head_bits,
        centroid_bits=centroid_bits,
        sampling=sampling,
        seed=seed,
    )
    dense = find_head(model)
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    built = calibrated_head(
        model,
        tokenizer,
        dense,
        float_rows(dense.rows),
        options,
        Calibration(calibrate, calibration_texts, calibration_positions),
        base_model_type=model.model_type,
        progress=progress,
    )
    replace_module(model, dense.path, built.head)
    return model


def calibrated_head(
    model: nn.Module,
    tokenizer: Any,
    dense: DenseHead,
    rows: np.ndarray,
    options: HeadOptions,
    calibration: Calibration,
    *,
    base_model_type: str,
    progress: Progress | None = None,
) -> BuiltHead:
    """Build the FlashHead that stands in for a model's dense head.

    Args:
        model: The model, its dense head in place.
        tokenizer: Its tokenizer.
        dense: Its head.
        rows: The head's rows, ``(V, D)``, float32.
        options: The user's choices about the head.
        calibration: What it is calibrated on.
        base_model_type: ``model_type`` of the model.
        progress: Called with what is being done and the share of it done, 0 to 1.

    Raises:
        FileNotFoundError: If a calibration text is not there.
        ValueError: If a setting is out of range.
    """
    vocabulary = read_vocabulary(tokenizer, len(rows))
    check_options(options, vocabulary, len(rows))
    sets: list[CalibrationSet] = []
    if calibration.is_wanted:
        sets = sample_states(
            model,
            tokenizer,
            dense,
            rows,
            vocabulary,
            texts=calibration.texts,
            num_positions=calibration.num_positions,
            seed=options.seed,
            progress=progress,
        )
    elif calibration.texts:
        raise ValueError(
            "calibration_texts are given, but calibration is off: leave out one or the "
            "other."
        )
    return build_head(
        dense,
        rows,
        vocabulary,
        sets,
        options,
        base_model_type=base_model_type,
        progress=progress,
    )
