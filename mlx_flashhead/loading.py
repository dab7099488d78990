"""Load models through mlx-lm, and say in a sentence why one cannot be loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    StrictDataclassError,
)
from mlx_lm.utils import _download

from mlx_flashhead.config import MODEL_TYPE


@dataclass
class Source:
    """A loaded model and where it came from.

    Attributes:
        name: Hub id or path as the user gave it.
        path: Its folder on this machine.
        model: The model, its weights not read yet.
        tokenizer: mlx-lm's tokenizer.
        config: Its ``config.json``.
    """

    name: str
    path: Path
    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]


def load(path_or_hf_repo: str | Path, *, lazy: bool = False) -> tuple[nn.Module, Any]:
    """Load a converted model, ready for every function of mlx-lm.

    The same as ``mlx_lm.load``, with errors that name the remedy.

    Args:
        path_or_hf_repo: Folder or Hub id of a converted model.
        lazy: Leave the weights unread until they are used.

    Returns:
        The model, with a ``FlashHead`` in it, and its tokenizer.

    Raises:
        FileNotFoundError: If there is no such folder or Hub model, or it lacks a file.
        ValueError: If it is not a FlashHead model, or its files are damaged.
    """
    source = load_source(path_or_hf_repo, lazy=lazy)
    if source.config.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{path_or_hf_repo} is not a FlashHead model: convert it with "
            f"mlx_flashhead.convert --hf-path {path_or_hf_repo}."
        )
    return source.model, source.tokenizer


def load_source(
    name: str | Path, *, lazy: bool = True, trust_remote_code: bool = False
) -> Source:
    """Load any model that mlx-lm can load.

    Args:
        name: Folder or Hub id.
        lazy: Leave the weights unread until they are used.
        trust_remote_code: Whether code in the model's folder may run.

    Raises:
        FileNotFoundError: If there is no such folder or Hub model, or it lacks a file.
        ValueError: If its files are damaged or mlx-lm does not know it.
    """
    path = _local_folder(str(name))
    _check_files(path)
    try:
        model, tokenizer, config = mlx_lm.load(
            str(path),
            lazy=lazy,
            return_config=True,
            tokenizer_config={"trust_remote_code": trust_remote_code},
            trust_remote_code=trust_remote_code,
        )
    except RuntimeError as error:
        raise ValueError(
            f"The weights in {path} are damaged; download them again ({error})."
        ) from error
    except (KeyError, TypeError, StrictDataclassError) as error:
        # What mlx-lm's and transformers' settings raise where keys are missing.
        raise ValueError(
            f"{path / 'config.json'} does not describe its architecture; download it "
            f"again ({error})."
        ) from error
    return Source(str(name), path, model, tokenizer, config)


def _local_folder(name: str) -> Path:
    """Return a model's folder, downloaded from the Hub if need be."""
    try:
        path = Path(_download(name))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{name} is neither a folder nor a model id on the Hugging Face Hub; "
            "check the spelling."
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(
            f"{name} is no folder here, and the Hugging Face Hub has no such model "
            "open to you; check the spelling, or log in with: hf auth login."
        ) from error
    except (OSError, HTTPError) as error:
        raise FileNotFoundError(
            f"{name} is no folder here, and the Hugging Face Hub cannot be reached; "
            "check the path or your connection."
        ) from error
    if not path.is_dir():
        raise FileNotFoundError(f"{name} is a file; name the model's folder.")
    return path


def _check_files(path: Path) -> None:
    """Check what mlx-lm would report without a remedy."""
    config = path / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{path} has no config.json: it is no model folder.")
    try:
        is_object = isinstance(json.loads(config.read_text("utf-8")), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise ValueError(f"{config} is damaged; download it again.")
    if not list(path.glob("model*.safetensors")):
        raise FileNotFoundError(
            f"{path} has no weights (model*.safetensors); download the model again."
        )
    tokenizer_files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    others = [*path.glob("*.tiktoken"), *path.glob("tokenization_*.py")]
    if not others and not any((path / name).is_file() for name in tokenizer_files):
        raise FileNotFoundError(
            f"{path} has no tokenizer ({', '.join(tokenizer_files)}); download the "
            "model again."
        )
