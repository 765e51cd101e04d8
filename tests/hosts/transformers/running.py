"""How the tests run a model: prompts in, tokens out. QUIRE_HOSTS_DEVICE=cuda does it on a GPU."""

import os

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

PAD = 2
DEVICE = os.environ.get("QUIRE_HOSTS_DEVICE", "cpu")


def tensor(values):
    return torch.tensor(values, device=DEVICE)


def greedy(new_tokens):
    return GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=PAD
    )


def generate_alone(model, prompts, new_tokens):
    """Tokens and logits of each prompt, one at a time: no padding, no batch."""
    tokens, logits = [], []
    for prompt in prompts:
        out = model.generate(
            tensor([prompt]), generation_config=greedy(new_tokens),
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        tokens.append(out.sequences[0, len(prompt) :].tolist())
        logits.append(torch.cat(out.logits).cpu())
    return tokens, logits


def generate_padded(model, prompts, new_tokens, **other):
    """The same of all prompts in one batch, padded on the left."""
    longest = max(len(p) for p in prompts)
    ids = tensor([[PAD] * (longest - len(p)) + p for p in prompts])
    mask = tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids, attention_mask=mask, generation_config=greedy(new_tokens),
        output_logits=True, return_dict_in_generate=True, **other,
    )  # fmt: skip
    return out.sequences[:, longest:].tolist(), list(torch.stack(out.logits, 1).cpu())


def generate_batch(model, prompts, new_tokens, **config):
    """Tokens of generate_batch(), and their log probabilities.

    It leaves results out where attention raises an error.
    """
    config = {
        "page_size": 16, "num_blocks": 256, "max_memory_percent": 0.2, "return_logprobs": True,
        **config,
    }  # fmt: skip
    out = model.generate_batch(
        inputs=prompts, generation_config=greedy(new_tokens),
        continuous_batching_config=ContinuousBatchingConfig(**config), progress_bar=False,
    )  # fmt: skip
    requests = sorted(out.values(), key=lambda r: int(r.request_id.rsplit("_", 1)[-1]))
    assert [r.error for r in requests] == [None] * len(prompts)
    assert [len(r.generated_tokens) for r in requests] == [new_tokens] * len(prompts)
    return [list(r.generated_tokens) for r in requests], [
        torch.tensor(r.logprobs) for r in requests
    ]


def check_logits(actual, expected, rtol=2e-5):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert torch.isfinite(a).all()
        assert (a - e).norm() <= rtol * e.norm()


def check_batch(actual, expected):
    """Of generate_batch() against generate_alone()."""
    (tokens, logprobs), (expected_tokens, logits) = actual, expected
    for t, p, row in zip(expected_tokens, logprobs, logits, strict=True):
        expected_logprobs = row.log_softmax(-1).gather(1, torch.tensor(t)[:, None])[:, 0]
        torch.testing.assert_close(p, expected_logprobs, rtol=1e-4, atol=1e-4)
    assert tokens == expected_tokens
