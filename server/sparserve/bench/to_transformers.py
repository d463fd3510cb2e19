"""A model in memory as transformers' own module: a rival in benchmarks, and the way to a folder."""

from __future__ import annotations

from typing import Any

from sparserve.errors import ConfigError
from sparserve.model.loader import LoadedModel
from sparserve.model.rope import RopeConfig
from sparserve.model.weights import HF_NAMES, layer_shapes


def to_transformers(model: LoadedModel) -> Any:
    """The same weights (shared, not copied) in transformers' own module. Raises ConfigError."""
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
    hf_config = kind.config_class(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=_rope_parameters(config.rope),
        attention_bias=config.output_bias,
        sliding_window=None,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=list(config.eos_token_ids) or None,
        dtype=weights.dtype,
    )
    module = kind(hf_config).eval()
    tensors = {HF_NAMES.embedding: weights.embedding, HF_NAMES.norm: weights.norm}
    tensors[HF_NAMES.lm_head] = weights.lm_head
    for index, layer in enumerate(weights.layers):
        tensors |= {
            HF_NAMES.layer[field].format(i=index): getattr(layer, field)
            for field in layer_shapes(config)
        }
    module.load_state_dict({k: v.to(weights.dtype) for k, v in tensors.items()}, assign=True)
    return module


def _rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind == "llama3":
        parameters |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    if rope.kind == "yarn":
        parameters |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.attention_factor,
            "truncate": rope.truncate,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    return parameters
