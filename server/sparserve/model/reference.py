"""The reference backend: plain torch, obvious, slow; the oracle for every other backend.

A sequence's output must not depend on its batch mates or on how its prompt was cut, to the bit. A
matrix product's bits depend on its shape, though not on a row's place or neighbours, so every
product here has a shape that the sequence alone decides: prompt rows go through tiles of
PREFILL_TILE absolute positions, decode rows through tiles of a fixed number of rows, attention over
a context length set by the position. Rows that pad a tile are zero and are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from sparserve.model import llama
from sparserve.model.backend import (
    BLOCK_SIZE,
    BackendInfo,
    Candidates,
    ForwardBatch,
    ForwardOutput,
    Phase,
    SequenceInput,
    TargetScores,
)
from sparserve.model.candidates import target_scores, top_candidates
from sparserve.model.config import ModelConfig
from sparserve.model.kv_cache import PagedKVCache
from sparserve.model.weights import LayerWeights, ModelWeights
from sparserve.sparsity.policy import PolicyKind
from sparserve.sparsity.statistics import NeuronStatistics, norm_score

PREFILL_TILE = 64
# Rows of a decode product. Measured: in float32 (MKL) one row at a time is fastest alone, and rows after
# the first find the weights in cache; 16-bit products (oneDNN) cost the same up to 16 rows.
DECODE_TILE = {torch.float32: 1, torch.bfloat16: 16, torch.float16: 16}
# Weights go through the rows of a batch in such pieces, which stay in a core's cache meanwhile.
DECODE_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class _Span:
    """Where one sequence's tokens stand among the rows of a batch."""

    sequence: SequenceInput
    rows: slice  # its real rows
    slots: torch.Tensor  # [q_len] where their KV goes
    tiles: tuple[_PrefillTile, ...] = ()
    # One attention per decoded token, so that several at once equal single steps.
    decode_rows: tuple[tuple[slice, torch.Tensor], ...] = ()  # (its row, slots of its context)


@dataclass(frozen=True, slots=True)
class _PrefillTile:
    """PREFILL_TILE rows of one sequence at absolute positions [start, start + PREFILL_TILE)."""

    rows: slice
    context_slots: torch.Tensor  # slots of the positions 0 .. end that exist
    mask: torch.Tensor  # [PREFILL_TILE, context]; context reaches the tile's end


@dataclass(frozen=True, slots=True)
class _Layout:
    token_ids: torch.Tensor  # [rows] padded
    positions: torch.Tensor  # [rows]
    spans: tuple[_Span, ...]  # in the batch's order
    linear: llama.Linear  # over all rows: prefill tiles first, then decode tiles


class ReferenceBackend:
    """See `sparserve.model.backend.Backend`."""

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, *, num_blocks: int, threads: int
    ) -> None:
        self.config = config
        self.num_blocks = num_blocks
        self._weights = weights
        self._dtype = weights.dtype
        self._decode_tile = DECODE_TILE[weights.dtype]
        self._kv = PagedKVCache(config, num_blocks, weights.dtype)
        self._frequencies = llama.rope_frequencies(
            config.rope, config.head_dim, weights.rope_factors
        )
        torch.set_num_threads(threads)
        dtype = str(weights.dtype).removeprefix("torch.")
        self.info = BackendInfo("reference", "cpu", dtype, threads, policies=(PolicyKind.DENSE,))

    def read_blocks(self, block_ids: Sequence[int]) -> torch.Tensor:
        return self._kv.read_blocks(block_ids)

    def write_blocks(self, block_ids: Sequence[int], blocks: torch.Tensor) -> None:
        self._kv.write_blocks(block_ids, blocks)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        layout = self._lay_out(batch)
        cos, sin = llama.rope_tables(layout.positions, self._frequencies)
        statistics = [self._new_statistics(s) for s in batch.sequences]
        x = self._weights.embedding[layout.token_ids].float()  # [rows, hidden]
        for index, layer in enumerate(self._weights.layers):
            x = x + self._attention(index, layer, x, cos, sin, layout)
            x = x + self._feed_forward(index, layer, x, layout, statistics)
        scores = [self._scores(x, span, layout) for span in layout.spans]
        return ForwardOutput(self._candidates(x, layout), statistics, scores)

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layout: _Layout,
    ) -> torch.Tensor:
        config, linear, rows = self.config, layout.linear, x.shape[0]
        normed = llama.rms_norm(x, layer.attn_norm, config.rms_norm_eps)
        q = linear(normed, layer.wq).view(rows, config.num_heads, config.head_dim)
        k = linear(normed, layer.wk).view(rows, config.num_kv_heads, config.head_dim)
        v = linear(normed, layer.wv).view(rows, config.num_kv_heads, config.head_dim)
        rotated = llama.apply_rope(torch.cat((q, k), dim=1), cos, sin)
        q, k = torch.split(rotated, [config.num_heads, config.num_kv_heads], dim=1)
        out = torch.zeros(rows, config.num_heads * config.head_dim)
        for span in layout.spans:
            self._kv.write(index, span.slots, k[span.rows], v[span.rows])
            for row, context_slots in span.decode_rows:
                keys, values = self._kv.gather(index, context_slots)
                out[row] = llama.attention(q[row], keys, values, None)
            for tile in span.tiles:
                keys, values = (
                    # What is not there yet counts as zero: a block still holds what its last owner
                    # wrote, and 0 times a NaN would be a NaN.
                    F.pad(cached, (0, 0, 0, tile.mask.shape[1] - cached.shape[1]))
                    for cached in self._kv.gather(index, tile.context_slots)
                )
                out[tile.rows] = llama.attention(q[tile.rows], keys, values, tile.mask)
        return linear(out, layer.wo)

    def _feed_forward(
        self,
        index: int,
        layer: LayerWeights,
        x: torch.Tensor,
        layout: _Layout,
        statistics: Sequence[Sequence[NeuronStatistics] | None],
    ) -> torch.Tensor:
        normed = llama.rms_norm(x, layer.mlp_norm, self.config.rms_norm_eps)
        activations = llama.neuron_activations(layout.linear, normed, layer)
        for span, parts in zip(layout.spans, statistics, strict=True):
            if parts is not None:
                scores = norm_score(activations[span.rows])
                for part, rows in zip(parts, _rows_by_block(span.sequence), strict=True):
                    part.sums[index] += scores[rows].sum(dim=0)
        return layout.linear(activations, layer.w_down)

    def _candidates(self, x: torch.Tensor, layout: _Layout) -> Candidates:
        wanted = [
            (span.rows.start + offset, span.sequence.temperature)
            for span in layout.spans
            for offset in span.sequence.output_offsets
        ]
        if not wanted:
            return top_candidates(x.new_zeros(0, self.config.vocab_size), torch.ones(0))
        rows = x[[row for row, _ in wanted]]
        padded = F.pad(rows, (0, 0, 0, -len(wanted) % self._decode_tile))
        normed = llama.rms_norm(padded, self._weights.norm, self.config.rms_norm_eps)
        linear = self._tiled_linear(len(padded), prefill_rows=0)
        logits = linear(normed, self._weights.lm_head)[: len(wanted)]
        return top_candidates(logits, torch.tensor([t for _, t in wanted]))

    def _tiled_linear(self, rows: int, prefill_rows: int) -> llama.Linear:
        """Products over `rows` rows whose shapes, so whose bits, do not depend on their number."""
        prefill = [slice(i, i + PREFILL_TILE) for i in range(0, prefill_rows, PREFILL_TILE)]
        decode = [
            slice(i, i + self._decode_tile) for i in range(prefill_rows, rows, self._decode_tile)
        ]

        def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            x = x.to(weight.dtype)
            features, row_bytes = weight.shape[0], weight.shape[1] * weight.element_size()
            chunk = max(1, DECODE_CHUNK_BYTES // row_bytes)
            if chunk >= features and len(prefill) + len(decode) == 1:
                return F.linear(x, weight).float()
            out = torch.empty(rows, features, dtype=weight.dtype)
            for tile in prefill:
                out[tile] = F.linear(x[tile], weight)
            for start in range(0, features if decode else 0, chunk):
                part = weight[start : start + chunk]
                for tile in decode:
                    out[tile, start : start + chunk] = F.linear(x[tile], part)
            return out.float()

        return linear

    def _scores(self, x: torch.Tensor, span: _Span, layout: _Layout) -> TargetScores | None:
        """Log-probabilities of a sequence's targets, tile by tile: whole logits would be large."""
        targets, parts = span.sequence.targets, []
        first, stop = span.rows.start, span.rows.start + len(targets)
        tiles = [t.rows for t in span.tiles] or [rows for rows, _ in span.decode_rows]
        for tile in tiles:
            rows = range(max(tile.start, first), min(tile.stop, stop))
            if not rows:
                continue
            normed = llama.rms_norm(x[tile], self._weights.norm, self.config.rms_norm_eps)
            padded = F.pad(normed, (0, 0, 0, -len(normed) % self._decode_tile))
            linear = self._tiled_linear(len(padded), len(padded) if span.tiles else 0)
            logits = linear(padded, self._weights.lm_head)[rows.start - tile.start :][: len(rows)]
            wanted = targets[rows.start - first : rows.stop - first]
            parts.append(target_scores(logits, wanted, span.sequence.num_top))
        if not parts:
            return None
        return TargetScores(
            torch.cat([p.logprobs for p in parts]),
            torch.cat([p.top_ids for p in parts]),
            torch.cat([p.top_logprobs for p in parts]),
        )

    def _new_statistics(self, sequence: SequenceInput) -> list[NeuronStatistics] | None:
        if not sequence.collect_statistics:
            return None
        layers, neurons = self.config.num_layers, self.config.intermediate_size
        parts = [NeuronStatistics.zeros(layers, neurons) for _ in _rows_by_block(sequence)]
        for part, rows in zip(parts, _rows_by_block(sequence), strict=True):
            part.tokens = rows.stop - rows.start
        return parts

    def _lay_out(self, batch: ForwardBatch) -> _Layout:
        token_ids: list[int] = []
        positions: list[int] = []
        spans: dict[int, _Span] = {}

        def place(index: int, sequence: SequenceInput, first: int, padding: int) -> _Span:
            """Append the sequence's tokens so that they begin at row `first`."""
            q_len = len(sequence.token_ids)
            before = first - len(token_ids)
            token_ids.extend([0] * before + list(sequence.token_ids) + [0] * padding)
            positions.extend(
                [0] * before + list(range(sequence.start, sequence.start + q_len)) + [0] * padding
            )
            slots = self._kv.slots(sequence.block_table, sequence.start, sequence.start + q_len)
            spans[index] = _Span(sequence, slice(first, first + q_len), slots)
            return spans[index]

        for index, sequence in enumerate(batch.sequences):
            if sequence.phase is Phase.PREFILL:
                base = len(token_ids)
                first = base + sequence.start % PREFILL_TILE
                padding = -(first - base + len(sequence.token_ids)) % PREFILL_TILE
                span = place(index, sequence, first, padding)
                tiles = self._prefill_tiles(sequence, base)
                spans[index] = replace(span, tiles=tiles)
        prefill_rows = len(token_ids)
        for index, sequence in enumerate(batch.sequences):
            if sequence.phase is Phase.DECODE:
                span = place(index, sequence, len(token_ids), 0)
                spans[index] = replace(span, decode_rows=self._decode_rows(span))
        padding = -(len(token_ids) - prefill_rows) % self._decode_tile
        token_ids.extend([0] * padding)
        positions.extend([0] * padding)
        ordered = tuple(spans[i] for i in range(len(batch.sequences)))
        linear = self._tiled_linear(len(token_ids), prefill_rows)
        return _Layout(torch.tensor(token_ids), torch.tensor(positions), ordered, linear)

    def _decode_rows(self, span: _Span) -> tuple[tuple[slice, torch.Tensor], ...]:
        sequence = span.sequence
        stop = sequence.start + len(sequence.token_ids)
        slots = self._kv.slots(sequence.block_table, 0, stop)
        rows = range(span.rows.start, span.rows.stop)
        return tuple(
            (slice(row, row + 1), slots[: sequence.start + offset + 1])
            for offset, row in enumerate(rows)
        )

    def _prefill_tiles(self, sequence: SequenceInput, base: int) -> tuple[_PrefillTile, ...]:
        stop = sequence.start + len(sequence.token_ids)
        first_tile = sequence.start // PREFILL_TILE
        tiles = []
        for tile in range(first_tile, (stop - 1) // PREFILL_TILE + 1):
            start = tile * PREFILL_TILE
            context = start + PREFILL_TILE
            slots = self._kv.slots(sequence.block_table, 0, min(context, stop))
            visible = torch.arange(context)[None, :] <= torch.arange(start, context)[:, None]
            mask = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))
            row = base + (tile - first_tile) * PREFILL_TILE
            tiles.append(_PrefillTile(slice(row, row + PREFILL_TILE), slots, mask))
        return tuple(tiles)


def _rows_by_block(sequence: SequenceInput) -> list[slice]:
    """Which of a sequence's tokens stand in each KV block they touch; position 0, the attention sink,
    is left out."""
    start, stop = sequence.start, sequence.start + len(sequence.token_ids)
    bounds = range(start - start % BLOCK_SIZE, stop, BLOCK_SIZE)
    return [
        slice(max(first, start, 1) - start, max(min(first + BLOCK_SIZE, stop), 1) - start)
        for first in bounds
    ]
