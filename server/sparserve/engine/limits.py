"""What one engine grants, and whether a request keeps to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sparserve.engine.request import MAX_REQUEST_ID_LENGTH, GenerationRequest
from sparserve.errors import InvalidRequest, PromptTooLong


@dataclass(frozen=True, slots=True)
class EngineLimits:
    max_context: int  # positions, prompt and new tokens together
    max_running: int
    max_batched_tokens: int
    mixed_prefill_tokens: int  # prompt tokens in a step that also decodes
    default_max_tokens: int
    max_tokens: int  # that a request may ask for
    max_choices: int
    prefix_cache: bool


def validate(request: GenerationRequest, limits: EngineLimits, vocab_size: int) -> None:
    """Raises InvalidRequest or PromptTooLong."""
    if len(request.request_id) > MAX_REQUEST_ID_LENGTH:
        raise InvalidRequest(
            "request_id",
            f"request_id has {len(request.request_id)} characters, the limit is {MAX_REQUEST_ID_LENGTH}",
        )
    _check_prompt(request, limits, vocab_size)
    sampling, stopping = request.sampling, request.stopping
    check_token_ids("sampling.logit_bias", (i for i, _ in sampling.logit_bias), vocab_size)
    if len(sampling.allowed_token_ids) > vocab_size:  # before a look at each of them
        raise InvalidRequest(
            "sampling.allowed_token_ids",
            f"{len(sampling.allowed_token_ids)} allowed tokens given; the vocabulary has {vocab_size}",
        )
    check_token_ids("sampling.allowed_token_ids", sampling.allowed_token_ids, vocab_size)
    check_token_ids("stopping.stop_token_ids", stopping.stop_token_ids, vocab_size)
    if sampling.n > limits.max_choices:
        raise InvalidRequest(
            "sampling.n",
            f"sampling.n is {sampling.n}; this server makes {limits.max_choices} at most",
        )
    max_tokens = stopping.max_tokens or limits.default_max_tokens
    if stopping.max_tokens is not None and max_tokens > limits.max_tokens:
        raise InvalidRequest(
            "stopping.max_tokens",
            f"stopping.max_tokens is {max_tokens}; this server grants {limits.max_tokens} at most",
        )
    if stopping.min_tokens > max_tokens:
        raise InvalidRequest(
            "stopping.min_tokens",
            f"stopping.min_tokens is {stopping.min_tokens}, more than max_tokens, which is {max_tokens}",
        )


def _check_prompt(request: GenerationRequest, limits: EngineLimits, vocab_size: int) -> None:
    check_token_ids("token_ids.ids", request.prompt_token_ids, vocab_size)
    prompt_len, limit = len(request.prompt_token_ids), limits.max_context - 1
    if prompt_len == 0:
        raise InvalidRequest("prompt", "the prompt is empty; at least one token is needed")
    if prompt_len > limit:
        raise PromptTooLong(
            "prompt",
            f"the prompt has {prompt_len} tokens, the limit is {limit} "
            f"(a context of {limits.max_context} less one new token)",
            limit,
        )


def check_token_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Raises InvalidRequest where an id is outside the vocabulary; `name` is the field that holds them."""
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{name}[{index}]",
                f"token id {token_id} is outside the vocabulary of {vocab_size}",
            )
