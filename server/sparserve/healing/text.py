"""What a student learns from: windows of given texts, and of what the original model writes itself."""

from __future__ import annotations

import logging
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
from sparserve.model.text import TextFiles, check_length, read_files, shares

log = logging.getLogger(__name__)

# The model goes on after so many tokens of a given text: what it writes is then like what will be served.
PROMPT_TOKENS = 12
HELD_OUT_PART = 4  # one of so many windows of a kind, at most
RUNNING = 32  # sequences that it writes at once

# (tokens written, tokens in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Token ids, int64 [windows, tokens]."""

    training: torch.Tensor
    held_out: torch.Tensor


def read_given(model: LoadedModel, how: Heal, files: Sequence[Path]) -> TextFiles:
    """Each text once: of one that is there twice, windows would be learned and held out.

    Raises ConfigError of files that cannot be read, of windows beyond the model's context, and of less than there
    must be to learn from."""
    check_length(model, how.window, "the window")
    read = read_files(model, files)
    once = dict(zip(read.files, read.token_ids, strict=True))
    if len(once) < len(files):
        log.warning(
            "a text that is given twice is taken once; files used: %d of %d", len(once), len(files)
        )
        read = TextFiles(list(once.values()), read.hash, list(once))
    there = sum(read.fits(how.window)) + how.generated
    needed = how.held_out * HELD_OUT_PART
    if there < max(needed, how.batch):
        raise ConfigError(
            f"the text has {sum(map(len, read.token_ids))} tokens, {sum(read.fits(how.window))} windows of {how.window}, "
            f"and {how.generated} are generated; healing needs {max(needed, how.batch)}, of which {how.held_out} are held out: "
            "give more text, or generate more"
        )
    return read


def windows_of(how: Heal, given: TextFiles, written: torch.Tensor) -> Windows:
    """`written` [windows, tokens] by the model. What is held out is of both, as far as both are there: the last
    windows of each text, the first that the model wrote."""
    training, held_out = [], []
    for ids, count in zip(given.token_ids, _held_out_of(how, given), strict=True):
        starts = range(0, len(ids) - how.window + 1, how.window)
        rows = [ids[start : start + how.window] for start in starts]
        training += rows[: len(rows) - count]
        held_out += rows[len(rows) - count :]
    of_written = how.held_out - len(held_out)
    return Windows(
        torch.cat((_as_tensor(training, how), written[of_written:])),
        torch.cat((_as_tensor(held_out, how), written[:of_written])),
    )


def _as_tensor(rows: Sequence[Sequence[int]], how: Heal) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).view(-1, how.window)


def _held_out_of(how: Heal, given: TextFiles) -> list[int]:
    """Windows of each text. Those that the model writes give the rest of `how.held_out`."""
    fits = given.fits(how.window)
    # Of neither kind more than a part, so that both are learned from; of what one lacks the other gives more. Only one
    # part is rounded up, so that both together are enough.
    most_read, most_written = sum(fits) // HELD_OUT_PART, -(-how.generated // HELD_OUT_PART)
    of_written = min(most_written, max(how.held_out // 2, how.held_out - most_read))
    of_read = how.held_out - of_written
    return shares(given, of_read, how.window, "--held-out") if of_read else [0] * len(fits)


def write_text(
    model: LoadedModel, settings: EngineSettings, how: Heal, given: TextFiles, on_tokens: Progress
) -> torch.Tensor:
    """`how.generated` windows that `model`, the original, draws at temperature 1, int64 [windows, tokens]: after
    some tokens of the given texts that are trained on, or without them after a random one (LLM-QAT, arXiv 2305.17888).

    Raises as `assemble_engine`.
    """
    if not how.generated:
        return torch.empty(0, how.window, dtype=torch.int64)
    own = {"max_context": how.window, "max_running": RUNNING, "prefix_cache": False, "index": ""}
    as_it_is = in_bfloat16(settings).model_copy(update=own)
    engine = assemble_engine(model, as_it_is).engine
    source = random.Random(how.seed)
    trained = _trained_on(how, given)
    found = {}
    for index in range(how.generated):
        prompt = _prompt(model, trained, how.window, source)
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


def _trained_on(how: Heal, given: TextFiles) -> list[Sequence[int]]:
    """Of each text what comes before its held-out windows."""
    parts = zip(given.token_ids, given.fits(how.window), _held_out_of(how, given), strict=True)
    return [ids[: (fits - count) * how.window] if count else ids for ids, fits, count in parts]


def _prompt(
    model: LoadedModel, texts: Sequence[Sequence[int]], window: int, source: random.Random
) -> tuple[int, ...]:
    length = min(PROMPT_TOKENS, window - 1)
    places = [max(0, len(ids) - length + 1) for ids in texts]
    if not any(places):
        return (source.randrange(model.config.vocab_size),)
    (text,) = source.choices(range(len(places)), weights=places)
    start = source.randrange(places[text])
    return tuple(texts[text][start : start + length])
