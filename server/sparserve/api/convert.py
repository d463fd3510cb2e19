"""Protocol messages to the engine's types and back."""

from __future__ import annotations

import math
import uuid
from typing import TypeVar

from google.protobuf.message import Message

from sparserve.engine.request import (
    Finish,
    FinishReason,
    GeneratedToken,
    GenerationRequest,
    SamplingParams,
    StoppingParams,
)
from sparserve.engine.tokenizer import TextTokenizer
from sparserve.errors import InvalidRequest, NotBuiltYet, PromptTooLong
from sparserve.sparsity.policy import Policy, PolicyKind
from sparserve.v1 import inference_pb2 as pb

T = TypeVar("T")

POLICIES = {
    pb.SPARSITY_POLICY_DENSE: PolicyKind.DENSE,
    pb.SPARSITY_POLICY_CORE: PolicyKind.CORE,
    pb.SPARSITY_POLICY_TOKEN: PolicyKind.TOKEN,
    pb.SPARSITY_POLICY_EXACT: PolicyKind.EXACT,
    pb.SPARSITY_POLICY_AUTO: PolicyKind.AUTO,
}
POLICY_NUMBERS = {kind: number for number, kind in POLICIES.items()}

REASONS = {
    FinishReason.STOP_EOS: pb.FINISH_REASON_STOP_EOS,
    FinishReason.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CONTEXT: pb.FINISH_REASON_CONTEXT,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}

# Fields of the protocol that are not served yet, with the value that asks for nothing.
_NOT_BUILT: dict[str, dict[str, object]] = {
    "": {"constraint": None, "priority": 0, "cache_salt": "", "adapter": "", "user": ""},
    "sampling": {
        "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "n": 1, "logit_bias": {}, "allowed_token_ids": [],
    },
    "stopping": {"min_tokens": 0, "stop_token_ids": [], "include_stop": False},
    "response": {"top_logprobs": 0, "prompt_logprobs": None, "skip_special_tokens": True},
    "sparsity": {"refresh_interval": 0},
}  # fmt: skip


def parse_request(
    message: pb.GenerateRequest,
    tokenizer: TextTokenizer,
    max_prompt_tokens: int,
    policies: tuple[PolicyKind, ...],
    seconds_left: float | None,
    arrival: float,
) -> GenerationRequest:
    """Raises InvalidRequest, PromptTooLong or NotBuiltYet, which name the field.

    Tokenizes, so a long prompt takes milliseconds: call it off the event loop.
    """
    for prefix, neutral in _NOT_BUILT.items():
        _refuse_not_built(getattr(message, prefix) if prefix else message, prefix, neutral)
    sampling, stopping = message.sampling, message.stopping
    return GenerationRequest(
        request_id=message.request_id or uuid.uuid4().hex,
        prompt_token_ids=_prompt(message, tokenizer, max_prompt_tokens),
        sampling=SamplingParams(
            temperature=_given(sampling, "temperature", 1.0),
            top_k=_given(sampling, "top_k", 0),
            top_p=_given(sampling, "top_p", 1.0),
            seed=sampling.seed if sampling.HasField("seed") else None,
        ),
        stopping=StoppingParams(
            max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
            stop=tuple(stopping.stop),
            ignore_eos=stopping.ignore_eos,
        ),
        policy=_policy(message.sparsity, policies),
        report_statistics=message.sparsity.report,
        deadline=None if seconds_left is None else arrival + seconds_left,
        arrival=arrival,
    )


def finished(finish: Finish) -> pb.Finished:
    message = pb.Finished(index=0, reason=REASONS[finish.reason])
    if finish.stop_string is not None:
        message.stop = finish.stop_string
    elif finish.stop_token_id is not None:
        message.token_id = finish.stop_token_id
    return message


def usage(finish: Finish) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=finish.prompt_tokens,
        cached_tokens=0,
        completion_tokens=finish.completion_tokens,
    )


def timings(finish: Finish) -> pb.Timings:
    times = finish.timings
    return pb.Timings(
        queue_seconds=times.queue,
        ttft_seconds=times.ttft,
        prefill_seconds=times.prefill,
        decode_seconds=times.decode,
    )


def sparsity_report(policy: Policy, finish: Finish) -> pb.SparsityReport:
    return pb.SparsityReport(
        policy=POLICY_NUMBERS[policy.kind], density=policy.density, core_share=finish.core_share
    )


def tokens(generated: tuple[GeneratedToken, ...], options: pb.ResponseOptions) -> list[pb.Token]:
    """Empty unless ids or log probabilities were asked for."""
    if not (options.token_ids or options.logprobs):
        return []
    return [pb.Token(id=t.id, logprob=t.logprob if options.logprobs else None) for t in generated]


def _prompt(message: pb.GenerateRequest, tokenizer: TextTokenizer, limit: int) -> tuple[int, ...]:
    match message.WhichOneof("prompt"):
        case "text":
            return tokenizer.encode(message.text, limit)
        case "token_ids":
            ids = message.token_ids.ids
            if len(ids) > limit:  # before a look at each of them: there can be millions
                text = f"the prompt has {len(ids)} tokens, the limit is {limit}"
                raise PromptTooLong("token_ids", text, limit)
            return tuple(ids)
    raise InvalidRequest("prompt", "the request has no prompt; set text or token_ids")


def _policy(message: pb.Sparsity, policies: tuple[PolicyKind, ...]) -> Policy:
    density, target_kl = _given(message, "density", 1.0), _given(message, "target_kl", 0.0)
    if not 0 < density <= 1:  # also false for NaN
        raise InvalidRequest("sparsity.density", f"density is {density:g}; it must be in (0, 1]")
    if not (target_kl >= 0 and math.isfinite(target_kl)):
        raise InvalidRequest(
            "sparsity.target_kl", f"target_kl is {target_kl:g}; it must be finite and >= 0"
        )
    if message.policy == pb.SPARSITY_POLICY_UNSPECIFIED:
        kind = PolicyKind.DENSE
    elif message.policy in POLICIES:
        kind = POLICIES[message.policy]
    else:
        raise InvalidRequest(
            "sparsity.policy", f"sparsity.policy {message.policy} is not in the enum"
        )
    if kind not in policies or density != 1:
        raise NotBuiltYet(
            "sparsity",
            f"policy {kind.value} at density {density:g} is not built yet; "
            f"built: {', '.join(k.value for k in policies)} at density 1",
        )
    return Policy(kind, density)


def _refuse_not_built(message: Message, prefix: str, neutral: dict[str, object]) -> None:
    for name, nothing in neutral.items():
        field = message.DESCRIPTOR.fields_by_name[name]
        if field.has_presence:
            asked = message.HasField(name) and (
                nothing is None or getattr(message, name) != nothing
            )
        else:
            asked = len(getattr(message, name)) > 0
        if asked:
            path = f"{prefix}.{name}" if prefix else name
            raise NotBuiltYet(path, f"{path} is not built yet; leave it unset")


def _given(message: Message, name: str, default: T) -> T:
    value: T = getattr(message, name)
    return value if message.HasField(name) else default
