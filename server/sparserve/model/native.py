"""The native backend, on the CPU or a GPU: weights in bfloat16 or integers, KV in bfloat16 or int8, one call
of the library for a step.

Its kernels give a row the same bits in any batch, in any cut of a prompt, on any number of threads;
with bfloat16 weights in prompts and decode alike, with integers in each of them.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from sparse_kernels._abi import SK_CHOICE_TOKENS, SK_SCAN_NEEDED
from sparse_kernels.decoder import Decoder, Rows, Wanted
from sparse_kernels.device import describe
from sparse_kernels.kv_memory import as_bytes
from sparserve.model.backend import (
    BLOCK_SIZE,
    BackendInfo,
    Candidates,
    ForwardBatch,
    ForwardOutput,
    HeadCounts,
    NeuronReads,
    Phase,
    SequenceInput,
    TargetScores,
)
from sparserve.model.candidates import concatenate_scores, target_scores
from sparserve.model.config import ModelConfig
from sparserve.model.merge import Call, kept, merged
from sparserve.model.weight_bytes import bytes_of_a_step, layer_neuron_bytes
from sparserve.sparsity.statistics import NeuronStatistics

log = logging.getLogger(__name__)

# Of the KV cache, by the bits of a number: its name, and the bytes of a head's scale for one token.
KV_DTYPES = {16: "bfloat16", 8: "int8"}
KV_SCALE_BYTES = {16: 0, 8: 2}
# Rows of prompt log-probabilities whose logits are in memory at once.
SCORED_ROWS = 64


class NativeBackend:
    """See `sparserve.model.backend.Backend`."""

    def __init__(self, config: ModelConfig, decoder: Decoder, *, num_blocks: int) -> None:
        """Raises MemoryError, or of a GPU's NativeCallError."""
        self.config = config
        self.num_blocks = num_blocks
        self._decoder = decoder
        self._graphs_told = decoder.graphs() is None  # in the log
        # Layer by layer, of each [num_blocks, bytes of a block of this layer].
        self._kv = decoder.new_kv(num_blocks)
        kv_heads = [own.num_kv_heads for own in config.layers]
        head = decoder.kv_block_bytes // sum(kv_heads)
        self._layer_block_bytes = [head * own for own in kv_heads]
        # The forward has threads of its own. Torch's would spin beside them for the little that is
        # left to it.
        torch.set_num_threads(1)
        weight_bytes, mlp_bytes = bytes_of_a_step(config, decoder.formats)
        on_cpu = decoder.device == "cpu"
        self.info = BackendInfo(
            "cpu" if on_cpu else "cuda",
            "cpu" if on_cpu else str(describe(decoder.device)),
            str(decoder.formats),
            decoder.threads,
            choices=decoder.choices,
            layer_neuron_bytes=layer_neuron_bytes(config, decoder.formats),
            weight_bytes=weight_bytes,
            mlp_bytes=mlp_bytes,
            packed_bytes=decoder.packed_bytes,
            kv_dtype=KV_DTYPES[decoder.kv_bits],
            kv_bytes_per_token=decoder.kv_block_bytes // BLOCK_SIZE,
            isa=decoder.isa if on_cpu else "",
        )

    def read_blocks(self, block_ids: Sequence[int]) -> torch.Tensor:
        """[blocks, bytes of all layers] uint8."""
        sizes = self._layer_block_bytes
        blocks = torch.empty(len(block_ids), sum(sizes), dtype=torch.uint8)
        layers = torch.split(blocks, sizes, dim=1)
        for layer, places, offset in self._pieces(block_ids):
            read = self._kv.read(offset, (places.stop - places.start) * sizes[layer])
            layers[layer][places] = read.view(-1, sizes[layer])
        return blocks

    def write_blocks(self, block_ids: Sequence[int], blocks: torch.Tensor) -> None:
        layers = torch.split(blocks, self._layer_block_bytes, dim=1)
        for layer, places, offset in self._pieces(block_ids):
            self._kv.write(offset, as_bytes(layers[layer][places].contiguous()))

    def _pieces(self, block_ids: Sequence[int]) -> Iterator[tuple[int, slice, int]]:
        """(layer, places in `block_ids`, offset in KV memory) of blocks that lie in one piece: to copy each
        block of each layer by itself would take a GPU as long as a step."""
        breaks = [i for i, (a, b) in enumerate(pairwise(block_ids), start=1) if b != a + 1]
        pieces = list(pairwise([0, *breaks, len(block_ids)]))
        layer_begin = 0
        for layer, size in enumerate(self._layer_block_bytes):
            for begin, end in pieces:
                yield layer, slice(begin, end), layer_begin + block_ids[begin] * size
            layer_begin += self.num_blocks * size

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        """Raises ValueError of a sequence that chooses neurons for more than SK_CHOICE_TOKENS tokens."""
        sequences, calls = batch.sequences, self._calls(batch.sequences)
        if len(calls) == 1:
            return self._forward(sequences, prompts=calls[0].prompts, union=calls[0].union)
        outputs = []
        for call in calls:
            own = [sequences[place] for place in call.places]
            output = self._forward(own, prompts=call.prompts, union=call.union)
            outputs.append(output if call is calls[-1] else kept(output))
        return merged(sequences, calls, outputs)

    def _calls(self, sequences: Sequence[SequenceInput]) -> list[Call]:
        """Integer weights multiply prompts in another way, and few tokens at a time can choose neurons."""
        own_way = self._decoder.formats.layers_quantized
        decode = [i for i, s in enumerate(sequences) if s.phase is Phase.DECODE]
        choosing = any(not sequences[i].choice.is_dense for i in decode)
        if not choosing and (not own_way or len(decode) in (0, len(sequences))):
            return [Call(range(len(sequences)), own_way and not decode, union=False)]
        prefill = [i for i, s in enumerate(sequences) if s.phase is Phase.PREFILL]
        parts = _split(sequences, decode) if choosing else [decode]
        calls = [Call(prefill, own_way, union=False)] if prefill else []
        return calls + [Call(part, prompts=False, union=choosing) for part in parts]

    def _forward(
        self, sequences: Sequence[SequenceInput], *, prompts: bool, union: bool
    ) -> ForwardOutput:
        """One call of the library; with `union` it tells what all sequences together read."""
        output_rows: list[int] = []
        temperatures: list[float] = []
        hidden_rows: list[int] = []
        needed: list[int] = []
        first = 0  # row of the sequence's first token
        for sequence in sequences:
            output_rows += [first + offset for offset in sequence.output_offsets]
            temperatures += [sequence.temperature] * len(sequence.output_offsets)
            needed += [sequence.needed] * len(sequence.output_offsets)
            hidden_rows += range(first, first + len(sequence.targets))
            first += len(sequence.token_ids)
        with_scan = self._decoder.has_scan
        rescored = array("I", bytes(4 * len(needed) * with_scan))
        wanted = [self._wanted(sequence) for sequence in sequences]
        read = torch.zeros(self.config.num_layers, 4, dtype=torch.int64) if union else None
        rows = self._decoder.forward(
            sequences,
            self._kv,
            output_rows=output_rows,
            temperatures=temperatures,
            hidden_rows=hidden_rows,
            prompts=prompts,
            wanted=wanted,
            needed=needed if with_scan else None,
            rescored=rescored if with_scan else None,
            union_reads=read,
            leave_logits=not hidden_rows,  # whose logits would overwrite them
        )
        if not self._graphs_told:
            self._tell_graphs()
        statistics = [
            None if own.statistics is None else _by_block(sequence, own.statistics)
            for sequence, own in zip(sequences, wanted, strict=True)
        ]
        reads = [
            None if own.reads is None else NeuronReads(own.reads, len(sequence.token_ids))
            for sequence, own in zip(sequences, wanted, strict=True)
        ]
        known: list[int] = []
        if with_scan:
            whole = self.config.vocab_size
            known = [
                0 if count == whole else own for own, count in zip(needed, rescored, strict=True)
            ]
        scores = list(self._scores(sequences, rows.hidden))
        counts = _head_counts(needed, known, rescored)
        return ForwardOutput(
            self._candidates(rows, known),
            statistics,
            scores,
            counts,
            reads if union else (),
            None if read is None else NeuronReads(read, 1),
        )

    def _tell_graphs(self) -> None:
        """Why a GPU's steps are not launched as graphs, as soon as it is so."""
        counts = self._decoder.graphs()
        if counts is not None and counts.why_not:
            log.warning(
                "decoding steps are launched kernel by kernel, without CUDA graphs: %s",
                counts.why_not,
            )
            self._graphs_told = True

    def _candidates(self, rows: Rows, known: Sequence[int]) -> Candidates:
        return Candidates(
            token_ids=rows.candidate_ids,
            logits=rows.candidate_logits,
            log_normalizer=rows.log_normalizers,
            log_normalizer_1=rows.log_normalizers_1,
            full_logits=lambda row: self._decoder.row_of_logits(rows, row),
            known=known,
        )

    def _wanted(self, sequence: SequenceInput) -> Wanted:
        chooses = sequence.phase is Phase.DECODE and not sequence.choice.is_dense
        return Wanted(
            choice=sequence.choice if chooses else None,
            statistics=self._new_sums(sequence) if sequence.collect_statistics else None,
            score=sequence.score,
            score_share=sequence.score_share,
            reads=torch.zeros(self.config.num_layers, 4, dtype=torch.int64) if chooses else None,
        )

    def _new_sums(self, sequence: SequenceInput) -> torch.Tensor:
        """[KV blocks that the tokens touch, num_layers, intermediate] int64 zeros."""
        start, stop = sequence.start, sequence.start + len(sequence.token_ids)
        blocks = (stop - 1) // BLOCK_SIZE - start // BLOCK_SIZE + 1
        layers, neurons = self.config.num_layers, self.config.intermediate_size
        return torch.zeros(blocks, layers, neurons, dtype=torch.int64)

    def _scores(
        self, sequences: Sequence[SequenceInput], hidden: torch.Tensor
    ) -> Iterator[TargetScores | None]:
        """`hidden`: states of the rows before each sequence's targets, one after another."""
        first = 0
        for sequence in sequences:
            targets, parts = sequence.targets, []
            if not targets:
                yield None
                continue
            own = hidden[first : first + len(targets)]
            for start in range(0, len(targets), SCORED_ROWS):
                piece = slice(start, start + SCORED_ROWS)
                logits = self._decoder.logits(own[piece])
                parts.append(target_scores(logits, targets[piece], sequence.num_top))
            yield concatenate_scores(parts)
            first += len(targets)


def _split(sequences: Sequence[SequenceInput], places: Sequence[int]) -> list[list[int]]:
    """Those at `places` in parts of SK_CHOICE_TOKENS tokens at most; whoever has more is a part of its own."""
    parts: list[list[int]] = []
    room = 0
    for place in places:
        tokens = len(sequences[place].token_ids)
        if tokens > room or not parts:
            parts.append([])
            room = SK_CHOICE_TOKENS
        parts[-1].append(place)
        room -= tokens
    return parts


def _head_counts(
    needed: Sequence[int], known: Sequence[int], rescored: Sequence[int]
) -> HeadCounts | None:
    if not known:
        return None
    if 0 in known:
        tried = 0 not in needed and sum(needed) <= SK_SCAN_NEEDED
        return HeadCounts(widened=len(known)) if tried else HeadCounts(whole=len(known))
    return HeadCounts(scanned=len(known), rescored=sum(rescored))


def _by_block(sequence: SequenceInput, sums: torch.Tensor) -> list[NeuronStatistics]:
    """One for each KV block; position 0, the attention sink, is no token of it."""
    start, stop = sequence.start, sequence.start + len(sequence.token_ids)
    first = start // BLOCK_SIZE
    return [
        NeuronStatistics(
            part, min((block + 1) * BLOCK_SIZE, stop) - max(block * BLOCK_SIZE, start, 1)
        )
        for block, part in enumerate(sums, start=first)
    ]
