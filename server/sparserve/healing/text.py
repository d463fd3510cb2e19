"""What a student learns from: windows of given texts, and of what the original model writes itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sparserve.compression.healing import Heal
from sparserve.config import EngineSettings
from sparserve.engine.factory import assemble_engine
from sparserve.engine.formats import in_bfloat16
from sparserve.engine.request import GenerationRequest, SamplingParams, StoppingParams
from sparserve.errors import ConfigError
from sparserve.model.loader import LoadedModel
from sparserve.model.text import TextFiles, check_length, read_files

# The model goes on after so many tokens of a given text: what it writes is then like what will be served.
PROMPT_TOKENS = 12
HELD_OUT_SHARE = 0.25  # of the windows of a kind, at most
RUNNING = 32  # sequences that it writes at once

# (tokens written, tokens in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Token ids, int64 [windows, tokens]."""

    training: torch.Tensor
    held_out: torch.Tensor


def read_given(model: LoadedModel, how: Heal, files: Sequence[Path]) -> TextFiles:
    """Raises ConfigError of files that cannot be read, of windows beyond the model's context, and of less than there
    must be to learn from."""
    check_length(model, how.window, "the window")
    read = read_files(model, files)
    there = sum(read.fits(how.window)) + how.generated
    needed = round(how.held_out / HELD_OUT_SHARE)
    if there < max(needed, how.batch):
        raise ConfigError(
            f"the text has {sum(map(len, read.token_ids))} tokens, {sum(read.fits(how.window))} windows of {how.window}, "
            f"and {how.generated} are generated; healing needs {max(needed, how.batch)}, of which {how.held_out} are held out: "
            "give more text, or generate more"
        )
    return read


def windows_of(how: Heal, given: TextFiles, written: torch.Tensor) -> Windows:
    """`written` [windows, tokens] by the model. What is held out is of both, as far as both are there: the last
    windows of the texts, the first that the model wrote."""
    rows = [
        ids[start : start + how.window]
        for ids in given.token_ids
        for start in range(0, len(ids) - how.window + 1, how.window)
    ]
    read = torch.tensor(rows, dtype=torch.int64).view(-1, how.window)
    # Of neither kind more than a part, so that both are learned from; of what one lacks the other gives more.
    most_read, most_written = (round(HELD_OUT_SHARE * len(own)) for own in (read, written))
    of_written = min(most_written, max(how.held_out // 2, how.held_out - most_read))
    of_read = min(most_read, how.held_out - of_written)
    kept = len(read) - of_read
    return Windows(
        torch.cat((read[:kept], written[of_written:])),
        torch.cat((read[kept:], written[:of_written])),
    )


def write_text(
    model: LoadedModel, settings: EngineSettings, how: Heal, given: TextFiles, on_tokens: Progress
) -> torch.Tensor:
    """`how.generated` windows that `model`, the original, draws at temperature 1, int64 [windows, tokens]: after
    some tokens of the given texts, or without them after a random one (LLM-QAT, arXiv 2305.17888).

    Raises as `assemble_engine`.
    """
    if not how.generated:
        return torch.empty(0, how.window, dtype=torch.int64)
    own = {"max_context": how.window, "max_running": RUNNING, "prefix_cache": False, "index": ""}
    as_it_is = in_bfloat16(settings).model_copy(update=own)
    engine = assemble_engine(model, as_it_is).engine
    source = random.Random(how.seed)
    found = {}
    for index in range(how.generated):
        prompt = _prompt(model, given, how.window, source)
        found[str(index)] = list(prompt)
        request = GenerationRequest(
            str(index),
            prompt,
            SamplingParams(temperature=1.0, seed=source.getrandbits(63)),
            StoppingParams(how.window - len(prompt), ignore_eos=True),
        )
        engine.validate(request)
        engine.add(request)
    done, total = 0, sum(how.window - len(own) for own in found.values())
    while engine.has_work:
        for update in engine.step():
            if update.finish is not None and update.finish.error is not None:
                raise update.finish.error
            found[update.request_id] += [token.id for token in update.tokens]
            done += len(update.tokens)
        on_tokens(done, total)
    return torch.tensor([found[str(index)] for index in range(how.generated)])


def _prompt(
    model: LoadedModel, given: TextFiles, window: int, source: random.Random
) -> tuple[int, ...]:
    length = min(PROMPT_TOKENS, window - 1)
    places = [max(0, len(ids) - length + 1) for ids in given.token_ids]
    if not any(places):
        return (source.randrange(model.config.vocab_size),)
    (text,) = source.choices(range(len(places)), weights=places)
    start = source.randrange(places[text])
    return tuple(given.token_ids[text][start : start + length])
