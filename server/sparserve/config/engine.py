"""Settings of the engine: model, formats, backend, policies, memory, scheduling."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"]
PartDtype = Literal["same", "bfloat16", "int8", "int4"]
KvDtype = Literal["same", "bfloat16", "int8"]
HeadDtype = Literal["same", "bfloat16", "int8", "int4", "int4+exact"]
BackendChoice = Literal["auto", "reference", "cpu", "cuda"]
PolicyName = Literal["dense", "core", "token", "exact", "auto"]

# Settings that say how weights are stored.
_OF_FORMATS = (
    "dtype",
    "attention_dtype",
    "mlp_dtype",
    "lm_head_dtype",
    "group_size",
    "weight_planes",
    "down_planes",
    "activation_bits",
)


def _number(value: object) -> object:
    """A flag's or the environment's text of digits: a Literal of numbers takes numbers alone."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]


class EngineSettings(BaseSettings):
    """What the engine needs, served or offline."""

    model_config = SettingsConfigDict(env_prefix="SPARSERVE_", extra="forbid", frozen=True)

    model: Annotated[
        str,
        Field(
            description="A name from `sparserve models`, a Hugging Face folder, one that `sparserve compress` "
            "made, a .gguf file, or the id org/name[@revision] of a model in the Hugging Face cache."
        ),
    ] = "smollm2-135m-instruct"
    compress: Annotated[
        str,
        Field(
            description="Compress the model when it is loaded, as `sparserve compress` does, by this recipe: fast, "
            "balanced, quality or a YAML file. Takes minutes the first time; the result is kept in the cache. Empty: do not."
        ),
    ] = ""
    prune: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="Remove heads and neurons that make up this share of all parameters when the model is loaded, by "
            "--compress, or alone, in 16 bits, before --dtype rounds. Needs --compress-text. 0: do not.",
        ),
    ] = 0.0
    prune_heads: Annotated[
        float, Field(ge=0, lt=1, description="The same, a share of the attention's parameters.")
    ] = 0.0
    prune_mlp: Annotated[
        float,
        Field(ge=0, lt=1, description="The same, a share of the feed-forward layers' parameters."),
    ] = 0.0
    compress_text: Annotated[
        str,
        Field(
            description="Text files like what will be served, with commas between: what --compress and --prune measure "
            "inputs of matrices on. Most recipes need one."
        ),
    ] = ""
    compress_cache: Annotated[
        bool,
        Field(
            description="Keep what --compress makes in $SPARSERVE_CACHE_DIR/compressed for the next time; else it is "
            "in a temporary folder until the process ends."
        ),
    ] = True
    backend: Annotated[
        BackendChoice,
        Field(
            description="cpu, cuda: native kernels for the CPU or an NVIDIA GPU, weights in bfloat16, int8 or int4; "
            "reference: plain torch, slow, any floating-point dtype, placed by device_map; auto: the native kernels of "
            "device, where dtype and device_map allow it."
        ),
    ] = "auto"
    device: Annotated[
        str,
        Field(
            description="What the native kernels compute on: cpu; cuda or cuda:N, an NVIDIA GPU; auto: the first GPU where "
            "it can be used, else the CPU, and the log says why."
        ),
    ] = "auto"
    dtype: Annotated[
        Dtype,
        Field(
            description="Data type of the weights; auto: bfloat16 on the native backends, on the reference "
            "backend the checkpoint's (float32 for quantized GGUF). int8 and int4 round the matrices to integers "
            "when they are loaded, for the native backends; the embedding is then bfloat16."
        ),
    ] = "auto"
    attention_dtype: Annotated[
        PartDtype,
        Field(description="Data type of the attention projections; same: that of dtype."),
    ] = "same"
    mlp_dtype: Annotated[
        PartDtype,
        Field(description="Data type of the feed-forward matrices; same: that of dtype."),
    ] = "same"
    lm_head_dtype: Annotated[
        HeadDtype,
        Field(
            description="Data type of the LM head; same: that of dtype, but int8 where dtype is int4. One that "
            "is tied to the embedding gets a copy. int4+exact: bfloat16 and an int4 copy, which is read first; "
            "where few likeliest tokens decide (greedy and small top_k, without logprobs or penalties, in all requests of "
            "a step) only their rows are then read in bfloat16. The results are those of bfloat16."
        ),
    ] = "same"
    group_size: Annotated[
        Literal["auto", 32, 64, 128],
        BeforeValidator(_number),
        Field(
            description="Columns of an integer matrix that share a scale and a zero; auto: 32 in the attention "
            "projections, where rounding harms most, 64 elsewhere."
        ),
    ] = "auto"
    weight_planes: Annotated[
        Literal["whole", "4+4", "2+2", "3+1"],
        Field(
            description="How the bits of gate and up are laid out: whole, or the upper ones apart from the lower "
            "ones, 4+4 of int8, 2+2 or 3+1 of int4. In planes, policy token can choose neurons by the upper bits."
        ),
    ] = "whole"
    down_planes: Annotated[
        Literal["whole", "same"],
        Field(
            description="How the bits of down are laid out: whole, or the same as --weight-planes, so that policy token "
            "reads less of neurons that matter little."
        ),
    ] = "whole"
    activation_bits: Annotated[
        Literal[16, 8],
        BeforeValidator(_number),
        Field(
            description="Bits of the inputs of integer matrices; 8 is faster, and a further loss."
        ),
    ] = 16
    kv_dtype: Annotated[
        KvDtype,
        Field(
            description="Data type of the KV cache; same: that of the weights, bfloat16 where these are integers. int8 (native backends only) holds twice the "
            "context and reads it faster, for a little quality."
        ),
    ] = "same"
    index: Annotated[
        str,
        Field(
            description="File that `sparserve calibrate` made for this model in these data types; policies token and "
            "auto, predictor similarity and target_kl need one. Empty: none."
        ),
    ] = ""
    default_policy: Annotated[
        PolicyName,
        Field(
            description="Policy of requests that name none: dense reads all neurons; core those that the prompt "
            "used most; token some for each token; exact drafts, and verifies densely; auto what the index says is cheapest. "
            "core, token and auto cost quality."
        ),
    ] = "dense"
    default_density: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Share of the feed-forward layers' bytes that a decoded token reads, for requests with policy core or token "
            "that name neither density nor target_kl, never less than min_density; 0: 0.7 for core, and what default_target_kl allows for token.",
        ),
    ] = 0
    default_target_kl: Annotated[
        float,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="Mean KL to the dense model, nats per token, that policies auto and token may cost where requests name "
            "neither density nor target_kl; never more than max_target_kl.",
        ),
    ] = 0.05
    min_density: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Smallest density that a request may ask for, or that a target comes to; 0: any.",
        ),
    ] = 0
    max_target_kl: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="Largest target_kl that a request may ask for; 0: any.",
        ),
    ] = 0
    allowed_policies: Annotated[
        str,
        Field(
            description="Policies that requests may have, such as dense,core; dense always is. all: every one."
        ),
    ] = "all"
    device_map: Annotated[
        str,
        Field(
            description="Where the reference backend's weights live: cpu; a torch device such as cuda:0; or auto: GPUs "
            "first, then main memory, then left in the checkpoint and read for each use."
        ),
    ] = "cpu"
    max_memory_gib: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="Memory for weights on each device in GiB, with device_map auto; 0: what is free.",
        ),
    ] = 0
    threads: Annotated[
        int,
        Field(
            ge=0,
            le=1024,
            description="CPU threads of the forward; 0, or more than are usable: all that are.",
        ),
    ] = 0
    max_context: Annotated[
        int,
        Field(ge=0, description="Tokens of prompt and output together; 0: the model's own limit."),
    ] = 0
    kv_cache_gib: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="Memory for the KV cache in GiB; 0: all of max_running contexts, at most a quarter of free memory, "
            "on a GPU what gpu_memory_utilization says.",
        ),
    ] = 0
    gpu_memory_utilization: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Share of a GPU's memory that the KV cache may take of what is free beside the weights.",
        ),
    ] = 0.9
    cuda_graphs: Annotated[
        bool,
        Field(
            description="On a GPU, launch decoding steps that come again as CUDA graphs, which takes the CPU less time."
        ),
    ] = True
    core_copies: Annotated[
        bool,
        Field(
            description="On the CPU, where all requests of a step have policy core and the same ones stay for some steps, "
            "read what is in their cores from a copy, side by side, which is faster. It takes as much memory as the "
            "cores together have, at most a quarter of what is free when the model is loaded; answers are the same."
        ),
    ] = True
    max_running: Annotated[
        int, Field(ge=1, le=1024, description="Requests decoded together at most.")
    ] = 16
    max_batched_tokens: Annotated[
        int,
        Field(
            ge=1,
            le=65536,
            description="Tokens in one engine step at most; long prompts are cut into such chunks.",
        ),
    ] = 512
    mixed_prefill_tokens: Annotated[
        int,
        Field(
            ge=1,
            le=65536,
            description="Prompt tokens in a step that also decodes, at most: fewer keep streams smooth, more start new ones sooner.",
        ),
    ] = 128
    prefix_cache: Annotated[
        bool,
        Field(
            description="Keep the KV of prompts for requests that begin alike; a model's own answers are computed again as prompt."
        ),
    ] = True
    max_new_tokens: Annotated[
        int,
        Field(
            ge=0,
            lt=2**31,
            description="Largest max_tokens that a request may ask for; 0: any.",
        ),
    ] = 0
    max_choices: Annotated[
        int, Field(ge=1, le=1024, description="Largest n (choices) that a request may ask for.")
    ] = 16
    default_max_tokens: Annotated[
        int,
        Field(
            ge=1,
            lt=2**31,
            description="New tokens for a request that names no max_tokens; never more than max_new_tokens.",
        ),
    ] = 256

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", value, re.ASCII):
            raise ValueError("it must be auto, cpu, cuda or cuda:N, with N the number of a GPU")
        return value

    @field_validator("allowed_policies")
    @classmethod
    def _known_policies(cls, value: str) -> str:
        unknown = set(_names(value)) - {"all", *get_args(PolicyName)}
        if unknown or not _names(value):
            raise ValueError(
                f"it must be all, or names out of {', '.join(get_args(PolicyName))} with commas between"
            )
        return value

    @property
    def policies(self) -> frozenset[str]:
        """Names that `allowed_policies` comes to."""
        names = _names(self.allowed_policies)
        return frozenset(get_args(PolicyName) if "all" in names else ["dense", *names])

    @property
    def compresses(self) -> bool:
        """Whether the model is another one when it is loaded."""
        return bool(self.compress or self.prune or self.prune_heads or self.prune_mlp)

    @property
    def compress_texts(self) -> list[Path]:
        """The files that `compress_text` names."""
        return [Path(os.path.expanduser(name)) for name in _names(self.compress_text)]

    @model_validator(mode="after")
    def _one_source_of_formats(self) -> EngineSettings:
        for name in _OF_FORMATS if self.compress else ():
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is {value}, and compress {self.compress}, a recipe, which says how matrices are stored; "
                    "give one of them"
                )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> EngineSettings:
        if self.max_batched_tokens < self.max_running:
            raise ValueError(
                f"max_batched_tokens {self.max_batched_tokens} is below max_running {self.max_running}: "
                "every running request decodes one token in every step"
            )
        if self.default_policy not in self.policies:
            raise ValueError(
                f"default_policy is {self.default_policy}, which is not in allowed_policies {self.allowed_policies}"
            )
        return self
