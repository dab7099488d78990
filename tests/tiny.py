"""Tiny random models of many architectures, saved as mlx-lm folders.

Dimensions are distinct wherever an architecture allows it, and the vocabulary is no
multiple of a cluster size.
"""

import json
import string
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import _get_classes
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

VOCAB_SIZE, HIDDEN_SIZE = 203, 64
UNK, BOS, EOS, END_OF_TURN = 0, 1, 5, 198
SPECIAL_TOKENS = {UNK: "<unk>", BOS: "<s>", EOS: "</s>", END_OF_TURN: "<|end|>"}
# An ordinary word to the tokenizer; generation_config.json may name it as an end.
EOS_BY_CONFIG = 105

_BASE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "head_dim": 24,
    "attention_bias": False,
    "mlp_bias": False,
    "eos_token_id": EOS,
}
_MOE = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}
_GEMMA4 = {
    "model_type": "gemma4_text",
    "global_head_dim": 40,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_theta": 10000.0},
    },
}
_LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 3,
    "full_attention_interval": 2,
}
_SPECIFIC = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": _MOE,
    "qwen3_5": {**_LINEAR_ATTENTION, "head_dim": 32},
    "gemma": {},
    # Caps that the logits of a random model reach.
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
    "phi3": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo2": {},
    "granite": {
        "logits_scaling": 3.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
    },
    "cohere2": {
        "head_dim": 16,
        "logit_scale": 0.25,
        "layer_norm_eps": 1e-5,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
    },
    "exaone4": {
        "rope_scaling": None,
        "sliding_window": 8,
        "sliding_window_pattern": "LG",
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm4": {"partial_rotary_factor": 0.5},
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": HIDDEN_SIZE,
        "block_ff_dim": 80,
        "block_multiple_of": 4,
        "block_ffn_dim_multiplier": 2,
        "block_auto_adjust_ff_dim": True,
        "layer_types": ["full_attention", "conv"],
    },
    "gpt_oss": {
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v3": {
        "moe_intermediate_size": 40,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "kv_lora_rank": 20,
        "q_lora_rank": 28,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 20,
    },
    "mamba2": {
        "num_heads": 8,
        "head_dim": 16,
        "intermediate_size": 128,
        "state_size": 20,
        "layer_norm_epsilon": 1e-4,
        "conv_kernel": 3,
        "n_groups": 4,
        "use_bias": False,
        "use_conv_bias": False,
        "time_step_limit": [0.01, 10.0],
        "time_step_rank": "auto",
    },
    "gpt2": {
        "n_ctx": 512,
        "n_embd": HIDDEN_SIZE,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
    },
    # A head with a bias.
    "phi": {"num_key_value_heads": 4, "layer_norm_eps": 1e-5},
    "gptj": {
        "n_embd": HIDDEN_SIZE,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 512,
        "rotary_dim": 8,
    },
    "seed_oss": {},
}


def model_config(model_type: str, *, tied: bool = True) -> dict:
    """Return the ``config.json`` of a tiny model."""
    tie = {"tie_word_embeddings": tied}
    if model_type in ("gemma3", "gemma4"):
        inner = "gemma3_text" if model_type == "gemma3" else "gemma4_text"
        specific = _SPECIFIC[inner] if model_type == "gemma3" else _GEMMA4
        text_config = {**_BASE, **specific, **tie, "model_type": inner}
        return {
            "model_type": model_type,
            "vocab_size": VOCAB_SIZE,
            "text_config": text_config,
            "eos_token_id": EOS,
        }
    return {**_BASE, **tie, **_SPECIFIC[model_type], "model_type": model_type}


def write_folder(
    folder: Path,
    model_type: str = "llama",
    *,
    tied: bool = True,
    dtype: mx.Dtype = mx.float32,
    num_shards: int = 1,
    **changes,
) -> Path:
    """Write a tiny model with its tokenizer; ``changes`` go to its ``config.json``."""
    config = {**model_config(model_type, tied=tied), **changes}
    folder.mkdir(parents=True)
    write_weights(folder, random_weights(config, dtype), num_shards)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    write_tokenizer(folder)
    return folder


def random_weights(config: dict, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    """Return random weights by name, as mlx-lm itself would save them."""
    mx.random.seed(7)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))

    def cast(path: str, array: mx.array) -> mx.array:
        if path.endswith("lm_head.bias"):
            array = mx.random.normal(array.shape)
        return array.astype(dtype)

    # A tied model may keep an untied head until sanitize takes it out.
    kept = tree_map_with_path(cast, model.parameters())
    weights = dict(tree_flatten(kept))
    if tied_by_absence(config):
        weights = {k: v for k, v in weights.items() if "lm_head" not in k}
    return weights


def tied_by_absence(config: dict) -> bool:
    """Whether a model is tied exactly if its checkpoint has no head (gemma3)."""
    text = config.get("text_config", config)
    return text["model_type"] == "gemma3_text" and text["tie_word_embeddings"]


def write_weights(
    folder: Path, weights: dict[str, mx.array], num_shards: int = 1
) -> None:
    """Save weights as one file or as several with an index."""
    names = sorted(weights)
    index = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        if num_shards == 1:
            file = "model.safetensors"
        part = {name: weights[name] for name in names[shard::num_shards]}
        index |= dict.fromkeys(part, file)
        mx.save_safetensors(str(folder / file), part, metadata={"format": "mlx"})
    if num_shards > 1:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text, "utf-8")


def read_weights(folder: Path) -> dict[str, mx.array]:
    """Return all arrays of a folder by name."""
    weights = {}
    for file in folder.glob("model*.safetensors"):
        weights |= mx.load(str(file))
    return weights


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of words and characters, with four special tokens.

    It has fewer tokens than the head has rows, as many real ones do.
    """
    names = dict(SPECIAL_TOKENS)
    free = (i for i in range(VOCAB_SIZE - 3) if i not in names)
    characters = string.ascii_letters + string.digits + string.punctuation
    names |= {next(free): character for character in characters}
    names |= {i: f"word{i}" for i in free}
    vocab = {name: i for i, name in sorted(names.items())}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL_TOKENS[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True) for name in SPECIAL_TOKENS.values()]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": SPECIAL_TOKENS[UNK],
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[EOS],
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def edit_config(folder: Path, change) -> None:
    """Apply ``change``, a function of the parsed ``config.json``, to a folder."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    change(config)
    path.write_text(json.dumps(config), "utf-8")


def head_calls(monkeypatch, vocab_size: int = VOCAB_SIZE) -> list[mx.array]:
    """Record what reaches any dense layer as wide as the vocabulary."""
    calls: list[mx.array] = []
    for layer, method in (
        (nn.Linear, "__call__"),
        (nn.Embedding, "as_linear"),
        (nn.QuantizedLinear, "__call__"),
        (nn.QuantizedEmbedding, "as_linear"),
    ):
        project = getattr(layer, method)

        def record(module, hidden, project=project):
            if len(module.weight) == vocab_size:
                calls.append(hidden)
            return project(module, hidden)

        monkeypatch.setattr(layer, method, record)
    return calls
