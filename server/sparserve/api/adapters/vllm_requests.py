"""`vllm.grpc.engine.GenerateRequest` as a request of our own: every field is taken, or refused by its name.

A scalar without presence that is 0 where 0 means nothing (top_p, repetition_penalty, n) was not set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparserve.engine.request import MAX_TOP_LOGPROBS
from sparserve.errors import InvalidRequest, PromptTooLong
from sparserve.v1 import inference_pb2 as pb

MAX_INT = 2**31 - 1  # of our fields; theirs have a bit more
_NO_TRANSFERS = "prefill and decode are one process here, no KV moves between servers"
_NO_MEDIA = "the model reads text only"
# Message fields that nothing here can serve.
_REFUSED = {
    "kv_transfer_params": _NO_TRANSFERS,
    "kv_transfer_params_json": _NO_TRANSFERS,
    "mm_inputs": _NO_MEDIA,
    "media_refs": _NO_MEDIA,
}
# Our fields, or the messages that they are in, by theirs.
_RENAMED = {
    **dict.fromkeys(("sampling.", "stopping.", "constraint."), "sampling_params."),
    "token_ids.ids": "tokenized.input_ids",
    "prompt": "tokenized.input_ids",
}


def own_request(message: Any, max_prompt_tokens: int) -> pb.GenerateRequest:
    """Ranges are checked where ours are. Raises InvalidRequest or PromptTooLong."""
    for name, reason in _REFUSED.items():
        if message.HasField(name):
            raise InvalidRequest(name, f"{name} is set: {reason}")
    if message.extra_mm_inputs:
        raise InvalidRequest("extra_mm_inputs", f"extra_mm_inputs is set: {_NO_MEDIA}")
    if message.data_parallel_rank:
        raise InvalidRequest(
            "data_parallel_rank",
            f"data_parallel_rank is {message.data_parallel_rank}; this server is the one rank, 0",
        )
    params = message.sampling_params
    own = pb.GenerateRequest(
        request_id=message.request_id,
        sampling=_sampling(params),
        stopping=pb.Stopping(
            max_tokens=_int(params, "max_tokens") if params.HasField("max_tokens") else None,
            min_tokens=_int(params, "min_tokens"),
            stop=params.stop,
            stop_token_ids=_token_ids("sampling_params.stop_token_ids", params.stop_token_ids),
            ignore_eos=params.ignore_eos,
            include_stop=params.include_stop_str_in_output,
        ),
        response=_response(params),
    )
    _set_prompt(own, message, max_prompt_tokens)
    _set_constraint(own, params)
    return own


def renamed(error: InvalidRequest | PromptTooLong) -> InvalidRequest | PromptTooLong:
    """The same error with this protocol's name of the field."""
    for ours, theirs in _RENAMED.items():
        if error.field.startswith(ours):
            text = str(error).replace(ours, theirs, 1)
            field = theirs + error.field.removeprefix(ours)
            if isinstance(error, PromptTooLong):
                return PromptTooLong(field, text, error.limit)
            return InvalidRequest(field, text)
    return error


def _sampling(params: Any) -> pb.Sampling:
    for token_id in params.logit_bias:
        if token_id < 0:
            name = "sampling_params.logit_bias"
            raise InvalidRequest(f"{name}[{token_id}]", f"{name} has the token id {token_id}")
    return pb.Sampling(
        temperature=params.temperature if params.HasField("temperature") else None,
        top_p=params.top_p or None,
        top_k=params.top_k if params.top_k <= MAX_INT else 0,  # all, as no vocabulary is larger
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty or None,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        # OpenAI's seed may be negative, ours is its two's complement.
        seed=params.seed % 2**64 if params.HasField("seed") else None,
        n=_int(params, "n") or None,
        logit_bias=params.logit_bias,
    )


def _response(params: Any) -> pb.ResponseOptions:
    wants = params.HasField("logprobs")
    return pb.ResponseOptions(
        logprobs=wants,
        top_logprobs=_count(params, "logprobs") if wants else None,
        prompt_logprobs=(
            _count(params, "prompt_logprobs") if params.HasField("prompt_logprobs") else None
        ),
        skip_special_tokens=params.skip_special_tokens,
    )


def _int(params: Any, name: str) -> int:
    value: int = getattr(params, name)
    if value > MAX_INT:
        field = f"sampling_params.{name}"
        raise InvalidRequest(field, f"{field} is {value}, the limit is {MAX_INT}")
    return value


def _count(params: Any, name: str) -> int:
    count: int = getattr(params, name)
    if not 0 <= count <= MAX_TOP_LOGPROBS:
        field = f"sampling_params.{name}"
        raise InvalidRequest(field, f"{field} is {count}; it must be in [0, {MAX_TOP_LOGPROBS}]")
    return count


def _set_prompt(own: pb.GenerateRequest, message: Any, limit: int) -> None:
    params, kind = message.sampling_params, message.WhichOneof("input")
    cut = params.truncate_prompt_tokens if params.HasField("truncate_prompt_tokens") else None
    if cut is not None and (cut < 1 or kind != "tokenized"):
        name = "sampling_params.truncate_prompt_tokens"
        raise InvalidRequest(
            name, f"{name} is {cut}; it must be >= 1, and the prompt token ids, not text"
        )
    if kind == "text":
        own.text = message.text
    elif kind == "tokenized":
        # The end of a prompt is what the text goes on from.
        ids = message.tokenized.input_ids[-cut:] if cut else message.tokenized.input_ids
        name = "tokenized.input_ids"
        if len(ids) > limit:  # before a look at each of them: there can be millions
            text = f"the prompt has {len(ids)} tokens, the limit is {limit}"
            raise PromptTooLong(name, text, limit)
        own.token_ids.ids.extend(_token_ids(name, ids))
    else:
        raise InvalidRequest("input", "the request has no input; set tokenized or text")


def _set_constraint(own: pb.GenerateRequest, params: Any) -> None:
    match params.WhichOneof("constraint"):
        case None:
            pass
        case "choice":
            own.constraint.choice.options.extend(params.choice.choices)
            own.constraint.choice.SetInParent()
        case "structural_tag":
            name = "sampling_params.structural_tag"
            raise InvalidRequest(name, f"{name} is not served; json_schema, regex and grammar are")
        case kind:
            setattr(own.constraint, kind, getattr(params, kind))


def _token_ids(name: str, ids: Sequence[int]) -> Sequence[int]:
    if ids and (largest := max(ids)) > MAX_INT:
        raise InvalidRequest(name, f"{name} has the token id {largest}, which no vocabulary has")
    return ids
