"""What is in a converted folder, and whether it is the source's."""

import json

import mlx.core as mx
import numpy as np
import tiny


def bits_of(array: mx.array) -> tuple:
    """Return what two arrays must share to be the same bit for bit."""
    return array.dtype, array.shape, bytes(memoryview(array.view(mx.uint8)))


def split(folder) -> tuple[dict, dict]:
    """Return a folder's arrays: those of the head, without its path, and the rest."""
    path = json.loads((folder / "config.json").read_text())["flashhead"]["head_path"]
    arrays = tiny.read_weights(folder)
    head = {
        name.removeprefix(f"{path}."): array
        for name, array in arrays.items()
        if name.startswith(f"{path}.")
    }
    return head, {n: a for n, a in arrays.items() if not n.startswith(f"{path}.")}


def assert_moved(head: dict, rows: dict) -> None:
    """Assert that a head holds ``rows`` (by name, in token order) bit for bit."""
    assert {"weight", "scales", "biases"} & set(head) == set(rows)
    if "token_slots" not in head:
        assert_same({name: head[name] for name in rows}, rows)
        return
    slots = np.array(head["token_slots"])
    tokens = np.array(head["cluster_tokens"]).reshape(-1)
    assert sorted(tokens[slots]) == list(range(tiny.VOCAB_SIZE))
    assert np.array_equal(tokens[slots], np.arange(tiny.VOCAB_SIZE))
    padding = np.setdiff1d(np.arange(len(tokens)), slots)
    assert (tokens[padding] == tiny.VOCAB_SIZE).all()
    for name, array in rows.items():
        assert bits_of(head[name][mx.array(slots)]) == bits_of(array), name
        if len(padding):
            assert not head[name][mx.array(padding)].any(), name


def assert_same(arrays: dict, expected: dict) -> None:
    assert sorted(arrays) == sorted(expected)
    for name, array in arrays.items():
        assert bits_of(array) == bits_of(expected[name]), name


def head_name(tied: bool) -> str:
    return "model.embed_tokens" if tied else "lm_head"
