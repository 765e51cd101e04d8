"""Makes greedy_tokens.json: what an independent implementation generates from the same weights.

    python -m venv venv && venv/bin/pip install torch transformers gguf
    venv/bin/python make_greedy_tokens.py MODEL.gguf > greedy_tokens.json

The weights are those of the GGUF file, dequantised to float32 by the `gguf` package inside
transformers (which also undoes the permutation of the q and k rows that GGUF files carry).
Prompts are spelled out with the model's chat template by hand and tokenised with the Hugging Face
`tokenizers` library, set up as in the model's own tokenizer.json: transformers' conversion of a
GGUF tokenizer leaves out the single-digit rule. No cache tricks: greedy search in float32 on CPU.
"""

import json
import pathlib
import sys

import tokenizers
import torch
import transformers
from gguf import GGUFReader

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three prime numbers larger than 1234 and say why they're prime.",
    "Translate 'good morning' into Spanish, German and Italian.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Schreibe einen kurzen Satz über Käse. 日本語も🙂",
]
MAX_TOKENS = 48


def make_tokenizer(reader):
    def strings(key):
        field = reader.fields[key]
        return [bytes(field.parts[i]).decode() for i in field.data]

    def numbers(key):
        field = reader.fields[key]
        return [int(field.parts[i][0]) for i in field.data]

    tokens = strings("tokenizer.ggml.tokens")
    types = numbers("tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in strings("tokenizer.ggml.merges")]
    bpe = tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types) if kind == 3]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in special]
    )
    return tokenizer


def main():
    path = pathlib.Path(sys.argv[1])
    tokenizer = make_tokenizer(GGUFReader(path))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).eval()
    eos = tokenizer.token_to_id("<|im_end|>")
    cases = []
    for prompt in PROMPTS:
        text = (
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
            f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer.encode(text).ids
        generated, margins = [], []
        past = None
        step = torch.tensor([ids])
        with torch.no_grad():
            while len(generated) < MAX_TOKENS:
                result = model(step, past_key_values=past, use_cache=True)
                past = result.past_key_values
                best = torch.topk(result.logits[0, -1], 2)
                generated.append(int(best.indices[0]))
                margins.append(float(best.values[0] - best.values[1]))
                if generated[-1] == eos:
                    break
                step = torch.tensor([[generated[-1]]])
        cases.append(
            {
                "prompt": prompt,
                "prompt_tokens": ids,
                "generated_tokens": generated,
                "text": tokenizer.decode(generated),
                "smallest_logit_margin": round(min(margins), 4),
            }
        )
        print(cases[-1]["text"], cases[-1]["smallest_logit_margin"], file=sys.stderr)
    document = {
        "made_by": "make_greedy_tokens.py: transformers "
        f"{transformers.__version__}, torch {torch.__version__}, float32, CPU",
        "model": path.name,
        "max_tokens": MAX_TOKENS,
        "cases": cases,
    }
    json.dump(document, sys.stdout, ensure_ascii=False, indent=1)
    print()


if __name__ == "__main__":
    main()
