"""Small random models of families whose attention has something of its own, against eager.

Weights are large enough that attention is sharp: a forgotten window, cap or sink changes tokens.
"""

import pytest
import quire_attn.transformers
import torch
import transformers
from conftest import IMPLEMENTATION
from running import (
    DEVICE,
    check_batch,
    check_logits,
    generate_alone,
    generate_batch,
    generate_padded,
    greedy,
    tensor,
)

NEW_TOKENS = 10
CACHE_PADS_ROWS = quire_attn.transformers._functions_write_the_cache()  # up to 5.18
SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "initializer_range": 0.4, "pad_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 20}),
    "gemma2": ("Gemma2Config", {"sliding_window": 24, "attn_logit_softcapping": 4.0,
                                "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gpt-oss": ("GptOssConfig", {"sliding_window": 16, "num_local_experts": 2,
                                 "num_experts_per_tok": 1}),
    # Rows of V are shorter than those of K.
    "mimo-v2": ("MiMoV2FlashConfig", {
        "layer_types": ["full_attention"] * 4, "v_head_dim": 8, "n_routed_experts": 4,
        "num_experts_per_tok": 1, "moe_intermediate_size": 32,
    }),
    "deepseek-v3": ("DeepseekV3Config", {
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "v_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 4,
    }),
}  # fmt: skip
# What transformers' own paged cache cannot hold.
NOT_IN_BATCHES = {"deepseek-v3"} if CACHE_PADS_ROWS else {"deepseek-v3", "mimo-v2"}
LENGTHS = [5, 70, 33, 21]


def build(name, implementation, dtype=torch.float32):
    kind, own = MODELS[name]
    config = getattr(transformers, kind)(**{**SMALL, **own})
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation, dtype=dtype
    ).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=3.0)
    return model.to(DEVICE)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def expected(name, prompts):
    return generate_alone(build(name, "eager"), prompts, NEW_TOKENS)


@pytest.fixture(scope="module")
def model(name):
    return build(name, IMPLEMENTATION)


def test_generate(model, prompts, expected, calls):
    assert model.config._attn_implementation == IMPLEMENTATION
    tokens, logits = generate_padded(model, prompts, NEW_TOKENS)
    check_logits(logits, expected[1])
    assert tokens == expected[0]
    assert sum(calls.values()) == NEW_TOKENS * SMALL["num_hidden_layers"]


def test_generate_batch(name, model, prompts, expected, calls):
    if name in NOT_IN_BATCHES:
        pytest.skip("transformers cannot, with any attention")
    actual = generate_batch(model, prompts, NEW_TOKENS, max_batch_tokens=32)
    check_batch(actual, expected)
    assert calls["varlen"] > 0


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_static_caches_and_beams(name, prompts, calls):
    """Caches of a fixed length, with more rows than tokens; sequences that fork."""
    outputs = []
    for implementation in ("eager", IMPLEMENTATION):
        model = build(name, "eager")
        model.set_attn_implementation(implementation)
        static, _ = generate_padded(
            model, prompts, NEW_TOKENS, cache_implementation="static", disable_compile=True
        )
        beams = model.generate(
            tensor([prompts[1]]), num_beams=3, generation_config=greedy(NEW_TOKENS)
        )
        outputs.append((static, beams.tolist()))
    assert outputs[0] == outputs[1]
    assert sum(calls.values()) == 2 * NEW_TOKENS * SMALL["num_hidden_layers"]


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss"])
def test_bfloat16(name, prompts):
    """As close to fp32 as eager in bf16 is, in the logits of the prompts."""
    exact = build(name, "eager")
    errors = []
    for implementation in ("eager", IMPLEMENTATION):
        model = build(name, implementation, torch.bfloat16)
        exact.load_state_dict({n: w.float() for n, w in model.state_dict().items()})
        with torch.no_grad():
            ids = tensor([prompts[1]])
            expected = exact(ids).logits
            errors.append(float((model(ids).logits - expected).norm() / expected.norm()))
    assert errors[1] <= 1.3 * errors[0]


def test_an_encoder_with_padding(calls):
    """Both ways, padded on the right."""
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, initializer_range=0.4,
    )  # fmt: skip
    ids = torch.arange(3, 43, device=DEVICE).view(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long, device=DEVICE)
    mask[1, 13:] = 0
    outputs = []
    for implementation in ("eager", IMPLEMENTATION):
        torch.manual_seed(7)
        config._attn_implementation = implementation
        model = transformers.BertModel(config).eval().to(DEVICE)
        with torch.no_grad():
            outputs.append(model(ids, attention_mask=mask).last_hidden_state[mask.bool()])
    check_logits(outputs[1:], outputs[:1])
    assert sum(calls.values()) == 2


def test_gradients_are_refused():
    config = transformers.LlamaConfig(**SMALL)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=IMPLEMENTATION
    )
    with pytest.raises(ValueError, match="requires grad"):
        model(torch.arange(3, 9)[None])
