"""The systems under measurement: each runs a batch of prompts and says when tokens came."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sparserve.engine.engine import Engine
from sparserve.engine.request import GenerationRequest, SamplingParams, StoppingParams
from sparserve.errors import ConfigError
from sparserve.model.loader import LoadedModel
from sparserve.model.rope import RopeConfig
from sparserve.model.weights import HF_NAMES, layer_shapes

Prompts = Sequence[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Run:
    """One measured batch: seconds from its start."""

    ttft: float  # until every prompt had its first token
    total: float
    new_tokens: int  # over all prompts
    batch: int

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after each prompt's first, over the time after the first tokens."""
        return (self.new_tokens - self.batch) / (self.total - self.ttft)


class System(Protocol):
    name: str

    def run(self, prompts: Prompts, new_tokens: int) -> Run:
        """Generate exactly `new_tokens` greedily for each prompt, all prompts at once."""
        ...


class Sparserve:
    """This project's engine, offline."""

    name = "sparserve"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, prompts: Prompts, new_tokens: int) -> Run:
        start = time.perf_counter()
        stopping = StoppingParams(max_tokens=new_tokens, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            request = GenerationRequest(
                f"bench-{index}", prompt, SamplingParams(temperature=0), stopping
            )
            self._engine.validate(request)
            self._engine.add(request)
        waiting = {f"bench-{index}" for index in range(len(prompts))}
        ttft, generated = 0.0, 0
        while self._engine.has_work:
            for update in self._engine.step():
                generated += len(update.tokens)
                if update.request_id in waiting and update.tokens:
                    waiting.remove(update.request_id)
                    ttft = time.perf_counter() - start
                if update.finish is not None and update.finish.error is not None:
                    raise update.finish.error
        assert generated == new_tokens * len(prompts), (
            f"made {generated} tokens, not what was asked for"
        )
        return Run(ttft, time.perf_counter() - start, generated, len(prompts))


class Transformers:
    """Hugging Face `generate` on the same weights, in the same dtype and threads."""

    name = "transformers"

    def __init__(self, model: LoadedModel) -> None:
        import transformers  # seconds, which only this needs

        transformers.utils.logging.set_verbosity_error()
        self._model = _to_transformers(transformers, model)

    @torch.inference_mode()
    def run(self, prompts: Prompts, new_tokens: int) -> Run:
        ids = torch.tensor([list(prompt) for prompt in prompts])
        watch = _FirstTokenWatch()
        start = time.perf_counter()
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=watch if len(prompts) == 1 else None,
        )
        total = time.perf_counter() - start
        generated = output.shape[1] - ids.shape[1]
        assert generated == new_tokens, f"transformers made {generated} tokens, not {new_tokens}"
        return Run((watch.first or start) - start, total, generated * len(prompts), len(prompts))


class _FirstTokenWatch:
    """A transformers streamer that notes when the first token came; the prompt is put first."""

    def __init__(self) -> None:
        self._puts = 0
        self.first: float | None = None

    def put(self, value: Any) -> None:
        self._puts += 1
        if self._puts == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        pass


def _to_transformers(transformers: Any, model: LoadedModel) -> Any:
    """The same weights (shared, not copied) in transformers' own module."""
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
    module.generation_config.eos_token_id = None  # exactly as many tokens as asked for
    module.generation_config.pad_token_id = 0
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
