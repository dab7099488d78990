"""Which tokens are pinned and which an id-based prior skips."""

from types import SimpleNamespace

import mlx_lm
import pytest
import tiny

from mlx_flashhead.vocabulary import read_vocabulary

NAMES = {
    0: "<pad>",
    1: "<eos>",
    2: "<bos>",
    3: "<unused0>",
    4: "<0x0A>",
    5: "<0xfF>",
    6: "the",
    7: "unused",
    8: "<|reserved_special_token_7|>",
    9: "<|im_end|>",
    10: "<tool>",
    11: "<0x0AB>",
}
ADDED = {0: True, 1: True, 2: True, 3: False, 8: True, 9: True, 10: False}


def fake_tokenizer(**changes) -> SimpleNamespace:
    """A tokenizer with what ``read_vocabulary`` asks for."""
    values = {
        "get_vocab": lambda: {name: i for i, name in NAMES.items()},
        "added_tokens_decoder": {
            i: SimpleNamespace(special=special) for i, special in ADDED.items()
        },
        "all_special_ids": [0, 1, 2],
        "eos_token_ids": {1},
    }
    return SimpleNamespace(**values | changes)


def test_ends_and_special_tokens_are_pinned_reserved_ones_are_not():
    vocabulary = read_vocabulary(fake_tokenizer(), 12)

    assert vocabulary.pinned == {0, 1, 2, 9}


def test_special_byte_and_unused_tokens_are_unlikely():
    vocabulary = read_vocabulary(fake_tokenizer(), 12)

    # "unused" is an ordinary word, <0x0AB> no byte, <tool> not special.
    assert vocabulary.unlikely == {0, 1, 2, 3, 4, 5, 8, 9}


@pytest.mark.parametrize("ends", [{7}, {7, 6}, {8}])
def test_every_end_of_sequence_is_pinned(ends):
    vocabulary = read_vocabulary(fake_tokenizer(eos_token_ids=ends), 12)

    assert vocabulary.pinned == {0, 1, 2, 9} | ends


def test_rows_beyond_the_tokenizer_are_unlikely_and_not_pinned():
    vocabulary = read_vocabulary(fake_tokenizer(), 15)

    assert {12, 13, 14} <= vocabulary.unlikely
    assert not {12, 13, 14} & vocabulary.pinned


def test_tokens_beyond_the_head_are_left_out():
    vocabulary = read_vocabulary(fake_tokenizer(eos_token_ids={1, 11}), 9)

    assert vocabulary.pinned == {0, 1, 2}
    assert max(vocabulary.unlikely) < 9


def test_a_tokenizer_of_transformers_has_one_end():
    tokenizer = fake_tokenizer(eos_token_id=6)
    del tokenizer.eos_token_ids

    assert read_vocabulary(tokenizer, 12).pinned == {0, 1, 2, 6, 9}


def test_a_tokenizer_without_an_end_has_special_tokens_only():
    tokenizer = fake_tokenizer(eos_token_id=None)
    del tokenizer.eos_token_ids

    assert read_vocabulary(tokenizer, 12).pinned == {0, 1, 2, 9}


def test_the_tokenizer_of_mlx_lm_tells_its_ends(tmp_path):
    folder = tiny.write_folder(tmp_path / "model", eos_token_id=[tiny.EOS, 77])
    _, tokenizer = mlx_lm.load(str(folder))

    vocabulary = read_vocabulary(tokenizer, tiny.VOCAB_SIZE)

    assert vocabulary.pinned == {*tiny.SPECIAL_TOKENS, 77}
    # The last three rows have no token.
    assert vocabulary.unlikely == {*tiny.SPECIAL_TOKENS, 200, 201, 202}
