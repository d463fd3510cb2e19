"""The original that everything is compared with: a model in float32, each window computed at once.

What is kept of it are the rows that the LM head reads, `hidden` numbers a position, not the `vocab`
logits that it makes of them: 60 to 90 times less (30 MB for 200 windows of the demo model, where the
logits take 2.5 GB). The logits come from them by the same product of the same shape every time, so
that a cached original gives the bits of one computed anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from sparserve import __version__
from sparserve.bench.cache import FileCache, fingerprint
from sparserve.bench.quality import Logits, Window
from sparserve.engine.block_manager import blocks_for
from sparserve.model.backend import ForwardBatch, Phase, SequenceInput
from sparserve.model.loader import LoadedModel
from sparserve.model.reference import ReferenceBackend

# To be raised with every change to what the reference backend computes.
COMPUTATION = 1

States = npt.NDArray[np.float32]  # [windows, decoded positions, hidden]


class Original:
    """The distributions to compare with."""

    def __init__(self, model: LoadedModel, windows: Sequence[Window], states: States) -> None:
        self._lm_head = model.weights.lm_head
        self._states = dict(zip(windows, states, strict=True))

    @torch.inference_mode()
    def logits(self, windows: Sequence[Window]) -> Iterator[Logits]:
        for window in windows:
            rows = torch.tensor(self._states[window], device=self._lm_head.device)
            yield F.linear(rows, self._lm_head).cpu().numpy()


def original_states(
    model: LoadedModel,
    windows: Sequence[Window],
    threads: int,
    cache: FileCache | None,
    on_progress: Callable[[str, int, int], None],
) -> States:
    """The rows before the LM head at the decoded positions, from the cache where it has them.

    `model` is in float32. Raises ConfigError where the cache cannot be written.
    """
    if cache is None:
        return _compute(model, windows, threads, on_progress)

    def read(path: str) -> States:
        states: States = np.load(path, mmap_mode="r", allow_pickle=False)
        return states

    key = f"original-{_key(model, windows)}.npy"
    if (path := cache.find(key)) is not None:
        try:
            return read(str(path))
        except (ValueError, OSError, EOFError):  # damaged: computed anew and written over
            pass
    with cache.writing(key) as unfinished:  # first of all: it may fail
        np.save(unfinished, _compute(model, windows, threads, on_progress), allow_pickle=False)
    return read(str(cache.path(key)))


def _key(model: LoadedModel, windows: Sequence[Window]) -> str:
    """Of what the states depend on: this code, the model, and the windows' own tokens."""
    digest = hashlib.sha256(f"{__version__} {COMPUTATION} {fingerprint(model)}".encode())
    for window in windows:
        digest.update(repr((window.prompt, window.fed)).encode())
    return digest.hexdigest()[:40]


def _compute(
    model: LoadedModel,
    windows: Sequence[Window],
    threads: int,
    on_progress: Callable[[str, int, int], None],
) -> States:
    tokens = windows[0].tokens
    offsets = range(len(windows[0].prompt), tokens)
    # With the identity for an LM head, logits are the rows that it reads, to the bit.
    identity = torch.eye(model.config.hidden_size, device=model.weights.lm_head.device)
    backend = ReferenceBackend(
        model.config,
        replace(model.weights, lm_head=identity),
        num_blocks=blocks_for(tokens),
        threads=threads,
    )
    states = np.empty((len(windows), len(offsets), model.config.hidden_size), np.float32)
    for index, window in enumerate(windows):
        on_progress("original in float32", index, len(windows))
        sequence = SequenceInput(
            (*window.prompt, *window.fed),
            0,
            range(backend.num_blocks),
            Phase.PREFILL,
            output_offsets=offsets,
        )
        candidates = backend.forward(ForwardBatch([sequence])).candidates
        for row in range(len(offsets)):
            states[index, row] = candidates.full_logits(row).numpy()
    on_progress("original in float32", len(windows), len(windows))
    return states
