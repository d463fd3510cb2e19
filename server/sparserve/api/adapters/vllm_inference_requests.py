"""`vllm.GenerateRequest` to our own: every field is taken, or refused by its name."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable

from sparserve.api.inference import MAX_TOKENS
from sparserve.engine.request import MAX_PRIORITY
from sparserve.engine.tokenizer import TextTokenizer
from sparserve.errors import InvalidRequest, NotBuiltYet, PromptTooLong
from sparserve.protocols import vllm_inference_pb2 as pb
from sparserve.v1 import inference_pb2 as own_pb

_MAX_INT32 = 2**31 - 1
_REFUSED = {
    "media": "this server reads text only",
    "lora_name": "LoRA adapters are not served; merge them into the model",
    "decoding.structural_tag": "use json, regex, choice, grammar or json_object",
    "kv.kv_transfer_params": "KV is not transferred between servers",
    "kv.ec_transfer_params": "KV is not transferred between servers",
    "response.output_candidates.token_ids": "ask for top_n",
    "response.output_candidates.all": "ask for top_n",
    "response.prompt_candidates.token_ids": "ask for top_n",
    "response.prompt_candidates.all": "ask for top_n",
}
# Our names of fields that have another in vLLM's message.
_RENAMED = {
    "sampling.temperature": "temperature",
    "sampling.n": "sampling.num_sequences",
    "sampling.repetition_penalty": "decoding.repetition_penalty",
    "sampling.presence_penalty": "decoding.presence_penalty",
    "sampling.frequency_penalty": "decoding.frequency_penalty",
    "sampling.logit_bias": "decoding.logit_bias",
    "sampling.allowed_token_ids": "decoding.allowed_token_ids",
    "stopping.max_tokens": "stopping.max_new_tokens",
    "stopping.min_tokens": "stopping.min_new_tokens",
    "stopping.stop_token_ids": "stopping.stop_token_ids",
    "stopping.stop": "stopping.stop_strings",
    "response.top_logprobs": "response.output_candidates.top_n",
    "response.prompt_logprobs": "response.prompt_candidates.top_n",
    "constraint.json_schema": "decoding.json",
    "constraint.regex": "decoding.regex",
    "constraint.choice": "decoding.choice",
    "constraint.grammar": "decoding.grammar",
    "cache_salt": "kv.cache_salt",
}


async def own_request(
    message: pb.GenerateRequest, tokenizer: TextTokenizer
) -> own_pb.GenerateRequest:
    """Raises InvalidRequest, PromptTooLong or NotBuiltYet, with vLLM's names of the fields."""
    for path, instead in _REFUSED.items():
        if _is_set(message, path):
            raise NotBuiltYet(path, f"{path} is not served; {instead}")
    request = own_pb.GenerateRequest(
        request_id=message.request_id,
        model=message.model,
        sampling=_sampling(message),
        stopping=_stopping(message.stopping),
        response=_response(message.response),
        constraint=_constraint(message.decoding),
        priority=_priority(message.priority),
        # A salt that no other request has finds nothing in the cache.
        cache_salt=uuid.uuid4().hex if message.kv.bypass_prefix_cache else message.kv.cache_salt,
    )
    await _set_prompt(request, message, tokenizer)
    return request


def renamed(error: InvalidRequest | PromptTooLong) -> InvalidRequest | PromptTooLong:
    """The same error with vLLM's name of the field."""
    for ours, theirs in _RENAMED.items():
        if error.field == ours or error.field.startswith(f"{ours}["):
            text = str(error).replace(ours, theirs, 1)
            field = theirs + error.field.removeprefix(ours)
            if isinstance(error, PromptTooLong):
                return PromptTooLong(field, text, error.limit)
            return InvalidRequest(field, text)
    return error


def _is_set(message: pb.GenerateRequest, path: str) -> bool:
    *parents, name = path.split(".")
    part = message
    for parent in parents:
        part = getattr(part, parent)
    return any(field.name == name for field, _ in part.ListFields())


async def _set_prompt(
    request: own_pb.GenerateRequest, message: pb.GenerateRequest, tokenizer: TextTokenizer
) -> None:
    kind, most = message.WhichOneof("prompt"), message.truncate_prompt_tokens
    if kind == "text" and most:
        ids = await asyncio.to_thread(tokenizer.encode, message.text, MAX_TOKENS)
        request.token_ids.ids.extend(ids[-most:])
    elif kind == "text":
        request.text = message.text
    elif kind == "token_ids":
        given = message.token_ids.ids
        if len(given) > MAX_TOKENS:
            text = f"the prompt has {len(given)} tokens, the limit is {MAX_TOKENS}"
            raise PromptTooLong("token_ids", text, MAX_TOKENS)
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(_ids("token_ids.ids", given[-most:] if most else given))


def _sampling(message: pb.GenerateRequest) -> own_pb.Sampling:
    sampling, decoding = message.sampling, message.decoding
    own = own_pb.Sampling(
        temperature=message.temperature,  # 0 where it is absent
        top_k=_int32("sampling.top_k", sampling.top_k),
        top_p=sampling.top_p or None,
        min_p=sampling.min_p,
        repetition_penalty=decoding.repetition_penalty or None,
        presence_penalty=decoding.presence_penalty,
        frequency_penalty=decoding.frequency_penalty,
        n=_int32("sampling.num_sequences", sampling.num_sequences) or None,
        allowed_token_ids=_ids("decoding.allowed_token_ids", decoding.allowed_token_ids),
    )
    for token_id, bias in decoding.logit_bias.items():
        own.logit_bias[_int32("decoding.logit_bias", token_id)] = bias
    if sampling.HasField("seed"):
        own.seed = sampling.seed % 2**64
    return own


def _stopping(stopping: pb.StoppingCriteria) -> own_pb.Stopping:
    return own_pb.Stopping(
        max_tokens=_int32("stopping.max_new_tokens", stopping.max_new_tokens) or None,
        min_tokens=_int32("stopping.min_new_tokens", stopping.min_new_tokens),
        stop=stopping.stop_strings,
        stop_token_ids=_ids("stopping.stop_token_ids", stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        include_stop=stopping.include_stop_strings,
    )


def _response(options: pb.ResponseOptions) -> own_pb.ResponseOptions:
    asks_prompt = options.prompt_logprobs or options.HasField("prompt_candidates")
    beside = _int32("response.output_candidates.top_n", options.output_candidates.top_n)
    beside_prompt = _int32("response.prompt_candidates.top_n", options.prompt_candidates.top_n)
    return own_pb.ResponseOptions(
        logprobs=options.output_logprobs,
        top_logprobs=beside,
        prompt_logprobs=beside_prompt if asks_prompt else None,
        skip_special_tokens=options.skip_special_tokens
        if options.HasField("skip_special_tokens")
        else None,
    )


def _constraint(decoding: pb.DecodingParameters) -> own_pb.Constraint | None:
    match decoding.WhichOneof("structured_output"):
        case "json":
            return own_pb.Constraint(json_schema=decoding.json)
        case "regex":
            return own_pb.Constraint(regex=decoding.regex)
        case "choice":
            return own_pb.Constraint(choice=own_pb.Choices(options=decoding.choice.choices))
        case "grammar":
            return own_pb.Constraint(grammar=decoding.grammar)
        case "json_object" if decoding.json_object:
            return own_pb.Constraint(json_object=True)
    return None


def _priority(value: int) -> int:
    """Ours goes by the higher, theirs by the lower."""
    if abs(value) > MAX_PRIORITY:
        raise InvalidRequest(
            "priority", f"priority is {value}; it must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]"
        )
    return -value


def _int32(path: str, value: int) -> int:
    if value > _MAX_INT32:
        raise InvalidRequest(path, f"{path} is {value}; {_MAX_INT32} is the most")
    return value


def _ids(path: str, ids: Iterable[int]) -> list[int]:
    found = list(ids)
    if found:
        _int32(path, max(found))
    return found
