"""Compiling: what is refused, within which bounds, and what happens to the process that does it."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from sparserve.engine import grammar
from sparserve.engine.constraint import Constraint, ConstraintKind
from sparserve.engine.grammar import ConstraintCompiler
from sparserve.errors import InvalidRequest, QueueFull, Unavailable
from sparserve.model.loader import LoadedModel


@pytest.fixture(scope="module")
def compiler(tiny_model: LoadedModel) -> Iterator[ConstraintCompiler]:
    compiler = ConstraintCompiler(tiny_model.tokenizer, 259, [257])
    yield compiler
    compiler.close()


def regex(source: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, source)


REFUSED = [
    ("json_schema", '{"type":', "Expecting value"),
    ("json_schema", "[" * 30_000 + "]" * 30_000, "nested too deeply"),
    ("json_schema", '{"items":' * 500 + "{}" + "}" * 500, "nested"),
    ("json_schema", " " * (1 << 20) + "{}", "the limit is 65536"),
    ("json_schema", "3", "must be an object or a boolean"),
    ("json_schema", "false", "cannot accept any value"),
    ("json_schema", '{"type": "text"}', "type 'text' is none of"),
    ("json_schema", '{"properties": 3}', r"\$\.properties must be an object"),
    ("json_schema", '{"anyOf": {}}', "anyOf must be an array"),
    ("json_schema", '{"type": "object", "required": [[]]}', "is required, but not among"),
    ("json_schema", '{"items": {"type": "string", "pattern": 3}}', "must be a string"),
    ("json_schema", '{"type": "string", "maxLength": "3"}', "must be an integer"),
    ("json_schema", '{"type": "string", "maxLength": 4294967297}', "must be an integer in"),
    ("json_schema", '{"type": "string", "format": "colour"}', "format 'colour'"),
    ("json_schema", '{"type": "string", "pattern": "a|\\""}', "quotes, backslashes"),
    ("json_schema", '{"type": "string", "pattern": "\\\\x0A"}', "quotes, backslashes"),
    ("json_schema", '{"type": "string", "pattern": "a+", "minLength": 3}', "a length beside"),
    ("json_schema", '{"type": "array", "uniqueItems": true}', "'uniqueItems' is not supported"),
    ("json_schema", '{"type": "integer", "minimum": 9, "maximum": 3}', "Invalid range"),
    ("json_schema", '{"type": "integer", "minimum": 3, "multipleOf": 7}', "not yet supported"),
    ("json_schema", '{"minimum": 3}', "'minimum' is not supported"),
    ("json_schema", '{"type": "object", "required": ["a"]}', "'a' is required, but not among"),
    ("json_schema", '{"properties": {"a": {"not": {}}}}', r"\$\.properties\.a: keyword 'not'"),
    ("json_schema", '{"allOf": [{"type": "null"}, {}]}', "allOf of several"),
    ("json_schema", '{"anyOf": [{}], "enum": [1]}', "in one schema"),
    ("json_schema", '{"oneOf": [{"type": "number"}, {"type": "integer"}]}', "oneOf"),
    ("json_schema", '{"enum": ["a", 1], "type": "string"}', "1 is not of type string"),
    ("json_schema", '{"$ref": "http://localhost/x"}', "URI should"),
    ("json_schema", '{"$ref": "#"}', "no text"),
    ("regex", "(", "parenthesis"),
    ("regex", "a)", "Unmatched"),
    ("regex", "[a", "Unclosed"),
    ("regex", "(" * 20_000 + "a" + ")" * 20_000, "[Nn]est"),
    ("regex", "a{4294967297}", "too large"),
    ("regex", r"(a)\1", "Backreference"),
    ("regex", "(?=a)b", "Lookahead"),
    ("regex", r"\ba", "Word boundary"),
    ("regex", "a$b", "in the middle"),
    ("regex", r"a\y", "not recognized"),
    ("regex", "\ud800", "not valid Unicode"),
    ("regex", "a\0", "null"),
    ("grammar", "", "root"),
    ("grammar", 'start ::= "a"', "root"),
    ("grammar", "root ::= word", '"word" is not defined'),
    ("grammar", 'root ::= "a', "string literal"),
    ("grammar", "root ::= root", "no text"),
    ("grammar", 'root ::= root "a"', "no text"),
    ("grammar", "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000, "[Nn]est"),
    ("grammar", 'root ::= "a"{1,99999999999}', "too large"),
    ("choice", "[]", "1 to 1024"),
    ("choice", json.dumps([str(i) for i in range(1025)]), "1 to 1024"),
    ("choice", '["a", ""]', "empty"),
    ("choice", '["\\ud800"]', "not valid Unicode"),
]


@pytest.mark.parametrize(
    ("kind", "source", "message"), REFUSED, ids=[f"{k}-{s[:24]}" for k, s, _ in REFUSED]
)
async def test_refused(compiler: ConstraintCompiler, kind: str, source: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidRequest, match=message) as caught:
        await compiler.compile(Constraint(ConstraintKind(kind), source))
    assert caught.value.field == f"constraint.{kind}"
    assert len(str(caught.value)) < 500
    assert time.monotonic() - started < 20
    # None of them spoils the next one.
    assert await compiler.compile(regex("a")) is not None


@pytest.mark.parametrize(
    "source", ["(a{1,1000}){1,1000}", "((a*)*)*b", "(a|b)*" * 100, "|".join(map(str, range(9000)))]
)
async def test_large_is_served_or_refused(compiler: ConstraintCompiler, source: str) -> None:
    started = time.monotonic()
    try:
        await compiler.compile(regex(source))
    except InvalidRequest as error:
        assert error.field == "constraint.regex"  # noqa: PT017
    assert time.monotonic() - started < 20


async def test_late_is_killed_and_the_loop_goes_on(tiny_model: LoadedModel) -> None:
    compiler = ConstraintCompiler(tiny_model.tokenizer, 259, [257], timeout_seconds=0.5)
    try:
        await compiler.compile(regex("a"))
        hard = asyncio.create_task(compiler.compile(regex("(a|b)*" * 5000)))
        ticks = 0
        while not hard.done():
            await asyncio.sleep(0.01)
            ticks += 1
        with pytest.raises(InvalidRequest, match=r"more than 0\.5 s to compile"):
            await hard
        assert ticks > 15
        assert await compiler.compile(regex("b")) is not None
    finally:
        compiler.close()


async def test_a_crash_is_the_constraints_own(compiler: ConstraintCompiler) -> None:
    await compiler.compile(regex("before"))
    hard = asyncio.create_task(compiler.compile(regex("(a|b)*" * 5000)))
    await asyncio.sleep(0.3)
    for child in psutil.Process().children():
        child.send_signal(signal.SIGSEGV)
    with pytest.raises(InvalidRequest, match=r"the compiler failed on it \(SIGSEGV\)"):
        await hard
    assert await compiler.compile(regex("after")) is not None


async def test_memory_is_bounded(tiny_model: LoadedModel) -> None:
    compiler = ConstraintCompiler(tiny_model.tokenizer, 259, [257], max_memory_bytes=340 << 20)
    try:
        await compiler.compile(regex("a"))
        with pytest.raises(InvalidRequest, match="needs more than 356515840 bytes"):
            await compiler.compile(regex("(.{1,500}){1,30}"))
        assert await compiler.compile(regex("b")) is not None
    finally:
        compiler.close()


async def test_compiled_once(compiler: ConstraintCompiler) -> None:
    first, *others = await asyncio.gather(*(compiler.compile(regex("once")) for _ in range(5)))
    assert all(other is first for other in others)
    assert await compiler.compile(regex("once")) is first


async def test_a_waiter_that_leaves_does_not_take_the_others_along(
    compiler: ConstraintCompiler,
) -> None:
    tasks = [asyncio.create_task(compiler.compile(regex("leave"))) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(done[0], asyncio.CancelledError)
    assert done[1] is done[2]
    assert not isinstance(done[1], BaseException)


async def test_the_cache_is_bounded(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "MAX_CACHED", 2)
    compiler = ConstraintCompiler(tiny_model.tokenizer, 259, [257], cache_bytes=100_000)
    try:
        first, second = [await compiler.compile(regex(source)) for source in "ab"]
        assert await compiler.compile(regex("a")) is first  # now the younger one
        await compiler.compile(regex("c"))
        assert await compiler.compile(regex("a")) is first
        assert await compiler.compile(regex("b")) is not second
        large = regex("(a{1,1000}){1,1000}")
        assert await compiler.compile(large) is not await compiler.compile(large)
    finally:
        compiler.close()


async def test_too_many_waiting(compiler: ConstraintCompiler) -> None:
    tasks = [compiler.compile(regex(f"many{i}")) for i in range(grammar.MAX_WAITING + 3)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    full = [result for result in results if isinstance(result, QueueFull)]
    assert len(full) == 3
    assert "16 constraints waiting to be compiled" in str(full[0])
    assert not any(isinstance(r, BaseException) for r in results if r not in full)


async def test_a_process_that_died_idle_is_replaced(compiler: ConstraintCompiler) -> None:
    await compiler.compile(regex("alive"))
    for child in psutil.Process().children():
        if child.status() == psutil.STATUS_ZOMBIE:  # of a test before, not reaped yet
            continue
        if any("grammar_worker" in part for part in child.cmdline()):
            child.kill()
            psutil.wait_procs([child], timeout=0.2)
    assert await compiler.compile(regex("again")) is not None


async def test_close_ends_the_process_and_whoever_waits(tiny_model: LoadedModel) -> None:
    compiler = ConstraintCompiler(tiny_model.tokenizer, 259, [257])
    before = set(psutil.Process().children())
    kept = await compiler.compile(regex("a"))
    (worker,) = set(psutil.Process().children()) - before
    waiting = asyncio.create_task(compiler.compile(regex("(a|b)*" * 5000)))
    await asyncio.sleep(0.1)
    compiler.close()
    assert not worker.is_running()
    with pytest.raises(Unavailable, match="stopping"):
        await waiting
    with pytest.raises(Unavailable, match="stopping"):
        await compiler.compile(regex("b"))
    assert not kept.matcher().is_finished
    compiler.close()


# No guard for __main__, and no close.
SCRIPT = """
import asyncio, psutil, sys
from sparserve.engine.constraint import Constraint, ConstraintKind
from sparserve.engine.grammar import ConstraintCompiler
from tokenizers import Tokenizer
compiler = ConstraintCompiler(Tokenizer.from_file(sys.argv[1]), 259, [257])
asyncio.run(compiler.compile(Constraint(ConstraintKind.REGEX, "a")))
print(psutil.Process().children()[0].pid)
"""


def test_nothing_is_left_behind(tiny_model: LoadedModel, tmp_path: object) -> None:
    tokenizer = f"{tmp_path}/tokenizer.json"
    tiny_model.tokenizer.save(tokenizer)
    script = f"{tmp_path}/script.py"
    with open(script, "w") as file:
        file.write(SCRIPT)
    ran = subprocess.run(
        [sys.executable, script, tokenizer], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    deadline = time.monotonic() + 5
    while psutil.pid_exists(int(ran.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(int(ran.stdout))
