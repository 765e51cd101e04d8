"""What register() changes in transformers, and what it refuses."""

import pytest
import quire_attn.transformers as adapter
import transformers
from conftest import IMPLEMENTATION
from transformers import modeling_flash_attention_utils as flash_utils


def test_other_implementations_are_loaded_as_before():
    with pytest.raises(Exception, match="flash_attention_3|flash_attn_interface|kernels"):
        flash_utils._lazy_imports("flash_attention_3")


def test_models_without_support_for_flash_attention_are_refused():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16
    )
    with pytest.raises(ValueError, match="T5.* does not support FlashAttention"):
        transformers.AutoModel.from_config(config, attn_implementation=IMPLEMENTATION)


def test_models_that_run_on_their_own_kernels_are_refused():
    class Sparse(transformers.LlamaForCausalLM):
        _compatible_flash_implementations = ["SomeOrganisation/sparse"]

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, attn_implementation=IMPLEMENTATION,
    )  # fmt: skip
    with pytest.raises(ValueError, match="its own kernels only"):
        Sparse(config)


@pytest.mark.parametrize("version", ["5.17.1", "5.25.0", "6.0.0.dev0"])
def test_other_versions_are_warned_of(version):
    with pytest.warns(UserWarning, match=r"5\.18, 5\.23, 5\.24; this is " + version):
        adapter._warn_if_untested(version)


@pytest.mark.parametrize("version", ["5.18.0", "5.20.3", "5.24.9"])
def test_versions_between_the_tested_ones_are_not(version, recwarn):
    adapter._warn_if_untested(version)
    assert not recwarn.list
