"""Log lines: text or JSON, and what each says of the call that it was written in.

Whatever a client sent is escaped, so that it can forge neither a line nor a field.
"""

from __future__ import annotations

import json
import logging
import re
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO

from opentelemetry.trace import INVALID_SPAN_CONTEXT, SpanContext, format_span_id, format_trace_id
from pythonjsonlogger.core import RESERVED_ATTRS, merge_record_extra
from pythonjsonlogger.json import JsonFormatter

Format = Literal["text", "json"]

_MAX_LENGTH = 256  # of what a client says of itself, in characters
_PLAIN = re.compile(r"[\w.:/@%+\[\]-]+", re.ASCII)  # a field's value that needs no quotes


@dataclass(slots=True)
class CallRecord:
    """What the log tells of one call; its servicer fills in what it learns."""

    span: SpanContext = INVALID_SPAN_CONTEXT  # the caller's
    request_id: str = ""
    user: str = ""
    key: str = ""  # the name of the caller's key
    prompt_tokens: int | None = None  # None: it was refused before they were counted
    completion_tokens: int = 0
    cached_tokens: int = 0
    ttft_seconds: float = 0.0
    finish_reasons: list[str] = field(default_factory=list)  # of its choices
    policy: str = ""
    densities: list[float] = field(default_factory=list)  # of its choices, see SparsityReport
    blamed_field: str = ""  # what an error is about; never its value

    def context(self) -> dict[str, str]:
        """The fields of every line that is written during the call."""
        known = {"request_id": self.request_id[:_MAX_LENGTH]} if self.request_id else {}
        if self.span.is_valid:
            known["trace_id"] = format_trace_id(self.span.trace_id)
            known["span_id"] = format_span_id(self.span.span_id)
        return known

    def summary(self) -> dict[str, object]:
        """The fields of the line that ends the call."""
        known: dict[str, object] = {**self.context()}
        if self.key:
            known["key"] = self.key
        if self.user:
            known["user"] = self.user[:_MAX_LENGTH]
        if self.prompt_tokens is not None:
            known["prompt_tokens"] = self.prompt_tokens
            known["completion_tokens"] = self.completion_tokens
        if self.finish_reasons:
            known["finish_reason"] = ",".join(self.finish_reasons)
            known["cached_tokens"] = self.cached_tokens
            known["policy"] = self.policy
            known["density"] = round(sum(self.densities) / len(self.densities), 4)
            known["ttft_ms"] = round(self.ttft_seconds * 1000, 1)
        if self.blamed_field:
            known["field"] = self.blamed_field[:_MAX_LENGTH]
        return known


_call: ContextVar[CallRecord | None] = ContextVar("call", default=None)


def current_call() -> CallRecord:
    """The record of the call that this code runs in; outside of one, a record that nobody reads."""
    return _call.get() or CallRecord()


def set_current_call(record: CallRecord) -> None:
    """For the rest of this task: gRPC runs each call in one of its own."""
    _call.set(record)


def configure(level: str, format: Format) -> None:
    """Let all loggers write to stderr."""
    logging.basicConfig(level=level.upper(), handlers=[make_handler(format)])
    # It warns of every caller's malformed tracestate.
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)


def make_handler(format: Format, stream: TextIO | None = None) -> logging.Handler:
    """Writes to `stream`, None: stderr."""
    handler = logging.StreamHandler(stream)
    handler.addFilter(_add_context)
    handler.setFormatter(_json_formatter() if format == "json" else _TextFormatter())
    return handler


def _add_context(record: logging.LogRecord) -> bool:
    for name, value in current_call().context().items():
        if not hasattr(record, name):
            setattr(record, name, value)
    return True


def _json_formatter() -> logging.Formatter:
    return JsonFormatter(
        ["levelname", "name", "message"],
        rename_fields={"levelname": "level", "name": "logger"},
        timestamp=True,
    )


class _TextFormatter(logging.Formatter):
    """`time LEVEL logger: message field=value …`; the lines of a traceback follow indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = merge_record_extra(record, {}, RESERVED_ATTRS)
        said = (f" {name}={_quoted(value)}" for name, value in fields.items())
        return _escaped(super().formatMessage(record)) + "".join(said)

    def formatException(self, ei: Any) -> str:
        lines = super().formatException(ei).splitlines()
        return "\n".join(f"    {_escaped(line)}" for line in lines)


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _quoted(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
