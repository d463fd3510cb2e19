"""The systems whose quality is measured, and the original they are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sparserve.bench.quality import Logits, Window
from sparserve.engine.block_manager import blocks_for
from sparserve.errors import ConfigError
from sparserve.model.backend import Backend, ForwardBatch, Phase, SequenceInput


class ServedModel:
    """A backend, driven as the engine drives it: prompts in chunks, then one token a step."""

    system = "sparserve"
    policy = "dense"
    density = 1.0
    refresh = 0

    def __init__(self, backend: Backend, windows: Sequence[Window], chunk: int) -> None:
        """`chunk`: prompt tokens of one step at most."""
        self._backend = backend
        self._chunk = chunk
        self.format = backend.info.dtype
        middle = len(windows[0].prompt) + len(windows[0].fed) // 2
        self.bytes_per_token = backend.info.weight_bytes + backend.info.kv_bytes_per_token * middle
        self.mlp_bytes = backend.info.mlp_bytes

    def logits(self, windows: Sequence[Window]) -> Iterator[Logits]:
        """Raises ConfigError where the KV cache cannot hold these windows at once."""
        tables = _tables(self._backend, windows)
        for window, table in zip(windows, tables, strict=True):
            for start in range(0, len(window.prompt), self._chunk):
                part = window.prompt[start : start + self._chunk]
                prompt = SequenceInput(part, start, table, Phase.PREFILL)
                self._backend.forward(ForwardBatch([prompt]))
        decoded: list[list[Logits]] = [[] for _ in windows]
        for step in range(len(windows[0].fed)):
            batch = [
                SequenceInput(
                    (window.fed[step],),
                    len(window.prompt) + step,
                    table,
                    Phase.DECODE,
                    output_offsets=(0,),
                )
                for window, table in zip(windows, tables, strict=True)
            ]
            candidates = self._backend.forward(ForwardBatch(batch)).candidates
            for row, rows in enumerate(decoded):
                rows.append(candidates.full_logits(row).cpu().numpy())
        yield from map(np.stack, decoded)


class Original:
    """The model in float32, each window computed at once."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def logits(self, windows: Sequence[Window]) -> Iterator[Logits]:
        for window in windows:
            tokens = (*window.prompt, *window.fed)
            offsets = range(len(window.prompt), len(tokens))
            (table,) = _tables(self._backend, [window])
            sequence = SequenceInput(tokens, 0, table, Phase.PREFILL, output_offsets=offsets)
            candidates = self._backend.forward(ForwardBatch([sequence])).candidates
            yield np.stack(
                [candidates.full_logits(row).cpu().numpy() for row in range(len(offsets))]
            )


def _tables(backend: Backend, windows: Sequence[Window]) -> list[list[int]]:
    """A block table for each window, from the first block on."""
    needed = blocks_for(len(windows[0].prompt) + len(windows[0].fed))
    if needed * len(windows) > backend.num_blocks:
        raise ConfigError(
            f"{len(windows)} windows need {needed * len(windows)} KV blocks, the cache has "
            f"{backend.num_blocks}; raise --kv-cache-gib or lower --prompt-tokens"
        )
    return [list(range(i * needed, (i + 1) * needed)) for i in range(len(windows))]
