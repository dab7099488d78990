"""SmolLM2, converted, in mlx-lm's commands."""

import json

import mlx_lm
import numpy as np
import pytest
import real_model
from real_model import run_mlx_lm

from mlx_flashhead.head import FlashHead


def test_generate_prints_nothing_that_plain_mlx_lm_would_not(
    smollm2_flashhead, smollm2_4bit
):
    real_model.check_generate(smollm2_flashhead, smollm2_4bit)


def test_chat_answers(smollm2_flashhead):
    real_model.check_chat(smollm2_flashhead)


def test_batch_generate_gives_each_prompt_its_tokens(smollm2_flashhead):
    real_model.check_batch(smollm2_flashhead)


@pytest.mark.slow
def test_all_clusters_probed_gives_the_plain_models_200_tokens(smollm2_4bit):
    real_model.check_all_probed(smollm2_4bit)


def test_text_ends_where_the_model_ends_it(smollm2_flashhead, monkeypatch):
    # The end-of-sequence token is pinned: a head that missed it would never stop.
    model, tokenizer = mlx_lm.load(str(smollm2_flashhead))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    def answer() -> tuple[str, str]:
        *parts, last = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=60)
        return "".join(part.text for part in parts), last.finish_reason

    probed = answer()
    monkeypatch.setattr(FlashHead, "logits", FlashHead.dense_logits)

    assert probed[1] == "stop"
    assert probed == answer()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_benchmark_accepts_a_converted_folder(tiny_single_rows, batch_size):
    options = ("-p", 8, "-g", 4, "-n", 1, "-b", batch_size)

    finished = run_mlx_lm("benchmark", "--model", tiny_single_rows, *options)

    assert "generation_tps=" in finished.stdout


def test_evaluate_scores_as_the_base_model_does(tiny_llama, tiny_flashhead):
    pytest.importorskip("lm_eval")
    from mlx_lm.evaluate import MLXLM

    texts = [[5, 90, 33, 17, 4], [9, 8, 7]]

    ours, theirs = (
        MLXLM(str(folder), use_chat_template=False)._score_fn(texts)[0]
        for folder in (tiny_flashhead, tiny_llama)
    )

    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_cache_prompt_and_generate_from_it(tiny_single_rows, tmp_path):
    cache = tmp_path / "prompt.safetensors"
    base = json.loads((tiny_single_rows / "config.json").read_text("utf-8"))
    model = ("--model", tiny_single_rows)

    run_mlx_lm("cache_prompt", *model, "--prompt", "abc", "--prompt-cache-file", cache)
    finished = run_mlx_lm(
        "generate", *model, "--prompt-cache-file", cache, "-p", "d", "-m", 4
    )

    assert base["model_type"] == "flashhead"
    assert "Generation: 4 tokens" in finished.stdout
