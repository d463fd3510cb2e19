"""Compiles constraints with xgrammar, and follows them token by token."""

from __future__ import annotations

import asyncio
import copy
import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xgrammar
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sparserve.engine.constraint import Constraint, ConstraintKind
from sparserve.engine.grammar_process import GrammarProcess, refusal
from sparserve.errors import QueueFull, Unavailable

MAX_SOURCE_BYTES = 64 << 10  # of a schema, a regex, a grammar, or all choices together
MAX_CHOICES = 1024
MAX_WAITING = 16  # constraints, other than those cached
MAX_CACHED = 1024
# CPU time that one token may cost; the process that compiles tries a constraint out at a fifth of
# it, but only on random texts.
MAX_STEP_SECONDS = 0.25

_CONTROL = re.compile(rb"[\x00-\x09\x0b\x0c\x0e-\x1f]")


class ConstraintCompiler:
    """Constraints of one model's requests, each compiled once while it stays in the cache.

    `compile` belongs on one event loop; compiling happens in a process of its own, which starts with
    the first constraint (about two seconds) and again after it had to be killed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        *,
        timeout_seconds: float = 10.0,
        max_memory_bytes: int = 1 << 30,
        cache_bytes: int = 256 << 20,
        on_compiled: Callable[[ConstraintKind, float], None] = lambda kind, seconds: None,
    ) -> None:
        """`on_compiled` hears of each compilation and its seconds. `vocab_size` is the embedding's; `max_memory_bytes` of data the compiling process may have
        (it needs about 320 MiB for itself), `cache_bytes` of compiled constraints are kept.
        """
        eos = sorted(set(eos_token_ids))
        vocabulary = token_bytes(tokenizer, vocab_size)
        self._timeout_seconds = timeout_seconds
        self._cache_bytes = cache_bytes
        self._process = GrammarProcess(vocabulary, eos, timeout_seconds, max_memory_bytes)
        self._tokenizer_info = xgrammar.TokenizerInfo(
            vocabulary, vocab_size=vocab_size, stop_token_ids=eos
        )
        texts = [token_id for token_id, token in enumerate(vocabulary) if token]
        texts = sorted({*texts} - {*eos})
        self._text_mask = _bits(texts, vocab_size)
        # xgrammar lets raw control characters into JSON strings of a bounded length, though no line
        # breaks. Outside of strings JSON can do without its only other one, the tab.
        json_texts = [i for i in texts if not _CONTROL.search(vocabulary[i])]
        self._json_text_mask = _bits(json_texts, vocab_size)
        self._eos_mask = _bits(eos, vocab_size)
        self._thread = ThreadPoolExecutor(1, "constraints")
        self._cache: OrderedDict[Constraint, GrammarConstraint] = OrderedDict()
        self._waiting: dict[Constraint, asyncio.Task[GrammarConstraint]] = {}
        self._on_compiled = on_compiled
        self._closed = False

    async def compile(self, constraint: Constraint) -> GrammarConstraint:
        """Raises InvalidRequest where the constraint cannot be used, QueueFull where too many wait to
        be compiled, Unavailable once closed.
        """
        if constraint in self._cache:
            self._cache.move_to_end(constraint)
            return self._cache[constraint]
        task = self._waiting.get(constraint)
        if task is None:
            if self._closed:
                raise Unavailable("the server is stopping")
            _check_source(constraint)
            if len(self._waiting) >= MAX_WAITING:
                what = "constraints waiting to be compiled"
                raise QueueFull(what, len(self._waiting), MAX_WAITING, self._timeout_seconds)
            task = asyncio.get_running_loop().create_task(self._compile(constraint))
            self._waiting[constraint] = task
        # Whoever asked first may leave: the others, and the cache, still want it.
        return await asyncio.shield(task)

    def close(self) -> None:
        """End the compiling process; whoever waits gets Unavailable. Compiled constraints live on."""
        self._closed = True
        self._process.close()
        self._thread.shutdown()

    async def _compile(self, constraint: Constraint) -> GrammarConstraint:
        loop, started = asyncio.get_running_loop(), time.monotonic()
        try:
            compiled = await loop.run_in_executor(self._thread, self._compile_here, constraint)
        finally:
            del self._waiting[constraint]
        self._on_compiled(constraint.kind, time.monotonic() - started)
        self._cache[constraint] = compiled
        while self._cached_bytes > self._cache_bytes or len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return compiled

    def _compile_here(self, constraint: Constraint) -> GrammarConstraint:
        serialized = self._process.compile(constraint)
        grammar = xgrammar.CompiledGrammar.deserialize_json(serialized, self._tokenizer_info)
        size = grammar.memory_size_bytes + len(constraint.source)
        is_json = constraint.kind in (ConstraintKind.JSON_SCHEMA, ConstraintKind.JSON_OBJECT)
        text_mask = self._json_text_mask if is_json else self._text_mask
        return GrammarConstraint(constraint, grammar, text_mask, self._eos_mask, size)

    @property
    def _cached_bytes(self) -> int:
        return sum(compiled.size_bytes for compiled in self._cache.values())


@dataclass(frozen=True, slots=True, eq=False)
class GrammarConstraint:
    """A compiled constraint: a `CompiledConstraint`. The masks are int32 [ceil(vocab_size / 32)]."""

    constraint: Constraint
    grammar: xgrammar.CompiledGrammar
    text_mask: npt.NDArray[np.int32]
    eos_mask: npt.NDArray[np.int32]
    size_bytes: int

    def matcher(self) -> GrammarMatcher:
        return GrammarMatcher(self)


class GrammarMatcher:
    """Follows one choice: a `Matcher`."""

    def __init__(self, compiled: GrammarConstraint) -> None:
        self._compiled = compiled
        self._matcher = xgrammar.GrammarMatcher(compiled.grammar)
        self._mask = np.empty_like(compiled.text_mask)
        self._is_filled = False

    @property
    def is_finished(self) -> bool:
        if self._matcher.is_terminated():
            return True
        if not self._matcher.is_completed():
            return False
        self._fill()
        return not np.any(self._mask & self._compiled.text_mask)

    def allowed(self) -> npt.NDArray[np.int32]:
        self._fill()
        if not self._mask.any():
            raise refusal(self._compiled.constraint, "no token of this model can go on from here")
        return self._mask

    def accept(self, token_id: int) -> None:
        started = time.thread_time()
        self._is_filled = False
        if not self._matcher.accept_token(token_id):
            raise ValueError(f"token {token_id} was not among those allowed")
        self._check_time(started)

    def fork(self) -> GrammarMatcher:
        other = copy.copy(self)
        other._matcher, other._mask = self._matcher.fork(), self._mask.copy()
        return other

    def _fill(self) -> None:
        if self._is_filled:
            return
        started = time.thread_time()
        self._matcher.fill_next_token_bitmask(self._mask)
        # A grammar can name token ids, also those that no text may have.
        self._mask &= self._compiled.text_mask | self._compiled.eos_mask
        self._is_filled = True
        self._check_time(started)

    def _check_time(self, started: float) -> None:
        """The engine thread serves everyone: a constraint that holds it up ends its own request."""
        seconds = time.thread_time() - started
        if seconds > MAX_STEP_SECONDS:
            raise refusal(
                self._compiled.constraint,
                f"it is too slow to follow: {seconds:.2f} s for one token, the limit is "
                f"{MAX_STEP_SECONDS} s; make it less ambiguous",
            )


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """What each token id adds to a text, [vocab_size]; nothing for special tokens and for the ids of
    the embedding's padding.
    """
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    # The stop tokens do not matter here, but none given means a guess and a warning.
    info = xgrammar.TokenizerInfo.from_huggingface(fast, vocab_size=vocab_size, stop_token_ids=[0])
    vocabulary: list[bytes] = info.decoded_vocab
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        if token.special and token_id < vocab_size:
            vocabulary[token_id] = b""
    return vocabulary


def _bits(token_ids: Sequence[int], vocab_size: int) -> npt.NDArray[np.int32]:
    """int32 [ceil(vocab_size / 32)], bit `id % 32` of word `id // 32` set."""
    flags = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    flags[list(token_ids)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)


def _check_source(constraint: Constraint) -> None:
    try:
        length = len(constraint.source.encode())
    except UnicodeEncodeError as error:  # lone surrogates
        raise refusal(constraint, "it is not valid Unicode text") from error
    if length > MAX_SOURCE_BYTES:
        raise refusal(constraint, f"it has {length} bytes, the limit is {MAX_SOURCE_BYTES}")
    if constraint.kind is ConstraintKind.CHOICE:
        _check_choices(constraint)


def _check_choices(constraint: Constraint) -> None:
    options = json.loads(constraint.source)
    if not 1 <= len(options) <= MAX_CHOICES:
        raise refusal(constraint, f"it has {len(options)} options; 1 to {MAX_CHOICES} are allowed")
    for option in options:
        if not option or "\0" in option:
            raise refusal(constraint, f"option {option!r} is empty or has a NUL character")
        try:
            option.encode()
        except UnicodeEncodeError as error:
            raise refusal(constraint, "an option is not valid Unicode text") from error
