"""What a converted model must do in mlx-lm's commands and for 200 tokens.

The test suite asks it of SmolLM2, ``benchmarks/gemma.py`` of Gemma.
"""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx_lm
import openai
from mlx_lm.generate import batch_generate, generate_step

from mlx_flashhead import replace_head
from mlx_flashhead.attach import find_head
from mlx_flashhead.head import FlashHead

PROMPT = "The capital of France is"
TIMEOUT_SECONDS = 300


def run_mlx_lm(*arguments: object, stdin: str | None = None):
    """Run a command of mlx-lm; return the finished process."""
    return subprocess.run(
        [sys.executable, "-m", "mlx_lm", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=True,
    )


def greedy_tokens(model, token_ids: list[int], num_tokens: int) -> list[int]:
    """Return greedy tokens, past any end of sequence."""
    steps = generate_step(mx.array(token_ids), model, max_tokens=num_tokens)
    return [token for token, _ in steps]


def check_generate(folder: Path, plain: Path) -> None:
    """Assert that ``mlx_lm.generate`` prints what it prints for a plain model."""
    ours, theirs = (
        run_mlx_lm("generate", "--model", model, "-p", PROMPT, "-m", 8)
        for model in (folder, plain)
    )

    _, text, figures = ours.stdout.split("==========\n")
    _, _, plain_figures = theirs.stdout.split("==========\n")
    assert ours.stderr == theirs.stderr
    assert re.sub(r"[\d.]+", "0", figures) == re.sub(r"[\d.]+", "0", plain_figures)
    model, tokenizer = mlx_lm.load(str(folder))
    messages = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=8)
    assert text.strip() == expected.strip()


def check_chat(folder: Path) -> None:
    """Assert that ``mlx_lm.chat`` answers two messages and ends when told to."""
    finished = run_mlx_lm(
        "chat", "--model", folder, "-m", 6, stdin="Hello!\nAnd now?\nq\n"
    )

    model, tokenizer = mlx_lm.load(str(folder))
    messages = [{"role": "user", "content": "Hello!"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=6)
    assert " ".join(expected.split()) in " ".join(finished.stdout.split())
    assert finished.stderr == ""


def check_batch(folder: Path) -> None:
    """Assert that ``batch_generate`` gives each prompt its own tokens."""
    model, tokenizer = mlx_lm.load(str(folder))
    prompts = [tokenizer.encode(text) for text in (PROMPT, "def add(a, b):\n", "One")]

    response = batch_generate(
        model, tokenizer, prompts, max_tokens=6, return_token_ids=True
    )

    for prompt, tokens in zip(prompts, response.token_ids, strict=True):
        assert tokens == greedy_tokens(model, prompt, 6)[: len(tokens)]
        assert len(tokens) == 6 or prompt != prompts[0]


def check_all_probed(plain: Path) -> None:
    """Assert that with every cluster probed 200 greedy tokens are the plain model's."""
    model, tokenizer = mlx_lm.load(str(plain))
    messages = [{"role": "user", "content": "Write a short story about a whale."}]
    token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    vocab_size = find_head(model).rows.num_rows
    expected = greedy_tokens(model, token_ids, 200)
    # Gemma, a base model, soon repeats itself; one token over and over is no text.
    assert len(set(expected)) > 5

    # Clusters of several rows must do so as well; fewer tokens show it.
    for cluster_size, num_tokens in ((1, 200), (512, 50)):
        model, tokenizer = mlx_lm.load(str(plain))
        num_clusters = -(-vocab_size // cluster_size)
        settings = {"cluster_size": cluster_size, "num_probes": num_clusters}
        replace_head(model, tokenizer, calibrate=False, **settings)

        tokens = greedy_tokens(model, token_ids, num_tokens)

        head = next(m for m in model.modules() if isinstance(m, FlashHead))
        assert head.config.num_clusters == num_clusters
        assert tokens == expected[:num_tokens]


@contextmanager
def running_server(folder: Path) -> Iterator[openai.OpenAI]:
    """Run ``mlx_lm.server`` on a free port of this machine; stop it at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--host", "127.0.0.1"]
    server = subprocess.Popen(
        [*command, "--port", str(port), "--model", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, server)
        yield openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key="none",
            timeout=TIMEOUT_SECONDS,
            max_retries=0,
        )
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_for(port: int, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, "mlx_lm.server ended by itself"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError("mlx_lm.server does not listen")


def check_server(folder: Path) -> None:
    """Assert that chat and completion answer, streaming and not, with logprobs."""
    with running_server(folder) as client:
        _check_chat_answers(client, folder)
        _check_completions(client, folder)


def _check_chat_answers(client: openai.OpenAI, folder: Path) -> None:
    chat = {
        "model": "default_model",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 6,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": 3,
    }

    answer = client.chat.completions.create(**chat)
    parts = list(client.chat.completions.create(**chat, stream=True))

    choice = answer.choices[0]
    assert choice.message.content
    assert answer.usage.completion_tokens == len(choice.logprobs.content) == 6
    # mlx-lm names any of the likeliest tokens as the one generated, so ask for the
    # likeliest itself: greedy decoding gives that one.
    greedy = [
        max(t.top_logprobs, key=_log_probability) for t in choice.logprobs.content
    ]
    _, tokenizer = mlx_lm.load(str(folder), lazy=True)
    text = tokenizer.decode([token.id for token in greedy])
    assert text.lstrip() == choice.message.content.lstrip()
    assert all(len(t.top_logprobs) == 3 for t in choice.logprobs.content)
    assert all(token.logprob <= 0 for token in greedy)
    deltas = [part.choices[0].delta.content for part in parts if part.choices]
    assert "".join(filter(None, deltas)) == choice.message.content
    assert len(parts) > 1


def _log_probability(token) -> float:
    return token.logprob


def _check_completions(client: openai.OpenAI, folder: Path) -> None:
    request = {
        "model": "default_model",
        "prompt": PROMPT,
        "max_tokens": 6,
        "temperature": 0.0,
    }

    answer = client.completions.create(**request)
    parts = list(client.completions.create(**request, stream=True))
    token_id = 1000
    biased = client.completions.create(**request, logit_bias={str(token_id): 100})

    model, tokenizer = mlx_lm.load(str(folder))
    tokens = greedy_tokens(model, tokenizer.encode(PROMPT), 6)
    # Some of mlx-lm's detokenizers drop the space that a text starts with.
    assert answer.choices[0].text.lstrip() == tokenizer.decode(tokens).lstrip()
    streamed = [part.choices[0].text for part in parts if part.choices]
    assert "".join(streamed) == answer.choices[0].text
    assert biased.choices[0].text == tokenizer.decode([token_id] * 6)
