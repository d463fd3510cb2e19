"""Keywords to request messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypedDict, Unpack

from sparserve.client.messages import Message, ToolSpec, chat_messages, chat_tools, json_text
from sparserve.client.values import extend, set_value, text, wrong
from sparserve.errors import InvalidRequest
from sparserve.v1 import inference_pb2 as pb


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
    stop: Sequence[str] | str | None
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
    choose_by: str | None  # "planes" or "gate"
    core_density: float | None
    predictor: str | None  # "stability", "similarity" or "auto"
    score: str | None  # "norm", "count" or "signed_count"
    alpha: float | None
    first_layer: int | None
    last_layer: int | None
    refresh_interval: int | None
    draft: str | None  # "core", "token" or "ngram"
    draft_tokens: int | None
    report_neurons: bool | None
    # the rest
    priority: int | None
    cache_salt: str | None
    adapter: str | None
    user: str | None


class ChatFields(Fields, total=False):
    """The same for a chat, and what makes its prompt beside the messages."""

    tools: Sequence[ToolSpec] | None
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
# Keywords that are not named as their field is: `choice` is a constraint.
_RENAMED = {"choice": "choose_by", "report": "report_neurons"}
_SPARSITY = {
    _RENAMED.get(field.name, field.name): field.name for field in pb.Sparsity.DESCRIPTOR.fields
}
_CONSTRAINTS = ("json_schema", "regex", "grammar", "choice", "json_object")


def make_request(prompt: str | Sequence[int], **fields: Unpack[Fields]) -> pb.GenerateRequest:
    """A request message; a prompt is text or token ids.

    Raises InvalidRequest on a value that the protocol cannot carry, such as a negative seed; ranges
    are the server's to check. Raises TypeError on a keyword that does not exist.
    """
    request = pb.GenerateRequest()
    if isinstance(prompt, str):
        request.text = text(prompt, "text", "the prompt")
    elif isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, Iterable):
        raise wrong("prompt", "the prompt", prompt, "a text or a list of token ids")
    else:
        ids = request.token_ids.DESCRIPTOR.fields_by_name["ids"]
        extend(request.token_ids.ids, ids, prompt, "token_ids", "the prompt")
        request.token_ids.SetInParent()
    _fill(request, fields, Fields)
    return request


def make_chat_request(messages: Sequence[Message], **fields: Unpack[ChatFields]) -> pb.ChatRequest:
    """A chat request; messages and tools in the shape that OpenAI's API and transformers take.

    Raises InvalidRequest on a value that the protocol cannot carry, and TypeError on a keyword that
    does not exist.
    """
    given: dict[str, Any] = dict(fields)
    request = pb.ChatRequest(
        messages=chat_messages(messages), tools=chat_tools(given.pop("tools", None))
    )
    _set_template_arguments(request, given.pop("template_arguments", None))
    _fill(request, given, ChatFields)
    return request


def _fill(
    request: pb.GenerateRequest | pb.ChatRequest, fields: Mapping[str, Any], kind: type[Any]
) -> None:
    for name, value in fields.items():
        if name not in kind.__annotations__:
            raise TypeError(_unknown(name, kind))
        if value is None:
            continue
        if name in _GROUPS:
            group = _GROUPS[name]
            if name == "stop" and isinstance(value, str):
                value = [value]
            set_value(getattr(request, group), name, value, f"{group}.{name}", name)
        elif name in _SPARSITY:
            field = _SPARSITY[name]
            set_value(request.sparsity, field, value, f"sparsity.{field}", name)
        elif name in _CONSTRAINTS:
            _constrain(request, name, value)
        else:
            set_value(request, name, value, name)


def _unknown(name: str, kind: type[Any]) -> str:
    near = get_close_matches(name, kind.__annotations__)
    if name in ChatFields.__annotations__:
        return f"{name!r} is for a chat; a generation has no such field"
    return f"a request has no field {name!r}" + (
        f"; did you mean {' or '.join(near)}?" if near else ""
    )


def _constrain(request: pb.GenerateRequest | pb.ChatRequest, name: str, value: Any) -> None:
    if name == "json_object" and value is False:
        return
    if request.HasField("constraint"):
        raise InvalidRequest("constraint", f"{name} is a second constraint; only one can hold")
    path = f"constraint.{name}"
    if name == "choice":
        set_value(request.constraint.choice, "options", value, path, name)
        request.constraint.choice.SetInParent()
    else:
        value = json_text(value, path, name) if name == "json_schema" else value
        set_value(request.constraint, name, value, path, name)


def _set_template_arguments(request: pb.ChatRequest, arguments: Any) -> None:
    path = "template_arguments"
    if arguments is None:
        return
    if not isinstance(arguments, Mapping):
        raise wrong(path, path, arguments, 'a mapping such as {"enable_thinking": False}')
    for name, value in arguments.items():
        text(name, path, f"a key of {path}")
        try:
            request.template_arguments[name] = value
        except (TypeError, ValueError, OverflowError, RecursionError):
            raise wrong(
                f"{path}.{name}", f"{path}[{name!r}]", value, "what JSON can hold"
            ) from None
