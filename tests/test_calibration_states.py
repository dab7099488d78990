"""Calibration positions: against texts run through mlx-lm's model, token by token."""

from dataclasses import dataclass

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

from mlx_flashhead.attach import find_head
from mlx_flashhead.calibration import CalibrationSet, sample_states, states
from mlx_flashhead.calibration.beginnings import built_in_prompts
from mlx_flashhead.packing import float_rows
from mlx_flashhead.positions import continuations
from mlx_flashhead.vocabulary import read_vocabulary

V = tiny.VOCAB_SIZE
QUICK = {"num_positions": 256}


@dataclass
class Sampled:
    """Positions, and the texts that were written for them."""

    sets: list[CalibrationSet]
    # Prompts and all that followed, of each batch.
    batches: list[tuple[list[list[int]], np.ndarray]]


def inputs(folder) -> tuple:
    """Return what ``sample_states`` takes by position."""
    model, tokenizer = mlx_lm.load(str(folder))
    dense = find_head(model)
    vocabulary = read_vocabulary(tokenizer, V)
    return model, tokenizer, dense, float_rows(dense.rows), vocabulary


def sampled(folder, monkeypatch=None, **options) -> Sampled:
    batches = []

    def record(model, path, logits, prompts, *args, **kwargs):
        written = continuations(model, path, logits, prompts, *args, **kwargs)
        batches.append((prompts, written))
        return written

    if monkeypatch:
        monkeypatch.setattr(states, "continuations", record)
    return Sampled(sample_states(*inputs(folder), **options), batches)


def read_by_the_model(model, tokens: list[int]) -> np.ndarray:
    """Return the hidden states of a text read at once, ``(L, D)``."""
    return np.array(model.model(mx.array([tokens])))[0].astype(np.float64)


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Both are float32 products through two layers, in another order."""
    assert actual.shape == expected.shape
    bound = 1e-4 * np.abs(expected).max()
    assert np.abs(actual - expected).max() <= bound


def kept(prompt: list[int], tokens: np.ndarray, num_tokens: int) -> list[int]:
    """Return a text's tokens up to its end of sequence, one by one."""
    text = list(prompt)
    for token in tokens[len(prompt) :].tolist():
        if len(text) == len(prompt) + num_tokens:
            break
        text.append(token)
        if token == tiny.EOS:
            break
    return text


# All texts of a set at once, and three at a time.
@pytest.mark.parametrize("batch_size", [32, 3])
def test_positions_are_those_of_texts_that_the_model_writes(
    batch_size, tiny_llama, monkeypatch
):
    monkeypatch.setattr(states, "_TEXTS_PER_BATCH", batch_size)

    found = sampled(tiny_llama, monkeypatch, num_positions=480, seed=1)

    model, _ = mlx_lm.load(str(tiny_llama))
    rows = np.array(model.lm_head.weight, np.float64)
    sizes = [len(prompts) for prompts, _ in found.batches]
    # Five prompts of 48 tokens and 15 random starts of 16.
    assert sizes == ([5, 15] if batch_size == 32 else [3, 2, *[3] * 5])
    num_ended = 0
    surprises = []
    batches = iter(found.batches)
    for positions, num_texts, num_tokens in zip(
        found.sets, (5, 15), (48, 16), strict=True
    ):
        expected, drawn = [], []
        while num_texts > 0:
            prompts, written = next(batches)
            num_texts -= len(prompts)
            for prompt, tokens in zip(prompts, written, strict=True):
                assert tokens[: len(prompt)].tolist() == prompt
                text = kept(prompt, tokens, num_tokens)
                num_ended += text[-1] == tiny.EOS
                # The state that a token was drawn from is that of the one before.
                hidden = read_by_the_model(model, text[:-1])
                expected.append(hidden[len(prompt) - 1 :])
                drawn += text[len(prompt) :]
        hidden = np.vstack(expected)
        assert_close(positions.hidden, hidden)
        assert positions.hidden.dtype == np.float32
        logits = hidden @ rows.T
        assert (positions.best_tokens == logits.argmax(axis=1)).all()
        softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
        softmax /= softmax.sum(axis=1, keepdims=True)
        for fold in range(4):
            sums = softmax[positions.fold == fold].sum(axis=0)
            np.testing.assert_allclose(positions.softmax_sums[fold], sums, atol=1e-3)
        information = -np.log(softmax + 1e-30)
        of_drawn = information[np.arange(len(drawn)), drawn]
        surprises.append(of_drawn - (softmax * information).sum(axis=1))
    assert 0 < num_ended < 20
    # Drawn at temperature 1: as surprising on average as the distributions say.
    surprise = np.concatenate(surprises)
    assert abs(surprise.mean()) < 3 * surprise.std() / len(surprise) ** 0.5


def test_folds_share_no_kind_and_no_text(tiny_llama, monkeypatch):
    found = sampled(tiny_llama, monkeypatch, num_positions=2400)

    _, tokenizer = mlx_lm.load(str(tiny_llama))
    texts, kinds = built_in_prompts(tokenizer, 25)
    # Texts side by side are of about one length, so their order is another.
    folds = {}
    for text, kind in zip(texts, kinds, strict=True):
        folds.setdefault(tuple(text), set()).add(kind % 4)
    for positions, batches, num_tokens in (
        (found.sets[0], found.batches[:1], 48),
        (found.sets[1], found.batches[1:], 16),
    ):
        assert set(positions.fold) == {0, 1, 2, 3}
        start = 0
        for prompts, written in batches:
            for prompt, tokens in zip(prompts, written, strict=True):
                count = len(kept(prompt, tokens, num_tokens)) - len(prompt)
                fold = set(positions.fold[start : start + count])
                assert len(fold) == 1
                if num_tokens == 48:
                    assert fold <= folds[tuple(prompt)]
                start += count
        assert start == len(positions.fold)


def test_statistics_leave_a_fold_out(tiny_llama):
    positions = sampled(tiny_llama, num_positions=600).sets[0]

    for held_out in (None, 0, 1, 2, 3):
        is_in = np.isin(positions.fold, [f for f in range(4) if f != held_out])
        hidden = positions.hidden[is_in].astype(np.float64)
        statistics = positions.statistics(held_out)

        np.testing.assert_allclose(statistics.mean, hidden.mean(axis=0), atol=1e-5)
        expected = np.cov(hidden, rowvar=False, bias=True)
        np.testing.assert_allclose(
            statistics.covariance, expected, atol=1e-5 * expected.max()
        )
        rows = tiny.read_weights(tiny_llama)["lm_head.weight"]
        logits = hidden @ np.array(rows, np.float64).T
        softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
        softmax /= softmax.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(
            statistics.token_probabilities, softmax.mean(axis=0), atol=1e-5
        )


@pytest.mark.parametrize("num_positions", [256, 257, 999])
def test_there_are_no_more_positions_than_asked_for(num_positions, tiny_llama):
    sets = sampled(tiny_llama, num_positions=num_positions).sets

    count = sum(len(positions.hidden) for positions in sets)
    assert num_positions / 2 < count <= num_positions
    assert all(len(set(positions.fold)) > 1 for positions in sets)


def test_random_starts_are_likely_tokens(tiny_llama, monkeypatch):
    found = sampled(tiny_llama, monkeypatch, num_positions=2400)

    starts = [prompt for prompts, _ in found.batches[1:] for prompt in prompts]
    assert {len(start) for start in starts} == {1}
    tokens = [start[0] for start in starts]
    assert len(tokens) == len(set(tokens)) == 75
    assert not set(tokens) & {*tiny.SPECIAL_TOKENS, 200, 201, 202}


def test_a_seed_decides_all_and_the_global_one_nothing(tiny_llama):
    arguments = inputs(tiny_llama)

    first, second, other = (
        (mx.random.seed(number), sample_states(*arguments, seed=seed, **QUICK))[1]
        for number, seed in enumerate((5, 5, 6))
    )

    for a, b, c in zip(first, second, other, strict=True):
        np.testing.assert_array_equal(a.hidden, b.hidden)
        np.testing.assert_array_equal(a.softmax_sums, b.softmax_sums)
        assert a.hidden.shape != c.hidden.shape or (a.hidden != c.hidden).any()
    # Nor does it take from the global one.
    drawn = mx.random.uniform(shape=(3,))
    mx.random.seed(2)
    assert mx.array_equal(drawn, mx.random.uniform(shape=(3,)))


def test_the_model_is_left_as_it_was(tiny_llama):
    arguments = inputs(tiny_llama)
    model = arguments[0]
    kinds = {name: type(module) for name, module in model.named_modules()}
    arrays = dict(tree_flatten(model.parameters()))

    sample_states(*arguments, **QUICK)

    assert {name: type(module) for name, module in model.named_modules()} == kinds
    for name, array in tree_flatten(model.parameters()):
        assert array is arrays[name]


@pytest.mark.parametrize(("model_type", "tied"), [("phi", False), ("gpt2", True)])
def test_answers_count_the_heads_bias_and_any_body(model_type, tied, tmp_path):
    folder = tiny.write_folder(tmp_path / "model", model_type, tied=tied)

    sets = sampled(folder, num_positions=256).sets

    model, _ = mlx_lm.load(str(folder))
    dense = find_head(model)
    rows = np.array(dense.rows.weight, np.float64)
    bias = 0 if dense.bias is None else np.array(dense.bias, np.float64)
    for positions in sets:
        logits = positions.hidden @ rows.T + bias
        assert (positions.best_tokens == logits.argmax(axis=1)).all()
    assert (dense.bias is None) == (model_type == "gpt2")
