"""The JSON in `sampling_parameters`: vLLM's names of sampling parameters, and our own for sparsity."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparserve.errors import InvalidRequest
from sparserve.v1 import inference_pb2 as own_pb

Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Ids = list[Int32]
# An error is made for each wrong value, a thousand times as large as the value.
MAX_JSON = 64 << 10  # characters
_MAX_PATH = 100  # characters
_POLICIES = {
    name.removeprefix("SPARSITY_POLICY_").lower(): number
    for name, number in own_pb.SparsityPolicy.items()
    if number != own_pb.SPARSITY_POLICY_UNSPECIFIED
}


class StructuredOutputs(BaseModel):
    """One of them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    json_schema: str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class SamplingParameters(BaseModel):
    """What is None is left to the server. Numbers may be written as strings, as Triton's examples do."""

    model_config = ConfigDict(extra="forbid")

    n: Int32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = None  # -1: all, as 0
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    logit_bias: dict[Int32, float] = {}
    allowed_token_ids: Ids = []
    max_tokens: Int32 | None = None
    min_tokens: Int32 | None = None
    stop: str | list[str] = []
    stop_token_ids: Ids = []
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    policy: str | None = None
    density: float | None = None
    target_kl: float | None = None


_SAMPLING = (
    "n", "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed",
)  # fmt: skip


def set_parameters(message: own_pb.GenerateRequest, text: str) -> None:
    """Fill `message` with what the JSON object `text` says. Raises InvalidRequest."""
    if len(text) > MAX_JSON:
        raise _wrong("", f"it has {len(text)} characters, the limit is {MAX_JSON}")
    try:
        given = SamplingParameters.model_validate_json(text)
    except ValidationError as error:
        raise _blamed(error) from error
    sampling, stopping = message.sampling, message.stopping
    for name in _SAMPLING:
        _set(sampling, name, getattr(given, name))
    _set(sampling, "top_k", 0 if given.top_k == -1 else given.top_k)
    sampling.allowed_token_ids.extend(given.allowed_token_ids)
    for token_id, bias in given.logit_bias.items():
        sampling.logit_bias[token_id] = bias
    for name in ("max_tokens", "min_tokens", "ignore_eos"):
        _set(stopping, name, getattr(given, name))
    _set(stopping, "include_stop", given.include_stop_str_in_output)
    stopping.stop.extend([given.stop] if isinstance(given.stop, str) else given.stop)
    stopping.stop_token_ids.extend(given.stop_token_ids)
    _set(message.response, "skip_special_tokens", given.skip_special_tokens)
    _set_constraint(message, given.structured_outputs)
    _set_sparsity(message.sparsity, given)


def _set(message: Any, name: str, value: object) -> None:
    if value is not None:
        setattr(message, name, value)


def _set_constraint(message: own_pb.GenerateRequest, given: StructuredOutputs | None) -> None:
    if given is None:
        return
    kinds = given.model_fields_set
    if len(kinds) != 1:
        raise _wrong(
            "structured_outputs",
            f"structured_outputs has {', '.join(sorted(kinds)) or 'nothing'}; it must have one of json, regex, "
            "choice, grammar, json_object",
        )
    constraint = message.constraint
    constraint.SetInParent()
    for name in ("json_schema", "regex", "grammar", "json_object"):
        _set(constraint, name, getattr(given, name))
    if given.choice is not None:
        constraint.choice.SetInParent()
        constraint.choice.options.extend(given.choice)


def _set_sparsity(sparsity: own_pb.Sparsity, given: SamplingParameters) -> None:
    _set(sparsity, "density", given.density)
    _set(sparsity, "target_kl", given.target_kl)
    if given.policy is None:
        return
    if given.policy not in _POLICIES:
        raise _wrong(
            "policy", f"policy {given.policy!r} is unknown; there are {', '.join(_POLICIES)}"
        )
    sparsity.policy = _POLICIES[given.policy]


def _blamed(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(map(str, first["loc"]))[:_MAX_PATH]  # names in it are the client's
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        return _wrong(
            path, f"{path!r} is unknown; there are {', '.join(SamplingParameters.model_fields)}"
        )
    if not path:
        return _wrong("", f"{first['msg']}; it must be a JSON object")
    return _wrong(path, f"{path} is {first['input']!r}: {first['msg']}")


def _wrong(path: str, what: str) -> InvalidRequest:
    field = f"inputs[sampling_parameters]{'.' if path else ''}{path}"
    return InvalidRequest(field, f"input sampling_parameters: {what}")
