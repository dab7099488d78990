"""SmolLM2, converted with default options: its figures, and unseen text."""

import json
import re

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny

from mlx_flashhead.forward import hidden_states

VOCAB_SIZE, HIDDEN_SIZE = 49152, 576
HEAD = "model.embed_tokens"

# Kinds of text of which calibration's prompts and the built-in sample have none.
UNSEEN = (
    "Dear customer, your parcel could not be delivered on Tuesday because nobody was "
    "at home. It is kept at the post office in Mill Lane until the 14th. Please bring "
    "an identity card. If somebody else is to fetch it, sign the form below. Parcels "
    "that are not fetched in time go back to the sender, who pays the costs.",
    "The defendant shall pay the claimant the sum of 4,200 pounds with interest at the "
    "rate of five per cent from the date of this judgment. Each party bears its own "
    "costs of the appeal. The court finds that the contract was concluded orally, and "
    "that neither side has proved the terms which it asserts beyond the price.",
    "SELECT c.name, COUNT(o.id) AS orders, SUM(o.total) AS revenue\nFROM customers c\n"
    "LEFT JOIN orders o ON o.customer_id = c.id\nWHERE o.created_at >= '2023-01-01'\n"
    "GROUP BY c.name\nHAVING SUM(o.total) > 1000\nORDER BY revenue DESC\nLIMIT 20;\n\n"
    "CREATE INDEX orders_by_customer ON orders (customer_id, created_at);\n",
    'package main\n\nimport (\n\t"fmt"\n\t"os"\n)\n\nfunc main() {\n\tif len(os.Args) '
    '< 2 {\n\t\tfmt.Println("usage: greet NAME")\n\t\tos.Exit(1)\n\t}\n\tfor _, name '
    ':= range os.Args[1:] {\n\t\tfmt.Printf("Hello, %s!\\n", name)\n\t}\n}\n',
    "En un pueblo de la costa vivía un pescador que nunca había visto la nieve. Cada "
    "mañana salía al mar antes del amanecer y volvía con la barca llena. Su mujer "
    "vendía el pescado en la plaza y guardaba las monedas en una caja de madera.",
    "W: What will you do if the train is late?\nM: Then we miss the ferry. There is "
    "only one a day.\nW: Could we stay in the village?\nM: The inn shuts in winter, "
    "but my cousin has a room above the bakery. I will call her tonight.\nW: Good. I "
    "will bring bread, and you bring the map.\nM: And the big umbrella!",
)


@pytest.fixture(scope="module")
def card(smollm2_flashhead) -> dict[str, list[float]]:
    """The model card's figures: FlashHead's, then the dense 4-bit head's."""
    text = (smollm2_flashhead / "README.md").read_text("utf-8")
    return {
        name: [float(cell.strip(" %")) for cell in cells.split("|")]
        for name, cells in re.findall(r"^\| ([^|]+) \| ([\d.%| ]+) \|$", text, re.M)
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.fixture(scope="module")
def unseen(smollm2, smollm2_flashhead):
    """Hidden states, the float head's and its 4-bit version's log-probabilities."""
    model, tokenizer = mlx_lm.load(str(smollm2_flashhead))
    states = [
        np.array(hidden_states(model, HEAD, mx.array([tokenizer.encode(text)])))
        for text in UNSEEN
    ]
    hidden = np.vstack(states)
    rows = mx.load(str(smollm2 / "model.safetensors"))[f"{HEAD}.weight"]
    rows = rows.astype(mx.float32)
    rounded = mx.dequantize(*mx.quantize(rows, group_size=64, bits=4), 64, 4)
    dense = (log_softmax(hidden @ np.array(r).T) for r in (rows, rounded))
    return model.model.embed_tokens, hidden, *dense


def test_card_figures_are_those_of_its_files(smollm2_flashhead, card):
    arrays = tiny.read_weights(smollm2_flashhead)
    config = json.loads((smollm2_flashhead / "config.json").read_text())["flashhead"]
    (head_mb, dense_mb) = card["MB of head read per token"]
    (all_mb, plain_mb) = card["MB of all weights"]
    head = {
        name.removeprefix(f"{HEAD}."): array.nbytes
        for name, array in arrays.items()
        if name.startswith(f"{HEAD}.")
    }
    all_bytes = sum(array.nbytes for array in arrays.values())
    # 4 bits and, for each group of 64, a float32 scale and bias.
    dense_bytes = VOCAB_SIZE * HIDDEN_SIZE * (4 / 8 + 2 * 4 / 64)
    plain_bytes = all_bytes - sum(head.values()) + dense_bytes
    row_bytes = (head["weight"] + head["scales"] + head["biases"]) / VOCAB_SIZE
    coarse_bytes = sum(size for name, size in head.items() if "centroids" in name)
    # Six blocks, each of which rounds its share up.
    read_bytes = coarse_bytes + (config["num_probes"] + 3) * row_bytes

    assert all_mb == pytest.approx(all_bytes / 1e6, abs=0.06)
    assert dense_mb == pytest.approx(dense_bytes / 1e6, abs=0.06)
    assert plain_mb == pytest.approx(plain_bytes / 1e6, abs=0.06)
    assert head_mb == pytest.approx(read_bytes / 1e6, abs=0.06)
    assert (config["rows"]["bits"], config["centroids"]["bits"]) == (8, 2)
    assert (config["cluster_size"], config["centroid_dims"]) == (1, 192)


def test_it_beats_the_dense_4_bit_head_in_all_three(card):
    agreement, of_rival = card["agreement with the source's head"]
    assert 93 < agreement <= 100
    assert agreement > of_rival + 10
    divergence, of_rival = card["KL divergence from it, nats"]
    assert 0 < divergence < of_rival / 2
    head_mb, dense_mb = card["MB of head read per token"]
    assert 0 < head_mb < 0.5 * dense_mb


def test_recall_on_unseen_text(unseen):
    head, hidden, truth, _ = unseen

    probed = np.array(head.probed_tokens(mx.array(hidden)))

    is_hit = probed[np.arange(len(hidden)), truth.argmax(axis=1)]
    assert len(hidden) > 500
    assert (probed.sum(axis=1) == head.config.num_probed).all()
    assert is_hit.mean() >= 0.995


def test_it_beats_the_dense_4_bit_head_on_unseen_text(unseen):
    head, hidden, truth, rival = unseen
    some = slice(None, None, 4)

    limit = head.config.max_probed_positions
    part = hidden[some]
    ours = [
        np.array(head.logits(mx.array(part[start : start + limit])))
        for start in range(0, len(part), limit)
    ]

    truth, rival, ours = truth[some], rival[some], log_softmax(np.vstack(ours))
    best = truth.argmax(axis=1)
    agreement = [(h.argmax(axis=1) == best).mean() for h in (ours, rival)]
    kl = [(np.exp(truth) * (truth - h)).sum(axis=1).mean() for h in (ours, rival)]
    assert agreement[0] > 0.93
    assert agreement[0] > agreement[1] + 0.05
    assert kl[0] < kl[1] / 2
