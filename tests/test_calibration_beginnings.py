"""What calibration begins with: prompts, random tokens, windows of given texts."""

from types import SimpleNamespace

import mlx_lm
import numpy as np
import pytest
import tiny
from test_calibration_states import assert_close, read_by_the_model, sampled
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from mlx_flashhead.calibration.beginnings import (
    built_in_prompts,
    encode_prompt,
    random_starts,
)
from mlx_flashhead.calibration.prompts import PROMPTS
from mlx_flashhead.vocabulary import Vocabulary

TEMPLATE = (
    "{% for m in messages %}word120 {{ m['content'] }} <|end|>{% endfor %} word130"
)


def letters(start: tuple[int, ...] = (), has_chat: bool = False) -> SimpleNamespace:
    """Return a tokenizer whose tokens are characters; -1 frames a chat message."""
    return SimpleNamespace(
        encode=lambda text: [*start, *map(ord, text)],
        has_chat_template=has_chat,
        apply_chat_template=lambda messages, add_generation_prompt: [
            -1,
            *map(ord, messages[0]["content"]),
            *[-1] * add_generation_prompt,
        ],
    )


def kind_of(token_ids: list[int]) -> str:
    """Return the kind of a prompt of ``letters``."""
    text = "".join(chr(token) for token in token_ids if token >= 0)
    (kind,) = (kind for kind, texts in PROMPTS.items() if text in texts)
    return kind


@pytest.mark.parametrize("has_chat", [False, True])
def test_chat_messages_are_framed_where_there_is_chat(has_chat):
    tokenizer = letters(has_chat=has_chat)

    message = encode_prompt(tokenizer, "chat_question", "Hi")
    text = encode_prompt(tokenizer, "story", "Hi")

    assert message == ([-1, 72, 105, -1] if has_chat else [72, 105])
    assert text == [72, 105]


@pytest.mark.parametrize("count", [2, 5, 24, 48, 64, 100])
def test_prompts_come_from_all_kinds(count):
    texts, kinds = built_in_prompts(letters(has_chat=True), count)

    assert len(texts) == len(kinds) == count
    of_number = {}
    for text, number in zip(texts, kinds, strict=True):
        of_number.setdefault(int(number), set()).add(kind_of(text))
    # One number a kind, without gaps: what folds are dealt by.
    assert sorted(of_number) == list(range(len(of_number)))
    assert all(len(names) == 1 for names in of_number.values())
    assert len(set().union(*of_number.values())) == len(of_number)
    total = sum(map(len, PROMPTS.values()))
    assert len(of_number) >= min(count, len(PROMPTS)) * 0.8
    assert len(of_number) == len(PROMPTS) or count < total
    assert len(set(map(tuple, texts))) == min(count, total)


@pytest.mark.parametrize(
    ("tokenizer", "start"),
    [
        (letters(), []),
        (letters(start=(7,)), [7]),
        # A model of chat that begins nothing by itself.
        (letters(has_chat=True), [-1, *map(ord, "Write a text."), -1]),
        (letters(start=(7,), has_chat=True), [7]),
    ],
    ids=["plain", "beginning of text", "chat", "both"],
)
def test_random_starts_begin_as_the_model_expects(tokenizer, start):
    vocabulary = Vocabulary(pinned=frozenset({0}), unlikely=frozenset({0, 3, 9}))

    starts = random_starts(tokenizer, vocabulary, 20, 17, seed=0)

    assert all(text[:-1] == start for text in starts)
    assert sorted(text[-1] for text in starts) == [
        token for token in range(20) if token not in (0, 3, 9)
    ]


def test_random_starts_come_over_again_where_there_are_too_few():
    vocabulary = Vocabulary(pinned=frozenset(), unlikely=frozenset({1}))

    starts = random_starts(letters(), vocabulary, 4, 50, seed=0)

    assert {text[-1] for text in starts} == {0, 2, 3}
    first, second = (
        random_starts(letters(), vocabulary, 4, 50, seed=seed) for seed in (0, 1)
    )
    assert starts == first != second


def test_a_chat_models_prompts_are_read_by_the_model(tmp_path, monkeypatch):
    folder = tiny.write_folder(tmp_path / "model", tied=False)
    (folder / "chat_template.jinja").write_text(TEMPLATE)

    found = sampled(folder, monkeypatch, num_positions=2400)

    prompts = [prompt for texts, _ in found.batches[:1] for prompt in texts]
    framed = [prompt for prompt in prompts if prompt[0] == 120]
    assert all(prompt[-1] == 130 for prompt in framed)
    assert 2 <= len(framed) < len(prompts) / 2
    starts = [prompt for texts, _ in found.batches[1:] for prompt in texts]
    assert all(start[0] == 120 and start[-2] == 130 for start in starts)


def test_texts_are_read_in_windows_spread_over_them(tiny_llama, tmp_path):
    random = np.random.default_rng(0)
    _, tokenizer = mlx_lm.load(str(tiny_llama))
    words = [w for w in tokenizer.get_vocab() if w.startswith("word")]
    paths = []
    # Nine windows and a rest of ten tokens; two windows.
    for number, length in enumerate((9 * 64 + 10, 2 * 64)):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_text(" ".join(random.choice(words, length)))
    options = {"texts": paths, "num_positions": 640}

    first, random_set = sampled(tiny_llama, **options).sets

    model, _ = mlx_lm.load(str(tiny_llama))
    ids = [tokenizer.encode(p.read_text(), add_special_tokens=False) for p in paths]
    cuts = [i[at : at + 64] for i in ids for at in range(0, len(i) - 63, 64)]
    assert len(cuts) == 11
    # Five of the eleven, at even distances.
    chosen = [cuts[i] for i in (0, 2, 5, 8, 10)]
    expected = [read_by_the_model(model, cut[:-1]) for cut in chosen]
    assert_close(first.hidden, np.vstack(expected))
    # Neighbours are in one fold.
    folds = first.fold.reshape(5, 63)
    assert (folds == folds[:, :1]).all()
    assert folds[:, 0].tolist() == [0, 0, 1, 2, 3]
    assert len(random_set.hidden) > 64


def test_everything_begins_with_the_beginning_of_text(tmp_path, monkeypatch):
    folder = tiny.write_folder(tmp_path / "model", tied=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", tiny.BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    text = tmp_path / "text"
    text.write_text("word120 word130 " * 64)

    found = sampled(folder, monkeypatch, num_positions=256)
    of_text = sampled(folder, texts=[text], num_positions=256).sets[0]

    prompts = [prompt for texts, _ in found.batches for prompt in texts]
    assert all(prompt[0] == tiny.BOS for prompt in prompts)
    assert {len(texts[0]) for texts, _ in found.batches[1:]} == {2}
    model, _ = mlx_lm.load(str(folder))
    window = read_by_the_model(model, [tiny.BOS, *[120, 130] * 32][:-1])
    assert_close(of_text.hidden, np.vstack([window] * 2))
