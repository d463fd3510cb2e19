"""This project's engine, driven over given tokens: the quality of what it serves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch

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
        decoded = [
            np.empty((len(w.fed), self._backend.config.vocab_size), np.float32) for w in windows
        ]
        for index, step, row in decoded_rows(self._backend, windows, self._chunk):
            decoded[index][step] = row.cpu().numpy()
        yield from decoded


def decoded_rows(
    backend: Backend, windows: Sequence[Window], chunk: int
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(window, step, logits [vocab] float32) of every decoded position, all windows together; a row is
    valid until the next one is asked for.

    Prompts go in by chunks of `chunk` tokens at most; KV blocks are taken from the first on, so the
    backend must have no other user. Raises ConfigError where the KV cache cannot hold these windows.
    """
    tables = _tables(backend, windows)
    prefilled: dict[tuple[int, ...], list[int]] = {}
    for window, table in zip(windows, tables, strict=True):
        blocks = table[: blocks_for(len(window.prompt))]
        if same := prefilled.get(window.prompt):  # the choices of one question
            backend.write_blocks(blocks, backend.read_blocks(same))
            continue
        for start in range(0, len(window.prompt), chunk):
            part = window.prompt[start : start + chunk]
            backend.forward(ForwardBatch([SequenceInput(part, start, table, Phase.PREFILL)]))
        prefilled[window.prompt] = blocks
    for step in range(max(len(window.fed) for window in windows)):
        running = [index for index, window in enumerate(windows) if step < len(window.fed)]
        batch = [
            SequenceInput(
                (windows[index].fed[step],),
                len(windows[index].prompt) + step,
                tables[index],
                Phase.DECODE,
                output_offsets=(0,),
            )
            for index in running
        ]
        candidates = backend.forward(ForwardBatch(batch)).candidates
        for row, index in enumerate(running):
            yield index, step, candidates.full_logits(row)


def _tables(backend: Backend, windows: Sequence[Window]) -> list[list[int]]:
    """A block table for each window, from the first block on."""
    needed = [blocks_for(window.tokens) for window in windows]
    if sum(needed) > backend.num_blocks:
        raise ConfigError(
            f"{len(windows)} windows need {sum(needed)} KV blocks, the cache has "
            f"{backend.num_blocks}; raise --kv-cache-gib or lower --prompt-tokens"
        )
    blocks = iter(range(backend.num_blocks))
    return [list(islice(blocks, count)) for count in needed]
