"""Weights for the models of models.py: a loader for vLLM."""

import zlib

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader


@register_model_loader("seeded")
class SeededLoader(BaseModelLoader):
    """Weights that depend on the parameter's name only, so large that attention has peaks."""

    def download_model(self, model_config):
        """Nothing to download."""

    def load_weights(self, model, model_config):
        """Norms around 1; matrices so that a layer keeps the size of what it gets."""
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name.lower() or ".ln_" in name:
                noise = noise * 0.1 + ("bias" not in name)
            elif parameter.dim() >= 2:
                noise *= 2.0 / parameter.shape[-1] ** 0.5
            elif "sinks" in name:
                noise = noise.bfloat16()
            parameter.data.copy_(noise)
