"""A real model, SmolLM2 in fp32, against transformers' sdpa."""

import pytest
import torch
import transformers
from conftest import IMPLEMENTATION
from running import (
    check_batch,
    check_logits,
    generate_alone,
    generate_batch,
    generate_padded,
    greedy,
)

NEW_TOKENS = 12
STORY = (
    "Once upon a time there was a small robot who lived in a library. Every day it sorted the "
    "books by colour, by size, and by the number of times the word river appeared. "
) * 4
TEXTS = [
    "The capital of France is",
    "Write a haiku about the sea.",
    STORY[:200] + " Item 1:",
    STORY[:297] + " Item 2:",  # shares pages with the last
    STORY + " Item 3:",
    "In 1969, the first human landed on the",
]


def load(folder, implementation):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=implementation
    ).eval()


@pytest.fixture(scope="module")
def prompts(model_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def expected(model_folder, prompts):
    return generate_alone(load(model_folder, "sdpa"), prompts, NEW_TOKENS)


@pytest.fixture(scope="module")
def model(model_folder, expected):
    return load(model_folder, IMPLEMENTATION)


def test_generate_with_left_padding(model, prompts, expected, calls):
    tokens, logits = generate_padded(model, prompts, NEW_TOKENS)
    assert tokens == expected[0]
    check_logits(logits, expected[1])
    assert sum(calls.values()) == NEW_TOKENS * model.config.num_hidden_layers


def test_generate_without_padding(model, prompts, expected, calls):
    tokens, logits = generate_alone(model, prompts[:2], NEW_TOKENS)
    assert tokens == expected[0][:2]
    check_logits(logits, expected[1][:2])
    assert calls["rows"] == 2 * NEW_TOKENS * model.config.num_hidden_layers


def test_generate_batch(model, prompts, expected, calls):
    """Prompts cut into chunks of 64 tokens and mixed with decodes; common prefixes shared."""
    actual = generate_batch(model, prompts, NEW_TOKENS, max_batch_tokens=64)
    check_batch(actual, expected)
    assert calls["varlen"] > 0
    assert calls["blocks"] == 0


def test_generate_batch_through_block_tables(model, prompts, expected, calls, block_tables_on_cpus):
    actual = generate_batch(
        model, prompts, NEW_TOKENS, max_batch_tokens=256, max_blocks_per_request=32
    )
    check_batch(actual, expected)
    # Once the prompts are in, every step is one new token a request.
    assert calls["blocks"] >= 2 * model.config.num_hidden_layers


def test_prefixes_are_shared(model, prompts, expected):
    """A second run of the same prompts, in a manager that has them cached."""
    config = transformers.generation.configuration_utils.ContinuousBatchingConfig(
        page_size=16, num_blocks=256, max_batch_tokens=128, max_memory_percent=0.2
    )

    with model.continuous_batching_context_manager(
        generation_config=greedy(NEW_TOKENS), continuous_batching_config=config
    ) as manager:
        for _ in range(2):
            ids = [manager.add_request(p, max_new_tokens=NEW_TOKENS) for p in prompts]
            results = {}
            while len(results) < len(prompts):
                result = manager.get_result(timeout=60)
                assert result is not None
                assert result.error is None
                if result.is_finished():
                    results[result.request_id] = list(result.generated_tokens)
            assert [results[i] for i in ids] == expected[0]
