"""The reference backend: plain torch, obvious, slow; the oracle for every other backend.

A sequence's output must not depend on its batch mates or on how its prompt was cut, to the bit. A
matrix product's bits depend on its shape, though not on a row's place or neighbours, so every
product here has a shape that the sequence alone decides: prompt rows go through tiles of
PREFILL_TILE absolute positions, decode rows through tiles of a fixed number of rows, attention over
a context length set by the position. Rows that pad a tile are zero and are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from sparse_kernels.choice import ChoiceKind
from sparse_kernels.weights import ChoiceTensors
from sparserve.model import llama
from sparserve.model.backend import (
    BLOCK_SIZE,
    BackendInfo,
    Candidates,
    ForwardBatch,
    ForwardOutput,
    NeuronReads,
    Phase,
    SequenceInput,
    TargetScores,
)
from sparserve.model.candidates import concatenate_scores, target_scores, top_candidates
from sparserve.model.config import ModelConfig
from sparserve.model.kv_cache import PagedKVCache, bytes_per_block
from sparserve.model.reference_choice import Choosing, LayerUnion
from sparserve.model.weights import LayerWeights, ModelWeights, step_weight_bytes
from sparserve.sparsity.statistics import NeuronStatistics, neuron_scores

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
    contexts: Mapping[int, tuple[_Context, ...]]  # attention window -> what the rows see


@dataclass(frozen=True, slots=True)
class _Context:
    """What some rows of one sequence attend to: a tile of PREFILL_TILE absolute positions in a
    prompt, or a single decoded token, so that several at once equal single steps."""

    rows: slice
    slots: torch.Tensor  # slots of the positions in sight that exist
    mask: torch.Tensor | None = None  # [PREFILL_TILE, positions up to the tile's end]


@dataclass(frozen=True, slots=True)
class _Layout:
    token_ids: torch.Tensor  # [rows] padded
    positions: torch.Tensor  # [rows]
    spans: tuple[_Span, ...]  # in the batch's order
    linear: llama.Linear  # over all rows: prefill tiles first, then decode tiles


class ReferenceBackend:
    """See `sparserve.model.backend.Backend`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        *,
        num_blocks: int,
        threads: int,
        choice: ChoiceTensors = ChoiceTensors(),
    ) -> None:
        self.config = config
        self.num_blocks = num_blocks
        self._weights = weights
        self._choice = choice
        self._dtype = weights.dtype
        self._decode_tile = DECODE_TILE[weights.dtype]
        self._kv = PagedKVCache(config, num_blocks, weights.dtype)
        self._frequencies = llama.rope_frequencies(
            config.rope, config.head_dim, weights.rope_factors
        )
        self._windows = {config.window(layer) for layer in range(config.num_layers)}
        row = config.hidden_size * weights.dtype.itemsize
        neurons = torch.tensor([(row, 2 * row, 0, 0)] * config.num_layers).double()
        dtype, device = str(weights.dtype).removeprefix("torch."), str(weights.embedding.device)
        self.info = BackendInfo(
            "reference",
            device,
            dtype,
            threads,
            choices=frozenset() if choice.gate_factors is None else frozenset({ChoiceKind.GATE}),
            layer_neuron_bytes=dict.fromkeys((None, ChoiceKind.GATE), neurons),
            weight_bytes=step_weight_bytes(config, weights.dtype),
            packed_bytes=step_weight_bytes(config, weights.dtype)
            + (0 if config.tie_word_embeddings else weights.embedding.nbytes),
            mlp_bytes=config.mlp_parameters * weights.dtype.itemsize,
            kv_dtype=dtype,
            kv_bytes_per_token=bytes_per_block(config, weights.dtype) // BLOCK_SIZE,
        )

    def read_blocks(self, block_ids: Sequence[int]) -> torch.Tensor:
        return self._kv.read_blocks(block_ids)

    def write_blocks(self, block_ids: Sequence[int], blocks: torch.Tensor) -> None:
        self._kv.write_blocks(block_ids, blocks)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        if torch.get_num_threads() != self.info.threads:  # one number for all of a process
            torch.set_num_threads(self.info.threads)
        layout = self._lay_out(batch)
        cos, sin = llama.rope_tables(
            layout.positions, self._frequencies, self.config.rope.attention_factor
        )
        statistics = [self._new_statistics(s) for s in batch.sequences]
        choosing = Choosing.of(self._choice, self.config.num_layers, list(batch.sequences))
        x = self._weights.embedding[layout.token_ids].float()  # [rows, hidden]
        for index, layer in enumerate(self._weights.layers):
            # A layer computes where its weights are; the KV cache stays in main memory.
            x, cos, sin = (tensor.to(layer.wq.device) for tensor in (x, cos, sin))
            x = x + self._attention(index, layer, x, cos, sin, layout)
            x = x + self._feed_forward(index, layer, x, layout, statistics, choosing)
        scores = [self._scores(x, span) for span in layout.spans]
        output = ForwardOutput(self._candidates(x, layout), statistics, scores)
        if choosing.union is None:
            return output
        return replace(output, reads=choosing.reads, union=NeuronReads(choosing.union, 1))

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layout: _Layout,
    ) -> torch.Tensor:
        config, linear, eps = self.config, layout.linear, self.config.rms_norm_eps
        normed, head_dim = llama.rms_norm(x, layer.attn_norm, eps), config.head_dim
        q, k, v = (
            llama.project_heads(linear, normed, weight, bias, norm, eps, head_dim)
            for weight, bias, norm in (
                (layer.wq, layer.bq, layer.q_norm),
                (layer.wk, layer.bk, layer.k_norm),
                (layer.wv, layer.bv, None),
            )
        )
        rotated = llama.apply_rope(torch.cat((q, k), dim=1), cos, sin)
        size = config.layer(index)
        q, k = torch.split(rotated, [size.num_heads, size.num_kv_heads], dim=1)
        out = x.new_zeros(len(x), size.num_heads * head_dim)
        for span in layout.spans:
            self._kv.write(index, span.slots, k[span.rows], v[span.rows])
            for context in span.contexts[config.window(index)]:
                keys, values = (t.to(x.device) for t in self._kv.gather(index, context.slots))
                mask = None if context.mask is None else context.mask.to(x.device)
                if mask is not None:
                    # What is not there yet counts as zero: a block still holds what its last owner
                    # wrote, and 0 times a NaN would be a NaN.
                    padding = (0, 0, 0, mask.shape[1] - keys.shape[1])
                    keys, values = F.pad(keys, padding), F.pad(values, padding)
                out[context.rows] = llama.attention(q[context.rows], keys, values, mask)
        projected = linear(out, layer.wo)
        return projected if layer.bo is None else projected + layer.bo

    def _feed_forward(
        self,
        index: int,
        layer: LayerWeights,
        x: torch.Tensor,
        layout: _Layout,
        statistics: Sequence[Sequence[NeuronStatistics] | None],
        choosing: Choosing,
    ) -> torch.Tensor:
        normed = llama.rms_norm(x, layer.mlp_norm, self.config.rms_norm_eps)
        gate, up = llama.gate_and_up(layout.linear, normed, layer)
        activations = gate * up
        for span, parts in zip(layout.spans, statistics, strict=True):
            if parts is not None:
                scores = neuron_scores(
                    activations[span.rows], span.sequence.score, span.sequence.score_share
                )
                for part, rows in zip(parts, _rows_by_block(span.sequence), strict=True):
                    part.sums[index, : scores.shape[1]] += scores[rows].sum(dim=0).cpu()
        if choosing.union is not None:
            self._choose(index, gate, activations, layout, choosing)
        out = layout.linear(activations, layer.w_down)
        if layer.bd is not None:
            out = out + layer.bd
        if choosing.union is None:
            return out
        for span in layout.spans:
            more = choosing.corrected(index, span.sequence.choice, normed[span.rows])
            if more is not None:
                out[span.rows] += more
        return out

    def _choose(
        self,
        index: int,
        gate: torch.Tensor,
        activations: torch.Tensor,
        layout: _Layout,
        choosing: Choosing,
    ) -> None:
        """Sets activations [rows, intermediate] that are not used to zero."""
        assert choosing.union is not None
        none = torch.zeros(activations.shape[1], dtype=torch.bool)
        union = LayerUnion(none, none.clone())
        if any(reads is None for reads in choosing.reads):
            union = LayerUnion(torch.ones_like(none), torch.ones_like(none))
        for span, reads in zip(layout.spans, choosing.reads, strict=True):
            if reads is not None:
                used = choosing.used(index, span.sequence.choice, reads, gate[span.rows], union)
                activations[span.rows] = activations[span.rows].masked_fill(~used, 0)
        choosing.union[index] = union.counts()

    def _candidates(self, x: torch.Tensor, layout: _Layout) -> Candidates:
        wanted = [
            (span.rows.start + offset, span.sequence.temperature)
            for span in layout.spans
            for offset in span.sequence.output_offsets
        ]
        if not wanted:
            return top_candidates(torch.zeros(0, self.config.vocab_size), torch.ones(0))
        logits = self._logits(x[[row for row, _ in wanted]], Phase.DECODE)
        return top_candidates(logits, torch.tensor([t for _, t in wanted]))

    def _logits(self, x: torch.Tensor, phase: Phase) -> torch.Tensor:
        """x [rows, hidden], for prefill whole tiles -> [rows, vocab] float32 in main memory."""
        padding = -len(x) % self._decode_tile if phase is Phase.DECODE else 0
        padded = F.pad(x.to(self._weights.embedding.device), (0, 0, 0, padding))
        normed = llama.rms_norm(padded, self._weights.norm, self.config.rms_norm_eps)
        linear = self._tiled_linear(len(padded), len(padded) if phase is Phase.PREFILL else 0)
        return linear(normed, self._weights.lm_head)[: len(x)].cpu()

    def _scores(self, x: torch.Tensor, span: _Span) -> TargetScores | None:
        """Log-probabilities of a sequence's targets, tile by tile: whole logits would be large."""
        targets, parts = span.sequence.targets, []
        first, stop = span.rows.start, span.rows.start + len(targets)
        for context in span.contexts[self.config.window(0)]:
            tile = context.rows
            scored = range(max(tile.start, first), min(tile.stop, stop))
            if scored:
                logits = self._logits(x[tile], span.sequence.phase)
                logits = logits[scored.start - tile.start : scored.stop - tile.start]
                wanted = targets[scored.start - first : scored.stop - first]
                parts.append(target_scores(logits, wanted, span.sequence.num_top))
        return concatenate_scores(parts) if parts else None

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
            out = torch.empty(rows, features, dtype=weight.dtype, device=x.device)
            for tile in prefill:
                out[tile] = F.linear(x[tile], weight)
            for start in range(0, features if decode else 0, chunk):
                part = weight[start : start + chunk]
                for tile in decode:
                    out[tile, start : start + chunk] = F.linear(x[tile], part)
            return out.float()

        return linear

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

        def place(index: int, sequence: SequenceInput, first: int, padding: int) -> None:
            """Append the sequence's tokens so that they begin at row `first`."""
            q_len = len(sequence.token_ids)
            before = first - len(token_ids)
            token_ids.extend([0] * before + list(sequence.token_ids) + [0] * padding)
            positions.extend(
                [0] * before + list(range(sequence.start, sequence.start + q_len)) + [0] * padding
            )
            slots = self._kv.slots(sequence.block_table, 0, sequence.start + q_len)
            look = (
                self._prefill_contexts if sequence.phase is Phase.PREFILL else self._decode_contexts
            )
            contexts = {window: look(sequence, first, slots, window) for window in self._windows}
            rows = slice(first, first + q_len)
            spans[index] = _Span(sequence, rows, slots[sequence.start :], contexts)

        for index, sequence in enumerate(batch.sequences):
            if sequence.phase is Phase.PREFILL:
                base = len(token_ids)
                first = base + sequence.start % PREFILL_TILE
                padding = -(first - base + len(sequence.token_ids)) % PREFILL_TILE
                place(index, sequence, first, padding)
        prefill_rows = len(token_ids)
        for index, sequence in enumerate(batch.sequences):
            if sequence.phase is Phase.DECODE:
                place(index, sequence, len(token_ids), 0)
        padding = -(len(token_ids) - prefill_rows) % self._decode_tile
        token_ids.extend([0] * padding)
        positions.extend([0] * padding)
        ordered = tuple(spans[i] for i in range(len(batch.sequences)))
        linear = self._tiled_linear(len(token_ids), prefill_rows)
        return _Layout(torch.tensor(token_ids), torch.tensor(positions), ordered, linear)

    def _decode_contexts(
        self, sequence: SequenceInput, first: int, slots: torch.Tensor, window: int
    ) -> tuple[_Context, ...]:
        """One context for each token; `slots` are those of all positions, from row `first` on."""
        contexts = []
        for offset in range(len(sequence.token_ids)):
            stop = sequence.start + offset + 1
            begin = max(0, stop - window) if window else 0
            row = first + offset
            contexts.append(_Context(slice(row, row + 1), slots[begin:stop]))
        return tuple(contexts)

    def _prefill_contexts(
        self, sequence: SequenceInput, first: int, slots: torch.Tensor, window: int
    ) -> tuple[_Context, ...]:
        """One context for each tile that the tokens touch; the first begins before row `first`."""
        contexts = []
        row = first - sequence.start % PREFILL_TILE
        for start in range(
            sequence.start - sequence.start % PREFILL_TILE, len(slots), PREFILL_TILE
        ):
            stop = start + PREFILL_TILE
            begin = max(0, start + 1 - window) if window else 0
            keys, queries = torch.arange(begin, stop)[None, :], torch.arange(start, stop)[:, None]
            hidden = keys > queries
            if window:
                hidden |= keys <= queries - window
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            contexts.append(_Context(slice(row, row + PREFILL_TILE), slots[begin:stop], mask))
            row += PREFILL_TILE
        return tuple(contexts)


def _rows_by_block(sequence: SequenceInput) -> list[slice]:
    """Which of a sequence's tokens stand in each KV block they touch; position 0, the attention sink,
    is left out."""
    start, stop = sequence.start, sequence.start + len(sequence.token_ids)
    bounds = range(start - start % BLOCK_SIZE, stop, BLOCK_SIZE)
    return [
        slice(max(first, start, 1) - start, max(min(first + BLOCK_SIZE, stop), 1) - start)
        for first in bounds
    ]
