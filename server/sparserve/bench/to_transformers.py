"""A model in memory as transformers' own module: a rival in benchmarks, and the way to a folder."""

from __future__ import annotations

from typing import Any

from sparserve.errors import ConfigError
from sparserve.model.loader import LoadedModel
from sparserve.model.weights import HF_NAMES, layer_shapes


def to_transformers(model: LoadedModel) -> Any:
    """The same weights (shared, not copied) in transformers' own module.

    Raises ConfigError, or UnsupportedModel as `ModelConfig.to_hf`.
    """
    import transformers  # seconds, which only this needs

    transformers.utils.logging.set_verbosity_error()
    config, weights = model.config, model.weights
    if weights.rope_factors is not None:
        raise ConfigError(
            "GGUF files with rope_freqs have no counterpart in transformers; --peers none"
        )
    if config.sliding_layers or config.rope.kind == "dynamic":
        raise ConfigError(
            "models with a sliding window or dynamic RoPE are not compared; --peers none"
        )
    kind = getattr(transformers, config.architecture)
    hf_config = kind.config_class.from_dict(config.to_hf() | {"dtype": weights.dtype})
    module = kind(hf_config).eval()
    tensors = {HF_NAMES.embedding: weights.embedding, HF_NAMES.norm: weights.norm}
    tensors[HF_NAMES.lm_head] = weights.lm_head
    for index, layer in enumerate(weights.layers):
        tensors |= {
            HF_NAMES.layer[field].format(i=index): getattr(layer, field)
            for field in layer_shapes(config, index)
        }
    module.load_state_dict({k: v.to(weights.dtype) for k, v in tensors.items()}, assign=True)
    return module
