"""Keywords to request messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict, Unpack

from sparserve.errors import InvalidRequest
from sparserve.v1 import inference_pb2 as pb

Message = Mapping[str, Any] | pb.ChatMessage
ToolSpec = Mapping[str, Any] | pb.Tool


class Fields(TypedDict, total=False):
    """What a generation may be asked for beside its prompt; None is the server's default.

    Ranges and meanings stand in `proto/sparserve/v1/inference.proto`.
    """

    request_id: str | None
    model: str | None
    # sampling
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    n: int | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    # stopping
    max_tokens: int | None
    min_tokens: int | None
    stop: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    include_stop: bool | None
    # response
    text: bool | None
    token_ids: bool | None
    logprobs: bool | None
    top_logprobs: int | None
    prompt_logprobs: int | None
    skip_special_tokens: bool | None
    # constraint: one of them
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    grammar: str | None
    choice: Sequence[str] | None
    json_object: bool | None
    # sparsity
    policy: str | None  # "dense", "core", "token", "exact" or "auto"
    density: float | None
    target_kl: float | None
    refresh_interval: int | None
    report_neurons: bool | None
    # the rest
    priority: int | None
    cache_salt: str | None
    adapter: str | None
    user: str | None


class ChatFields(Fields, total=False):
    """The same for a chat, and what makes its prompt beside the messages."""

    tools: Sequence[ToolSpec]
    continue_final_message: bool | None
    template_arguments: Mapping[str, Any] | None


_GROUPS: dict[str, str] = {
    field.name: group
    for group, kind in (
        ("sampling", pb.Sampling),
        ("stopping", pb.Stopping),
        ("response", pb.ResponseOptions),
    )
    for field in kind.DESCRIPTOR.fields
}
_SPARSITY = {
    "policy": "policy",
    "density": "density",
    "target_kl": "target_kl",
    "refresh_interval": "refresh_interval",
    "report_neurons": "report",
}
_CONSTRAINTS = ("json_schema", "regex", "grammar", "choice", "json_object")


def make_request(prompt: str | Sequence[int], **fields: Unpack[Fields]) -> pb.GenerateRequest:
    """A request message; a prompt is text or token ids.

    Raises InvalidRequest on a value that the protocol cannot carry, such as a negative seed.
    """
    with _carried():
        request = pb.GenerateRequest(**_grouped(fields))
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
            request.token_ids.SetInParent()
    return request


def make_chat_request(
    messages: Sequence[Message],
    *,
    tools: Sequence[ToolSpec] = (),
    continue_final_message: bool | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    **fields: Unpack[Fields],
) -> pb.ChatRequest:
    """A chat request; messages and tools in the shape that OpenAI's API and transformers take.

    Raises InvalidRequest on a value that the protocol cannot carry.
    """
    with _carried():
        request = pb.ChatRequest(
            messages=[_message(message) for message in messages],
            tools=[_tool(tool) for tool in tools],
            continue_final_message=continue_final_message,
            **_grouped(fields),
        )
        request.template_arguments.update(template_arguments or {})
    return request


def _grouped(fields: Fields) -> dict[str, Any]:
    """Keywords as the fields of a request message."""
    groups: dict[str, Any] = {}
    for name, value in fields.items():
        if name not in Fields.__annotations__:
            raise TypeError(f"a request has no field {name!r}")
        if value is None:
            continue
        if name in _GROUPS:
            groups.setdefault(_GROUPS[name], {})[name] = value
        elif name in _SPARSITY:
            groups.setdefault("sparsity", {})[_SPARSITY[name]] = value
        elif name in _CONSTRAINTS:
            if "constraint" in groups:
                raise InvalidRequest(
                    "constraint", f"{name} is a second constraint; only one can hold"
                )
            groups["constraint"] = {name: _constraint(name, value)}
        else:
            groups[name] = value
    policy = groups.get("sparsity", {}).get("policy")
    if policy is not None:
        groups["sparsity"]["policy"] = f"SPARSITY_POLICY_{policy.upper()}"
    return groups


def _constraint(name: str, value: Any) -> Any:
    if name == "json_schema" and not isinstance(value, str):
        return json.dumps(value)
    return {"options": value} if name == "choice" else value


def _message(message: Message) -> pb.ChatMessage:
    if isinstance(message, pb.ChatMessage):
        return message
    calls = [_tool_call(call) for call in message.get("tool_calls") or ()]
    return pb.ChatMessage(
        role=message["role"],
        content=message.get("content") or "",
        name=message.get("name"),
        tool_calls=calls,
        tool_call_id=message.get("tool_call_id"),
    )


def _tool_call(call: Mapping[str, Any]) -> pb.ToolCall:
    function = call.get("function", call)
    return pb.ToolCall(
        id=call.get("id") or "",
        name=function["name"],
        arguments=_json(function.get("arguments")),
    )


def _tool(tool: ToolSpec) -> pb.Tool:
    if isinstance(tool, pb.Tool):
        return tool
    function = tool.get("function", tool)
    return pb.Tool(
        name=function["name"],
        description=function.get("description") or "",
        parameters=_json(function.get("parameters")),
    )


def _json(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


@contextmanager
def _carried() -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # UnicodeEncodeError is one too
        raise InvalidRequest("request", f"the protocol cannot carry a value: {error}") from error
