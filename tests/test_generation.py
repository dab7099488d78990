"""Converted models in mlx-lm's own functions, against the base model and an oracle."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import batch_generate, generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.utils import sharded_load
from oracles import flash_logits

from mlx_flashhead.head import FlashHead

PROMPT = [17, 90, 33, 121, 8, 64]
NUM_TOKENS = 32


@pytest.fixture(scope="module")
def base(tiny_llama):
    return mlx_lm.load(str(tiny_llama))[0]


@pytest.fixture(scope="module", params=["tiny_flashhead", "tiny_single_rows"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def flash(folder):
    return mlx_lm.load(str(folder))[0]


@pytest.fixture(scope="module")
def all_probed(tiny_all_probed):
    return mlx_lm.load(str(tiny_all_probed))[0]


def generated(model, prompt=PROMPT, num_tokens=NUM_TOKENS, **options) -> list[int]:
    """Return the tokens that mlx-lm generates, past any end of sequence."""
    mx.random.seed(11)
    steps = generate_step(mx.array(prompt), model, max_tokens=num_tokens, **options)
    return [token for token, _ in steps]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def oracle_step(base, flash, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities after ``tokens`` and which tokens are probed, ``(V,)``.

    The hidden state is the base model's own.
    """
    hidden = base.model(mx.array([tokens]))[0, -1:]
    logits, is_probed = flash_logits(flash.lm_head, hidden)
    return log_softmax(logits)[0], is_probed[0]


def test_greedy_tokens_and_log_probabilities_match_oracle(base, flash):
    steps = list(generate_step(mx.array(PROMPT), flash, max_tokens=NUM_TOKENS))

    tokens = [token for token, _ in steps]
    assert isinstance(flash.lm_head, FlashHead)
    # A model that repeats itself would test one position over and over.
    assert len(set(tokens)) > NUM_TOKENS // 2
    for count, (token, log_probabilities) in enumerate(steps):
        expected, _ = oracle_step(base, flash, PROMPT + tokens[:count])
        assert token == expected.argmax()
        np.testing.assert_allclose(log_probabilities, expected, atol=2e-4)


def test_log_probabilities_are_normalised_and_reach_every_token(flash):
    steps = list(generate_step(mx.array(PROMPT), flash, max_tokens=4))

    # Read only after the last step: mlx-lm computes them while it goes on.
    log_probabilities = np.array([np.array(values) for _, values in steps])
    assert log_probabilities.shape == (4, 203)
    assert np.isfinite(log_probabilities).all()
    np.testing.assert_allclose(np.exp(log_probabilities).sum(axis=1), 1, rtol=1e-5)


def test_all_clusters_probed_gives_the_base_models_log_probabilities(base, all_probed):
    ours = generate_step(mx.array(PROMPT), all_probed, max_tokens=8)
    theirs = generate_step(mx.array(PROMPT), base, max_tokens=8)

    for (token, actual), (base_token, expected) in zip(ours, theirs, strict=True):
        assert token == base_token
        np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"temp": 0.0},
        {"temp": 0.8},
        {"temp": 1.0, "top_p": 0.9},
        {"temp": 1.0, "top_k": 5},
        {"temp": 1.0, "min_p": 0.1},
        {"temp": 1.0, "xtc_probability": 0.7, "xtc_threshold": 0.05},
    ],
    ids=["greedy", "temperature", "top-p", "top-k", "min-p", "xtc"],
)
def test_samplers_draw_the_base_models_tokens(base, flash, all_probed, options):
    expected = generated(base, sampler=make_sampler(**options))

    assert generated(all_probed, sampler=make_sampler(**options)) == expected
    # With few probes the tokens may be others, but must come and be reproducible.
    few = generated(flash, sampler=make_sampler(**options))
    assert len(few) == NUM_TOKENS
    assert generated(flash, sampler=make_sampler(**options)) == few
    if options["temp"]:
        assert expected != generated(base)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"logit_bias": {40: 12.0, 41: -12.0}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_logits_processors_act_as_on_the_base_model(base, all_probed, options):
    expected = generated(base, logits_processors=make_logits_processors(**options))

    actual = generated(all_probed, logits_processors=make_logits_processors(**options))

    assert actual == expected
    assert actual != generated(base)


def test_penalty_reaches_tokens_that_are_not_probed(flash):
    # Every token of the vocabulary must come once before any comes again.
    penalty = make_logits_processors(presence_penalty=1e4, presence_context_size=999)

    tokens = generated(flash, PROMPT, 203 - 6, logits_processors=penalty)

    assert sorted(PROMPT + tokens) == list(range(203))


def test_logit_bias_forces_a_token_that_is_not_probed(base, flash):
    log_probabilities, is_probed = oracle_step(base, flash, PROMPT)
    token = int(np.where(is_probed, np.inf, log_probabilities).argmin())
    forced = make_logits_processors(logit_bias={token: 200.0})

    tokens = generated(flash, num_tokens=1, logits_processors=forced)

    assert not is_probed[token]
    assert tokens == [token]


def test_prompt_cache_is_saved_loaded_and_continued(flash, tmp_path):
    expected = generated(flash)
    cache = make_prompt_cache(flash)
    first = generated(flash, num_tokens=7, prompt_cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)

    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    # The cache holds all but the last token: mlx-lm computes one step ahead.
    rest = generated(flash, [expected[7]], NUM_TOKENS - 8, prompt_cache=loaded)

    assert first + [expected[7]] + rest == expected


@pytest.mark.parametrize(
    "options",
    [
        {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0},
        {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 12},
        {"prefill_step_size": 2},
    ],
    ids=["8-bit", "4-bit from token 12", "prefill by two"],
)
def test_kinds_of_cache(base, flash, all_probed, options):
    expected = generated(base, **options)

    assert generated(all_probed, **options) == expected
    assert len(generated(flash, **options)) == NUM_TOKENS


def test_rotating_cache(base, flash, all_probed):
    def of_twelve_tokens(model) -> list[int]:
        cache = [RotatingKVCache(max_size=12, keep=4) for _ in model.layers]
        return generated(model, prompt_cache=cache)

    expected = of_twelve_tokens(base)

    assert of_twelve_tokens(all_probed) == expected
    assert len(of_twelve_tokens(flash)) == NUM_TOKENS
    assert expected != generated(base)


def test_batch_generate_equals_single_generation(flash, folder):
    tokenizer = mlx_lm.load(str(folder), lazy=True)[1]
    # Three positions a step: within the limit of six, so that each is probed.
    prompts = [PROMPT, [5, 100, 7], [44, 45, 46, 47, 48, 49, 50, 51]]

    response = batch_generate(
        flash, tokenizer, prompts, max_tokens=NUM_TOKENS, return_token_ids=True
    )

    for prompt, tokens in zip(prompts, response.token_ids, strict=True):
        expected = generated(flash, prompt)
        ends = [i for i, t in enumerate(expected) if t in tokenizer.eos_token_ids]
        assert tokens == expected[: ends[0] if ends else None]


def test_large_batches_take_the_dense_path(base, flash, tiny_llama):
    tokenizer = mlx_lm.load(str(tiny_llama), lazy=True)[1]
    prompts = [[i, 2 * i, 3 * i] for i in range(1, 9)]
    options = {"max_tokens": 8, "return_token_ids": True}

    ours = batch_generate(flash, tokenizer, prompts, **options)

    theirs = batch_generate(base, tokenizer, prompts, **options)
    # Sequences end one by one; up to the first end all eight are in the batch.
    shortest = min(len(tokens) for tokens in theirs.token_ids)
    for actual, expected in zip(ours.token_ids, theirs.token_ids, strict=True):
        assert actual[:shortest] == expected[:shortest]


@pytest.mark.parametrize(
    ("target", "draft"),
    [("flash", "base"), ("base", "flash"), ("flash", "flash"), ("flash", "all_probed")],
)
def test_speculative_decoding_is_greedy_decoding_of_the_target(
    target, draft, base, flash, all_probed
):
    named = {"base": base, "flash": flash, "all_probed": all_probed}
    models = [named[name] for name in (target, draft)]

    steps = speculative_generate_step(
        mx.array(PROMPT), *models, num_draft_tokens=3, max_tokens=NUM_TOKENS
    )

    tokens, _, is_drafted = zip(*steps, strict=True)
    assert list(tokens) == generated(models[0])
    assert any(is_drafted)


def test_scoring_a_text_gives_the_base_models_log_likelihood(base, flash):
    # What mlx_lm.evaluate and mlx_lm.perplexity do: one call for a whole text.
    tokens = mx.random.randint(0, 203, (3, 20), key=mx.random.key(0))

    ours, theirs = (np.array(model(tokens)) for model in (flash, base))

    np.testing.assert_allclose(log_softmax(ours), log_softmax(theirs), atol=1e-4)


def test_decoding_step_neither_evaluates_nor_copies_to_the_host(flash):
    # While compile traces, MLX refuses to evaluate or to hand values to the host.
    # The trace itself is not run: building C++ for it takes a minute on a CPU.
    traced = mx.compile(lambda ids: flash(ids))(mx.array([[17]]))

    assert traced.shape == (1, 1, 203)


def test_distributed_load_gives_the_same_logits(flash, folder):
    # It builds the model once before it has weights.
    sharded, _ = sharded_load(str(folder))
    token_ids = mx.array([[3, 7, 1]])

    assert mx.array_equal(sharded(token_ids), flash(token_ids))
