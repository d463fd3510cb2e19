"""The process that compiles grammars: `python -m sparserve.engine.grammar_worker`, over its pipes.

A grammar comes from whoever sends a request. Compiling one can take any time and memory or overflow
the native stack, so it happens here, where only this process dies of it.

Frames, both ways: the length as 4 bytes, big-endian, then that many bytes. The first frame in is the
setup (JSON, see `main`); the answer is an empty frame. Then each frame in is {"kind", "source"}, and
its answer one byte, COMPILED, REFUSED or OUT_OF_MEMORY, and the compiled grammar as xgrammar's JSON or
the message.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import struct
import sys
import time
from typing import IO

import numpy as np
import xgrammar

from sparserve.engine import json_schema
from sparserve.engine.constraint import Constraint, ConstraintKind

# First byte of an answer.
COMPILED, REFUSED, OUT_OF_MEMORY = b"\x00", b"\x01", b"\x02"

# Of the serialized grammar: 0.6 s to read back. One string with a maxLength of 200 has 12 MiB of it.
MAX_COMPILED_BYTES = 32 << 20
MAX_RECURSION = 1000  # of the native parsers; their stack is 8 MiB
# A trial of the compiled grammar: random texts, within a time per token that decoding can bear.
TRIALS, TRIAL_TOKENS, MAX_TRIAL_STEP_SECONDS = 4, 64, 0.05

_ANY_OBJECT = '{"type": "object", "additionalProperties": true}'


def read_frame(stream: IO[bytes]) -> bytes | None:
    """None at the end of the stream, also in the middle of a frame."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    (length,) = struct.unpack(">I", head)
    frame = stream.read(length)
    return frame if len(frame) == length else None


def write_frame(stream: IO[bytes], frame: bytes) -> None:
    stream.write(struct.pack(">I", len(frame)) + frame)
    stream.flush()


def main() -> None:
    """Serve until stdin ends. The setup is {"vocabulary": each token's bytes as latin-1 text,
    "vocab_size", "eos_token_ids", "timeout_seconds", "max_memory_bytes"}.
    """
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else writes to stdout must not get between the frames
    frame = read_frame(requests)
    if frame is None:
        return
    setup = json.loads(frame)
    tokenizer_info = xgrammar.TokenizerInfo(
        [token.encode("latin-1") for token in setup["vocabulary"]],
        vocab_size=setup["vocab_size"],
        stop_token_ids=setup["eos_token_ids"],
    )
    compiler = _Compiler(tokenizer_info)
    xgrammar.set_max_recursion_depth(MAX_RECURSION)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (setup["max_memory_bytes"],) * 2)
    write_frame(answers, b"")
    while (frame := read_frame(requests)) is not None:
        # The server kills a process that is late; the alarm is for when the server is gone.
        signal.setitimer(signal.ITIMER_REAL, setup["timeout_seconds"] + 1)
        answer = compiler.answer(frame)
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_frame(answers, answer)


class _Compiler:
    def __init__(self, tokenizer_info: xgrammar.TokenizerInfo) -> None:
        self._tokenizer_info = tokenizer_info
        self._compiler = xgrammar.GrammarCompiler(
            tokenizer_info, max_threads=1, cache_enabled=False
        )
        # xgrammar writes what it leaves out of a constraint to the process's stderr.
        self._warnings = os.memfd_create("warnings")
        os.dup2(self._warnings, 2)

    def answer(self, frame: bytes) -> bytes:
        """The answer to one request. Leaves the process fit for the next one, save out of memory."""
        request = json.loads(frame)
        constraint = Constraint(ConstraintKind(request["kind"]), request["source"])
        os.ftruncate(self._warnings, 0)
        os.lseek(self._warnings, 0, os.SEEK_SET)
        try:
            compiled = self._compile(constraint)
            if warning := os.pread(self._warnings, 2000, 0):
                raise ValueError(warning.decode(errors="replace").splitlines()[0])
            serialized: bytes = compiled.serialize_json().encode()
            if len(serialized) > MAX_COMPILED_BYTES:
                raise ValueError(
                    f"the grammar is too large: {len(serialized)} bytes compiled, the limit is "
                    f"{MAX_COMPILED_BYTES}; simplify it"
                )
            _try_out(compiled, self._tokenizer_info.vocab_size)
            return COMPILED + serialized
        except RecursionError:
            return REFUSED + b"it is nested too deeply"
        except MemoryError:
            return OUT_OF_MEMORY
        except (RuntimeError, TypeError, ValueError) as error:
            if "bad_alloc" in str(error):
                return OUT_OF_MEMORY
            return REFUSED + _readable(str(error)).encode(errors="replace")

    def _compile(self, constraint: Constraint) -> xgrammar.CompiledGrammar:
        source = constraint.source
        match constraint.kind:
            case ConstraintKind.JSON_SCHEMA:
                schema = json.loads(source)
                json_schema.check(schema)
                return self._compiler.compile_json_schema(json.dumps(schema))
            case ConstraintKind.JSON_OBJECT:
                return self._compiler.compile_json_schema(_ANY_OBJECT)
            case ConstraintKind.REGEX:
                json_schema.check_repeats(source)
                return self._compiler.compile_regex(source)
            case ConstraintKind.GRAMMAR:
                json_schema.check_repeats(source)
                return self._compiler.compile_grammar(source)
            case ConstraintKind.CHOICE:
                return self._compiler.compile_grammar(_alternation(json.loads(source)))


def _alternation(options: list[str]) -> str:
    """A grammar of exactly these texts; escaping every character leaves no rule to forget."""
    escaped = ("".join(f"\\U{ord(char):08X}" for char in option) for option in options)
    return "root ::= " + " | ".join(f'"{option}"' for option in escaped)


def _try_out(compiled: xgrammar.CompiledGrammar, vocab_size: int) -> None:
    """Raises ValueError where no text can begin, or where random texts are slow to follow."""
    chooser = random.Random(0)
    mask = np.zeros((1, -(-vocab_size // 32)), np.int32)
    for _ in range(TRIALS):
        matcher = xgrammar.GrammarMatcher(compiled)
        for index in range(TRIAL_TOKENS):
            started = time.thread_time()
            matcher.fill_next_token_bitmask(mask)
            ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            if len(ids) == 0:
                if index == 0 and not matcher.is_completed():
                    raise ValueError("no text of this model's tokens matches it")
                break
            matcher.accept_token(int(chooser.choice(ids)))
            seconds = time.thread_time() - started
            if seconds > MAX_TRIAL_STEP_SECONDS:
                raise ValueError(
                    f"it is too slow to follow: {seconds * 1e3:.0f} ms for one token, the limit is "
                    f"{MAX_TRIAL_STEP_SECONDS * 1e3:.0f} ms; make it less ambiguous"
                )
            if matcher.is_terminated():
                break


def _readable(message: str) -> str:
    """An xgrammar message without its time, source line and C++ condition, in at most 300
    characters.
    """
    message = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", message)
    message = message.removeprefix("Warning: ")
    message = re.sub(r"Check failed: \(.*?\) is false: ", "", message)
    message = re.sub(r" The JSON string is:.*", "", message, flags=re.DOTALL).strip()
    return message if len(message) <= 300 else message[:297] + "..."


if __name__ == "__main__":
    main()
