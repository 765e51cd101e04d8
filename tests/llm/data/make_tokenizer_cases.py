"""Makes tokenizer_cases.json: tokens and pre-tokenizer pieces by an independent implementation.

    python -m venv venv && venv/bin/pip install tokenizers gguf numpy torch transformers
    venv/bin/python make_tokenizer_cases.py MODEL.gguf > tokenizer_cases.json

Tokens: Hugging Face `tokenizers` over the vocabulary of the GGUF file, set up as in SmolLM2's own
tokenizer.json. Pieces: its Split pre-tokenizer (Oniguruma) with the patterns of the tokenizer.json
files of Llama 3 and Qwen2, its ByteLevel one for GPT-2, and Digits before that for SmolLM2.
"""

import json
import sys

import tokenizers
from gguf import GGUFReader
from make_greedy_tokens import make_tokenizer
from tokenizers import Regex, pre_tokenizers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEXTS = [
    "",
    "Hello, world!",
    "  leading and trailing  ",
    "I'm sure they'll say it's we've DON'T I'LL",
    "1234567 tokens, 3.14159 and 2nd; ½ Ⅷ ٣",
    "tabs\tand\nnew lines\r\n\r\n  indented\n\n\n",
    "def f(x):\n    return x ** 2  # square\n",
    "Über Käse, naïve café, Straße",
    "日本語のテキスト、中文文本, 한국어",
    "emoji 🙂👩‍👩‍👧 and flags 🇩🇪",
    "a\u00a0b\u2003c\u2028d\u3000e\u0085f",
    "accents e\u0301 combining, Ελληνικά, кириллица, العربية, हिन्दी",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!???...---===>>> {[(<>)]} @#$%^&*",
    "mixed123abc456 x1y2 'quoted' \"double\" o'clock",
    "https://example.com/path?query=1&other=two#frag",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "The quick brown fox jumps over the lazy dog. " * 3,
    " ",
    "\n",
    "   \n   x",
    "\u0000\u0001\u007f control",
]
MARKUP = [
    "<|im_start|>user\nHi<|im_end|>\n",
    "<|im_start|><|im_end|><|endoftext|>",
    "not special: <|im_star|> <im_end>",
    "a<|im_end|>b <|im_end|> c",
]


def pieces(name, text):
    split = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
        "smollm": [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ],
        "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated")],
        "qwen2": [pre_tokenizers.Split(Regex(QWEN2), behavior="isolated")],
    }[name]
    spans = pre_tokenizers.Sequence(split).pre_tokenize_str(text)
    return [text[begin:end] for _, (begin, end) in spans]


def main():
    tokenizer = make_tokenizer(GGUFReader(sys.argv[1]))
    names = ["smollm", "gpt-2", "llama-bpe", "qwen2"]
    document = {
        "made_by": f"make_tokenizer_cases.py: tokenizers {tokenizers.__version__}",
        "model": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "tokens": [{"text": t, "ids": tokenizer.encode(t).ids} for t in TEXTS + MARKUP],
        "pieces": {n: [{"text": t, "pieces": pieces(n, t)} for t in TEXTS] for n in names},
    }
    json.dump(document, sys.stdout, ensure_ascii=True, indent=1)
    print()


if __name__ == "__main__":
    main()
