"""Small models that are made by their configuration, for the attention of other families."""

import json
import shutil
from pathlib import Path

_COMMON = {
    "vocab_size": 49152,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "dtype": "float32",
    "torch_dtype": "float32",
}

# Windows of 64 and 128 tokens, shorter than the long prompts of cases.py; what each is for:
TINY = {
    "llama": {  # one layer: its keys and values are the same, to the bit, before they are rounded
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "gemma2": {  # soft cap, windows in every other layer
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": 64,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    },
    "gemma3": {  # six groups of layers whose caches lie over each other
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "sliding_window": 64,
        "query_pre_attn_scalar": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
    "bloom": {  # ALiBi
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": 256,
        "n_layer": 2,
        "n_head": 4,
    },
    "gpt-oss": {  # sinks, a window in every other layer
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_act": "silu",
        "rope_theta": 150000,
    },
    "bert": {  # attention of an encoder, without a cache
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
    },
}


def make(folder, name, tokenizer_from):
    """Writes the model's configuration, and another model's tokenizer."""
    target = Path(folder, f"tiny-{name}")
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps({**TINY[name], **_COMMON}, indent=1))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer_from, file), target)
    return target
