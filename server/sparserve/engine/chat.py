"""Chat messages to the text of a prompt, by the model's own template.

Templates are rendered as transformers renders them (`apply_chat_template`), so that a prompt is the
one that the model was trained on. A template is a program that came with the weights: it runs in
jinja2's sandbox, for a bounded time, and makes a bounded text.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from types import FrameType
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sparserve.errors import ChatUnavailable, InvalidRequest

MAX_PROMPT_CHARACTERS = 1 << 24
MAX_RENDER_SECONDS = 5.0  # of this thread's CPU time; a usual template takes a millisecond
# transformers marks the end of the text to be continued with it, and cuts there.
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
# What the server itself gives to a template.
_OWN_NAMES = ("messages", "tools", "documents", "add_generation_prompt")


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a template is given: messages and tools in the shape that transformers takes.

    A message is {"role", "content", "name"?, "tool_calls"?, "tool_call_id"?}, a tool {"type":
    "function", "function": {"name", "description", "parameters"}}. What a model's template does not
    know is refused, never left out.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    continue_final_message: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)  # more names for the template


class ChatTemplate:
    """A template and the special tokens that it may name; safe to use from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = special_tokens

    def render(self, conversation: Conversation) -> str:
        """The prompt that asks the model for its next words.

        Takes milliseconds, and up to MAX_RENDER_SECONDS: call it off the event loop. Raises
        ChatUnavailable where the template is no template, and InvalidRequest where it does not take
        this conversation, or would leave a part of it out unsaid.
        """
        template = self._template
        for name in _OWN_NAMES:
            if name in conversation.arguments:
                raise InvalidRequest(
                    f"template_arguments.{name}", f"{name} is set by the server; use another name"
                )
        if conversation.tools and not self._knows_tools:
            raise InvalidRequest(
                "tools", "this model's chat template does not know tools; leave them out"
            )
        for i, message in enumerate(conversation.messages):
            self._check_message(message, f"messages[{i}]")
        messages = [dict(message) for message in conversation.messages]
        if conversation.continue_final_message:
            if (role := messages[-1]["role"]) != "assistant":
                raise InvalidRequest(
                    "continue_final_message",
                    f"the last message's role is {role!r}; it must be assistant",
                )
            messages[-1]["content"] += _CONTINUE_TAG
        names = {
            **self._special_tokens,
            **conversation.arguments,
            "messages": messages,
            "tools": list(conversation.tools) or None,
            "documents": None,
            "add_generation_prompt": not conversation.continue_final_message,
        }
        text = _run(template, names)
        if conversation.continue_final_message:
            text = _cut_at_tag(text, str(conversation.messages[-1]["content"]))
        return text

    @cached_property
    def _template(self) -> Template:
        try:
            with _bounded_time():
                return _ENVIRONMENT.from_string(self.source)
        except TemplateSyntaxError as error:
            raise ChatUnavailable(
                f"the model's chat template is not valid (line {error.lineno}: {error.message}); "
                "send a plain prompt with Generate"
            ) from error
        except Exception as error:
            raise ChatUnavailable(
                f"the model's chat template cannot be compiled ({_told(error)}); "
                "send a plain prompt with Generate"
            ) from error

    def _check_message(self, message: Mapping[str, Any], path: str) -> None:
        """Raises InvalidRequest for what the template would leave out of the prompt, unsaid.

        That is what it mentions nowhere: `tool_calls`, `name`, the role `tool` (unless it writes
        whatever role there is), and `tool_call_id` where it knows no `tool_calls` either: a template
        that does tells by the order of messages which call a result belongs to.
        """
        mentions = self._mentions
        left_out = [name for name in ("tool_calls", "name") if name not in mentions]
        if not mentions & {"tool_calls", "tool_call_id"}:
            left_out.append("tool_call_id")
        for name in left_out:
            if name in message:
                raise InvalidRequest(
                    f"{path}.{name}",
                    f"this model's chat template does not know {name}; leave it out",
                )
        if message["role"] == "tool" and "tool" not in mentions and not self._writes_any_role:
            raise InvalidRequest(
                f"{path}.role", "this model's chat template does not know the role tool"
            )

    @cached_property
    def _knows_tools(self) -> bool:
        return any(name.name == "tools" for name in self._tree.find_all(nodes.Name))

    @cached_property
    def _mentions(self) -> set[str]:
        """Names that follow a dot and constants: message.role, message["role"], role == "tool"."""
        constants = (node.value for node in self._tree.find_all(nodes.Const))
        return {node.attr for node in self._tree.find_all(nodes.Getattr)} | {
            value for value in constants if isinstance(value, str)
        }

    @cached_property
    def _writes_any_role(self) -> bool:
        """It takes a role for more than to compare it with the roles that it knows."""
        compared = [
            read
            for compare in self._tree.find_all(nodes.Compare)
            for read in _reads(compare, "role")
        ]
        return len(_reads(self._tree, "role")) > len(compared)

    @cached_property
    def _tree(self) -> nodes.Template:
        return _ENVIRONMENT.parse(self.source)


def _reads(node: nodes.Node, key: str) -> list[nodes.Node]:
    """Where something's item or attribute `key` is read: m.role, m["role"]."""
    items = node.find_all(nodes.Getitem)
    return [
        *(each for each in node.find_all(nodes.Getattr) if each.attr == key),
        *(each for each in items if isinstance(each.arg, nodes.Const) and each.arg.value == key),
    ]


class _Refused(TemplateError):
    """The template called raise_exception."""


class _TooMuch(Exception):
    """The template passed a bound."""


class _Environment(ImmutableSandboxedEnvironment):
    # Computed in C while every other thread waits, and folded when a template is compiled.
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) < 2**64 and abs(right) < 64):
            raise _TooMuch("the power of too large numbers")
        if operator == "*" and _product_length(left, right) > MAX_PROMPT_CHARACTERS:
            raise _TooMuch("a product that is too large")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks for training what the model said; no more."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: jinja2's own escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _environment()


def _run(template: Template, names: Mapping[str, Any]) -> str:
    pieces, length = [], 0
    try:
        with _bounded_time():
            for piece in template.generate(names):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_PROMPT_CHARACTERS:
                    raise _TooMuch(f"more than {MAX_PROMPT_CHARACTERS} characters of text")
    except _Refused as error:
        raise InvalidRequest(
            "messages", f"the model's chat template refuses these messages: {error}"
        ) from error
    except Exception as error:  # it is a program of the model's authors: anything can happen
        raise InvalidRequest(
            "messages", f"the model's chat template failed on these messages: {_told(error)}"
        ) from error
    return "".join(pieces)


@contextmanager
def _bounded_time() -> Iterator[None]:
    """Raises _TooMuch in the block when its time is up.

    No jinja2 setting ends a loop, and nothing outside can end a thread; a trace function sees each
    line that this one runs.
    """
    end = time.thread_time() + MAX_RENDER_SECONDS

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if time.thread_time() > end:
            raise _TooMuch(f"more than {MAX_RENDER_SECONDS:g} s of work")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _cut_at_tag(text: str, final: str) -> str:
    """The rendered text up to the end of the message to be continued, as transformers cuts it."""
    tag = _CONTINUE_TAG.strip()
    if tag not in text or final.strip() not in text:
        raise InvalidRequest(
            "continue_final_message",
            "the model's chat template changes the last message, so that it cannot be continued",
        )
    at = text.rindex(tag)
    # Where the template strips messages, the space before the tag is its own work too.
    return text[:at] if text.startswith(_CONTINUE_TAG, at) else text[:at].rstrip()


def _product_length(left: Any, right: Any) -> int:
    """Items of a repeated sequence, bits of a product of whole numbers."""
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(count, int):
            return len(sequence) * count
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length()
    return 0


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if not isinstance(error, _TooMuch) else str(error)
