"""Expected frequency of tokens, guessed from their ids."""

from collections.abc import Iterable

import numpy as np

# 1 / (rank + 200) fits a vocabulary whose ids follow frequency: flatter than
# Zipf's law for the first tokens, because ids order them only roughly.
_RANK_OFFSET = 200.0


def token_prior(vocab_size: int, *, skip: Iterable[int] = ()) -> np.ndarray:
    """Guess how often each token is used: ``1 / (rank + 200)``.

    A token's rank is the number of tokens with lower ids that are not skipped, so
    that ids which follow a block of special or byte tokens count from there.
    Skipped tokens share the weight of a token that would follow the last one.

    Args:
        vocab_size: Rows of the head, V.
        skip: Ids of special, byte and unused tokens, each in ``[0, V)``; any order,
            repetitions allowed.

    Returns:
        Positive weights, ``(V,)``, float32. Not normalised.

    Raises:
        ValueError: If an id in ``skip`` is not in ``[0, V)``.
    """
    used = np.ones(vocab_size, dtype=bool)
    skipped = np.fromiter(skip, dtype=np.int64)
    if skipped.size and not 0 <= skipped.min() <= skipped.max() < vocab_size:
        raise ValueError(
            f"skip holds ids from {skipped.min()} to {skipped.max()}; "
            f"they must be in [0, {vocab_size})."
        )
    used[skipped] = False
    rank = np.where(used, np.cumsum(used) - 1, np.count_nonzero(used))
    return (1.0 / (rank + _RANK_OFFSET)).astype(np.float32)


def check_prior(prior: np.ndarray, vocab_size: int) -> None:
    """Raise ValueError unless ``prior`` is ``(V,)`` and positive."""
    if prior.shape != (vocab_size,) or not prior.min() > 0:
        raise ValueError(
            f"prior has shape {prior.shape} and minimum {prior.min()}; need one "
            f"positive weight for each of {vocab_size} rows."
        )
