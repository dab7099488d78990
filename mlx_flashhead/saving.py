"""Write a converted folder, whole or not at all, and publish it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from mlx_lm.utils import save_config, save_model

from mlx_flashhead.build import Progress
from mlx_flashhead.checkpoint import model_config
from mlx_flashhead.loading import Source
from mlx_flashhead.report import Conversion, model_card


def save_folder(
    source: Source, result: Conversion, progress: Progress | None = None
) -> None:
    """Write the model folder that ``result`` describes.

    Args:
        source: The model with its new head, its tokenizer and its files.
        result: Where to write, and the figures for the model card.
        progress: Called with what is being done and the share of it done.

    Raises:
        OSError: If a file cannot be written.
    """
    if progress:
        progress("Saving", 0.0)
    with _new_folder(result.path) as folder:
        try:
            save_model(folder, source.model, donate_model=True)
        except RuntimeError as error:
            # What MLX raises when a write fails.
            raise OSError(
                f"The weights cannot be written to {folder.parent}; is the disk full? "
                f"({error})"
            ) from error
        source.tokenizer.save_pretrained(folder)
        for pattern in ("*.py", "generation_config.json"):
            for file in source.path.glob(pattern):
                shutil.copy(file, folder)
        model_card(result, source.path).save(folder / "README.md")
        # Last: a folder without it does not load, should the process be killed.
        save_config(
            model_config(source.config, result.config),
            folder / "config.json",
            keep_vision_config="vision_tower" in getattr(source.model, "model", {}),
        )
    if progress:
        progress("Saving", 1.0)


def upload(folder: Path, repo_id: str) -> None:
    """Upload a converted folder to a Hub repository, made if it does not exist.

    Raises:
        OSError: If the Hub refuses or cannot be reached; the folder stays.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id=repo_id, exist_ok=True)
        api.upload_large_folder(folder_path=folder, repo_id=repo_id, repo_type="model")
    except (OSError, HTTPError) as error:
        raise OSError(
            f"{folder} is complete, but it cannot be uploaded to {repo_id} ({error}); "
            f"try again with: hf upload {repo_id} {folder}."
        ) from error


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Give a hidden folder to write to, which becomes ``target`` if all goes well."""
    for abandoned in target.parent.glob(f".{target.name}.partial-*"):
        if not _is_running(int(abandoned.name.rpartition("-")[2])):
            shutil.rmtree(abandoned)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
