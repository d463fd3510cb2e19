"""Log lines as text and JSON: what they hold, and that nobody can forge one."""

import contextvars
import io
import json
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import SpanContext

from sparserve.logs import CallRecord, current_call, make_handler, set_current_call

SPAN = SpanContext(0x4BF92F3577B34DA6A3CE929D0E0E4736, 0xF067AA0BA902B7, is_remote=True)
TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
FORGERY = "x\n2026-01-01 00:00:00,000 INFO sparserve: forged user=root"


def written(format, message, *arguments, call=None, **options) -> str:
    """What a logger writes for one record, inside `call` where one is given."""
    stream = io.StringIO()
    logger = logging.Logger("sparserve.test")
    logger.addHandler(make_handler(format, stream))

    def log() -> None:
        if call is not None:
            set_current_call(call)
        logger.error(message, *arguments, **options)

    contextvars.copy_context().run(log)
    return stream.getvalue()


def test_a_text_line_has_time_level_logger_message_and_fields():
    line = written("text", "took %d", 3, extra={"method": "/a.B/C", "user": "Ann B", "n": 2})
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ERROR sparserve\.test: took 3"
        r' method=/a\.B/C user="Ann B" n=2\n',
        line,
    )


def test_a_json_line_has_the_same_and_the_time_with_its_zone():
    entry = json.loads(written("json", "took %d", 3, extra={"user": "Ann B", "n": 2}))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+\+00:00", entry.pop("timestamp"))
    assert entry == {
        "level": "ERROR", "logger": "sparserve.test", "message": "took 3", "user": "Ann B", "n": 2
    }  # fmt: skip


def test_a_line_in_a_call_names_its_trace_and_request():
    call = CallRecord(SPAN, request_id="r 1")
    entry = json.loads(written("json", "hello", call=call))
    assert entry["trace_id"] == TRACE_ID
    assert entry["span_id"] == SPAN_ID
    assert entry["request_id"] == "r 1"
    text = written("text", "hello", call=call)
    assert text.endswith(f': hello request_id="r 1" trace_id={TRACE_ID} span_id={SPAN_ID}\n')


@pytest.mark.parametrize("call", [None, CallRecord()])
def test_a_line_outside_of_a_call_and_one_without_a_trace_name_none(call):
    entry = json.loads(written("json", "hello", call=call))
    assert set(entry) == {"timestamp", "level", "logger", "message"}


def test_what_is_told_of_no_call_reaches_no_other():
    current_call().request_id = "lost"
    assert current_call().request_id == ""


@given(st.text())
def test_text_from_outside_forges_neither_a_line_nor_a_field(text):
    line = written("text", "got %s", text, extra={"user": text, "end": 1})
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    message, _, rest = line.rpartition(" user=")
    assert message
    if rest.startswith('"'):
        told, end = json.JSONDecoder().raw_decode(rest)
        assert (told, rest[end:]) == (text, " end=1\n")
    else:
        assert rest == f"{text} end=1\n"
        assert not set(text) & set(' "=')


@given(st.text())
def test_a_json_line_stays_one_line_and_gives_the_text_back(text):
    line = written("json", "got %s", text, extra={"user": text})
    assert line.endswith("\n")
    assert line[:-1].isascii()
    assert line[:-1].isprintable()
    entry = json.loads(line)
    assert (entry["message"], entry["user"]) == (f"got {text}", text)


def test_an_errors_text_forges_no_line_in_its_traceback():
    try:
        raise ValueError(f"bad {FORGERY}\x1b[2J\u2028{FORGERY}")
    except ValueError as error:
        text = written("text", "failed", exc_info=error)
        entry = json.loads(written("json", "failed", exc_info=error))
    first, *traceback = text.splitlines()
    assert first.endswith(": failed")
    assert any("Traceback" in line for line in traceback)
    for line in traceback:
        assert line.startswith("    ")
        assert line.isprintable()
    assert FORGERY in entry["exc_info"]
