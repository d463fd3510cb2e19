"""Messages and tools, in the shape of OpenAI's API and of transformers, to those of the protocol."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparserve.client.values import set_value, text, wrong
from sparserve.errors import InvalidRequest
from sparserve.v1 import inference_pb2 as pb

Message = Mapping[str, Any] | pb.ChatMessage
ToolSpec = Mapping[str, Any] | pb.Tool

_EXAMPLE = '[{"role": "user", "content": "Hello"}]'


def chat_messages(messages: Sequence[Message]) -> list[pb.ChatMessage]:
    """`content` is text, or a list of text parts, which are joined with nothing between them.

    What is None counts as absent; another key, or a part other than text, is refused by its name.
    Raises InvalidRequest.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise wrong("messages", "messages", messages, f"a list such as {_EXAMPLE}")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def chat_tools(tools: Sequence[ToolSpec] | None) -> list[pb.Tool]:
    """Raises InvalidRequest."""
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Iterable | None):
        raise wrong("tools", "tools", tools, 'a list such as [{"name": "weather"}]')
    return [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools or ())]


def json_text(value: Any, path: str, told: str) -> str:
    """JSON as text, written here unless it is text already. Raises InvalidRequest."""
    if isinstance(value, str):
        return text(value, path, told)
    if not isinstance(value, Mapping):
        raise wrong(path, told, value, "a mapping, or JSON as text")
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(path, f"{told} cannot be written as JSON: {error}") from error


def _message(message: Message, path: str) -> pb.ChatMessage:
    if isinstance(message, pb.ChatMessage):
        return message
    known = ("role", "content", "name", "tool_calls", "tool_call_id")
    given = _known(message, path, known, _EXAMPLE[1:-1])
    made = pb.ChatMessage()
    if "role" not in given:
        raise InvalidRequest(f"{path}.role", f"{path} has no role; set it, such as to user")
    if "content" in given:
        given["content"] = _content(given["content"], f"{path}.content")
    calls = given.pop("tool_calls", ())
    if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Iterable):
        raise wrong(f"{path}.tool_calls", f"{path}.tool_calls", calls, "a list of calls")
    made.tool_calls.extend(
        _tool_call(call, f"{path}.tool_calls[{i}]") for i, call in enumerate(calls)
    )
    for name, value in given.items():
        set_value(made, name, value, f"{path}.{name}")
    return made


def _content(content: Any, path: str) -> str:
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Iterable):
        raise wrong(path, path, content, "a text, or a list of text parts")
    if isinstance(content, str):
        return text(content, path, path)
    return "".join(_text_part(part, f"{path}[{i}]") for i, part in enumerate(content))


def _text_part(part: Any, path: str) -> str:
    given = _known(part, path, None, '{"type": "text", "text": "Hello"}')
    kind = given.get("type")
    if kind != "text":
        raise InvalidRequest(f"{path}.type", f"{path} is of type {kind!r}; only text is served")
    _known(part, path, ("type", "text"), "")
    return text(given.get("text"), f"{path}.text", f"{path}.text")


def _tool_call(call: Any, path: str) -> pb.ToolCall:
    made = pb.ToolCall()
    function, path_of_function = _function(call, path, made, ("name", "arguments"), ("id",))
    if "id" in call and call["id"] is not None:
        set_value(made, "id", call["id"], f"{path}.id")
    if "arguments" in function:
        where = f"{path_of_function}.arguments"
        made.arguments = json_text(function["arguments"], where, where)
    return made


def _tool(tool: ToolSpec, path: str) -> pb.Tool:
    if isinstance(tool, pb.Tool):
        return tool
    made = pb.Tool()
    function, path = _function(tool, path, made, ("name", "description", "parameters"), ())
    if "description" in function:
        set_value(made, "description", function["description"], f"{path}.description")
    if "parameters" in function:
        where = f"{path}.parameters"
        made.parameters = json_text(function["parameters"], where, where)
    return made


def _function(
    given: Any,
    path: str,
    made: pb.Tool | pb.ToolCall,
    known: tuple[str, ...],
    beside: tuple[str, ...],
) -> tuple[dict[str, Any], str]:
    """The function of a tool or call, wrapped as OpenAI's chat API has it or bare, and its path; its
    name is set."""
    example = '{"type": "function", "function": {"name": "weather"}}'
    wrapped = isinstance(given, Mapping) and "function" in given
    outer = _known(given, path, ("type", *beside, *(("function",) if wrapped else known)), example)
    if outer.get("type", "function") != "function":
        kind = outer["type"]
        raise InvalidRequest(f"{path}.type", f"{path} is of type {kind!r}; only function is served")
    function = outer
    if wrapped:
        path = f"{path}.function"
        function = _known(given["function"], path, known, '{"name": "weather"}')
    if "name" not in function:
        raise InvalidRequest(f"{path}.name", f"{path} has no name")
    set_value(made, "name", function["name"], f"{path}.name")
    return function, path


def _known(given: Any, path: str, known: tuple[str, ...] | None, example: str) -> dict[str, Any]:
    """What of a mapping is there: None is absent, and so is False under a key that is not known."""
    if not isinstance(given, Mapping):
        raise wrong(path, path, given, f"a mapping such as {example}")
    present = {key: value for key, value in given.items() if value is not None}
    for key in [] if known is None else [key for key in present if key not in known]:
        if present.pop(key) is not False:
            raise InvalidRequest(
                f"{path}.{key}", f"{path} has a key {key!r}; there are: {', '.join(known or ())}"
            )
    return present
