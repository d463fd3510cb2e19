"""The engine as a model of lm-eval (needs that package). What is scored is decoded, token by token, as
it would be served: a policy or format that only decode uses is measured, not passed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sparserve.bench.quality import Window
from sparserve.bench.scored import Driver
from sparserve.engine.block_manager import blocks_for
from sparserve.engine.engine import Engine
from sparserve.engine.request import GenerationRequest, SamplingParams, StoppingParams
from sparserve.errors import ConfigError

DEFAULT_NEW_TOKENS = 256  # lm-eval's own

# (what is going on, done, total)
Progress = Callable[[str, int, int], None]


class EngineModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """`engine` must have no other user, and no prefix cache: scoring takes its KV blocks."""

    def __init__(self, engine: Engine, on_progress: Progress) -> None:
        super().__init__()
        self._engine = engine
        self._on_progress = on_progress
        config = engine.backend.config
        first = (config.bos_token_id, *config.eos_token_ids)
        self._prefix = next((token for token in first if token is not None), 0)

    @property
    def eot_token_id(self) -> int:
        return next(iter(self._engine.backend.config.eos_token_ids), self._prefix)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self._prefix

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """By default with what the tokenizer puts around a text, but for a BOS that is there already."""
        tokenizer = self._engine.tokenizer.tokenizer
        if add_special_tokens is None:
            bos = tokenizer.id_to_token(self._prefix)
            add_special_tokens = not (bos and string.startswith(bos))
        return list(tokenizer.encode(string, add_special_tokens=add_special_tokens).ids)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Without a bar of lm-eval's own."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return scores

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._score([self._window(before, scored) for _, before, scored in requests])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the context's length; each token is scored once."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self._prefix,
                max_seq_len=self._engine.limits.max_context,
                context_len=1,
            )
            own = [self._window(*make_disjoint_window(pair)) for pair in pairs]
            windows += own
            counts.append(len(own))
        scores = iter(self._score(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _window(self, before: Sequence[int], scored: Sequence[int]) -> Window:
        """All of `before` but its last token is the prompt; what does not fit the context is left out."""
        room = self._engine.limits.max_context + 1 - len(scored)
        if room < 1:
            raise ConfigError(
                f"a continuation of {len(scored)} tokens does not fit the context of {room - 1 + len(scored)}; "
                "raise --max-context"
            )
        before = before[-room:]
        return Window(tuple(before[:-1]), (before[-1], *scored[:-1]), tuple(scored))

    def _score(self, windows: Sequence[Window]) -> list[tuple[float, bool]]:
        """(log-probability of the targets, whether each was the likeliest token) of each window."""
        scores = [0.0] * len(windows)
        greedy = [True] * len(windows)
        done = 0
        for group in self._groups(windows):
            self._on_progress("scoring continuations", done, len(windows))
            some = [windows[index] for index in group]
            for place, step, row in Driver(self._engine).rows(some):
                index = group[place]
                target = windows[index].targets[step]
                scores[index] += float(torch.log_softmax(row.double(), dim=0)[target])
                greedy[index] &= int(row.argmax()) == target
            done += len(group)
        self._on_progress("scoring continuations", len(windows), len(windows))
        return list(zip(scores, greedy, strict=True))

    def _groups(self, windows: Sequence[Window]) -> Iterator[list[int]]:
        """Indices of windows to run together: those of one prompt, then of similar length, as many as
        there is room for.
        """
        group: list[int] = []
        blocks = 0

        def order(index: int) -> tuple[int, tuple[int, ...], int]:
            window = windows[index]
            return -len(window.prompt), window.prompt, -len(window.fed)

        for index in sorted(range(len(windows)), key=order):
            needed = blocks_for(windows[index].tokens)
            full = len(group) == self._engine.limits.max_running
            if group and (full or blocks + needed > self._engine.backend.num_blocks):
                yield group
                group, blocks = [], 0
            group.append(index)
            blocks += needed
        if group:
            yield group

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, through the engine as it serves them."""
        for index, (context, options) in enumerate(request.args for request in requests):
            request = self._request(str(index), context, options)
            self._engine.validate(request)
            self._engine.add(request)
        texts = [""] * len(requests)
        done = 0
        while self._engine.has_work:
            for update in self._engine.step():
                texts[int(update.request_id)] += update.text
                if update.finish is not None:
                    if update.finish.error is not None:
                        raise update.finish.error
                    done += 1
                    self._on_progress("generating", done, len(requests))
        return texts

    def _request(self, request_id: str, context: str, options: dict[str, Any]) -> GenerationRequest:
        if options.get("do_sample") and options.get("temperature", 1):
            raise ConfigError(
                "tasks that sample are not supported; set do_sample: false in the task"
            )
        until = options.get("until") or []
        stop = [until] if isinstance(until, str) else until
        limit = self._engine.limits.max_context
        new_tokens = min(int(options.get("max_gen_toks", DEFAULT_NEW_TOKENS)), limit - 1)
        prompt = self.tok_encode(context)[new_tokens - limit :]
        return GenerationRequest(
            request_id,
            tuple(prompt or [self._prefix]),
            SamplingParams(temperature=0),
            StoppingParams(max_tokens=new_tokens, stop=tuple(text for text in stop if text)),
        )
