"""The native decoder: a model of the library, called with batches of tokens.

A step takes a few milliseconds, so what a call builds anew is kept small: numbers go into arrays and
records in one piece, and structs are written by `struct`, not field by field.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from sparse_kernels import _abi, native
from sparse_kernels.choice import SCORES, ChoiceKind, NeuronChoice, Score
from sparse_kernels.device import parse, usable
from sparse_kernels.kv_memory import KvMemory, new_kv_memory
from sparse_kernels.pack import PackedDecoder, pointer

BLOCK_SIZE = _abi.SK_BLOCK_SIZE
# Rows of logits whose memory is kept between calls: a larger one is for a single call.
KEPT_LOGITS_ROWS = 64
# A copy of cores may take one such part of the memory that is free when a model is made: on the CPU
# the KV cache takes another, unless it is told how much.
CORE_COPY_SHARE = 4
# Of a forward's time, in the order of sk_phase: qkv, attention, output, mlp, head, candidates.
PHASES = tuple(phase.name.removeprefix("SK_PHASE_").lower() for phase in _abi.sk_phase)


class Tokens(Protocol):
    """Tokens at positions start, start + 1, … of one sequence, and where its KV is."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def start(self) -> int: ...
    @property
    def block_table(self) -> Sequence[int]: ...


class Wanted(NamedTuple):
    """What of a sequence is computed, and what is told of it, beside its KV."""

    choice: NeuronChoice | None = None  # None: all neurons
    # None, or zeroed int64 [KV blocks that its tokens touch, layers, widest intermediate_size]: scores
    # of all tokens but position 0, in units of 2^-32, are added.
    statistics: torch.Tensor | None = None
    score: Score = Score.NORM
    score_share: float = 1.0  # with a count
    reads: torch.Tensor | None = None  # None, or int64 [layers, 4]: see `reads` of sk_sequence


class Rows(NamedTuple):
    """What a forward computed of the rows that were asked for."""

    candidate_ids: torch.Tensor  # [outputs, candidates] int32, by (logit descending, id ascending)
    candidate_logits: torch.Tensor  # same shape, float32
    log_normalizers: torch.Tensor  # [outputs] logsumexp((row - its largest) / temperature)
    log_normalizers_1: torch.Tensor  # [outputs] the same at temperature 1
    # [outputs, vocab]; overwritten by the next forward. Or [0, vocab]: left where they were computed.
    logits: torch.Tensor
    hidden: torch.Tensor  # [hidden rows, hidden_size] after the last layer, before the norm


class GraphCounts(NamedTuple):
    """CUDA graphs of steps that came again; see sk_graphs_info."""

    captures: int  # graphs made
    launches: int  # forwards that were the launch of one
    kept: int
    why_not: str  # "", or why none are made any more


class Decoder:
    """A model of the library, over packed weights: on the CPU with threads, keeping the weights alive;
    on a GPU over a copy in its memory, all else in main memory.

    One thread at a time may call it. `close` ends it; so does the end of its life.
    """

    def __init__(
        self,
        packed: PackedDecoder,
        *,
        device: str = "cpu",
        threads: int = 1,
        isa: str = "auto",
        kv_bits: int = 16,
        graphs: bool = True,
        core_copies: bool = True,
    ) -> None:
        """
        Args:
            device: cpu, or a GPU: cuda, cuda:1; emulator, in tests, computes as a GPU does.
            threads: of the CPU; a GPU takes 1.
            isa: the CPU's level; a GPU takes auto.
            kv_bits: of keys and values in the cache, 16 (bfloat16) or 8.
            graphs: on a GPU, whether steps that come again are launched as CUDA graphs.
            core_copies: on the CPU, whether the cores of a step's sequences are copied, to be read side
                by side, when they come again and again. A copy takes as many bytes as they have, and at most
                a quarter of the memory that is free now; the bits are the same.

        Raises NativeCallError, of a CPU that lacks `isa` or a GPU without room for example, or
        NativeLibraryError.
        """
        kind, index = parse(device)
        if kind != "cpu":
            _refuse_scan(packed, device)
            usable(device)  # compiles the kernels where that has not been done
        self.device = kind if kind == "cpu" else f"{kind}:{index}"
        self.config = config = packed.config
        self.formats = packed.formats
        self.has_scan = packed.scan is not None
        self.choices: frozenset[ChoiceKind] = frozenset()  # that sequences can choose by
        if packed.choice is not None:
            self.choices = packed.choice.kinds
        self._library = native.load(kind)
        self._arguments = native.new_struct(_abi.sk_forward_args)
        self._candidates = min(_abi.SK_NUM_CANDIDATES, config.vocab_size)
        widest = max(shape.intermediate_size for shape in config.layers)
        self._sums_shape = (len(config.layers), widest)  # of a KV block's statistics
        self._reads_shape = (len(config.layers), 4)
        self._logits = torch.empty(0, config.vocab_size)
        self._no_hidden = torch.empty(0, config.hidden_size)
        arguments = model_arguments(packed, threads=threads, isa=isa, kv_bits=kv_bits)
        arguments.device = index
        arguments.graphs = int(graphs and kind != "cpu")
        if core_copies and kind == "cpu":
            arguments.core_copy_bytes = native.memory_room() // CORE_COPY_SHARE
        info = native.new_struct(_abi.sk_model_info)
        status = self._library.sk_model_create(ctypes.byref(arguments), ctypes.byref(info))
        native.check(self._library, status)
        self._model = info.model
        self.kv_bits = kv_bits
        self.kv_block_bytes: int = info.kv_block_bytes  # in all layers
        self.isa = native.isa_name(info.isa)
        self.threads: int = info.threads
        self.packed_bytes: int = packed.arena.size  # all weights, padding included
        self.device_bytes: int = info.device_bytes  # of a GPU's memory, the weights among them
        # The weights are the callback's arguments so that they outlive the model. A GPU has copies.
        kept = packed if kind == "cpu" else None
        self._destroy = weakref.finalize(self, _destroy, self._library, info.model, kept)

    def new_kv(self, blocks: int) -> KvMemory:
        """Zeroed memory for so many KV blocks, where `forward` wants it. Raises MemoryError, or of a
        GPU's NativeCallError."""
        return new_kv_memory(self.device, blocks * self.kv_block_bytes)

    def forward(
        self,
        sequences: Sequence[Tokens],
        kv: KvMemory,
        *,
        output_rows: Sequence[int] = (),
        temperatures: Sequence[float] = (),
        hidden_rows: Sequence[int] = (),
        prompts: bool = False,
        wanted: Sequence[Wanted] | None = None,
        phase_seconds: array[float] | None = None,
        needed: Sequence[int] | None = None,
        rescored: array[int] | None = None,
        union_reads: torch.Tensor | None = None,
        leave_logits: bool = False,
    ) -> Rows:
        """Compute a batch and write its KV.

        Args:
            kv: memory on the same device, of a whole number of blocks, `kv_block_bytes` each, layer by
                layer.
            output_rows: rows of the batch (all sequences' tokens in order) whose candidates are
                wanted, each at its temperature > 0.
            hidden_rows: rows whose hidden state is wanted.
            prompts: all tokens are of prompts, which integer weights may multiply faster, rounded in
                another way: a prompt's bits are the same in any cut, but not those of decoding.
            wanted: of each sequence; None: nothing. Where one chooses its neurons, all together have
                at most SK_CHOICE_TOKENS tokens.
            phase_seconds: doubles, one for each of PHASES, set to the wall time of each.
            needed: of each output row, how many of its candidates matter; 0: the whole row. Where none is
                0, a scan may leave out all else: candidates are -1 then, normalizers NaN, logits rough.
            rescored: with `needed`, a number of type "I" for each output row, set to how many of its
                logits were computed from the LM head itself: vocab_size where nothing is left out.
            union_reads: int64 [layers, 4], set to what all tokens together read.
            leave_logits: logits of a few rows may stay in a GPU's memory; `row_of_logits` brings one.

        Raises NativeCallError where the library refuses a value, ValueError where it could not know.
        """
        numbers = array("i")  # all token ids and block tables
        rows, temps = array("I", output_rows), array("f", temperatures)
        wanted_hidden = array("I", hidden_rows)
        for sequence in sequences:
            numbers += array("i", sequence.token_ids)  # `extend` of a list takes twice as long
            numbers += array("i", sequence.block_table)
        wanted = wanted or [NOTHING] * len(sequences)
        self._check_lengths(rows, temps, kv, wanted, union_reads)
        known, found = _scan_arrays(len(rows), needed, rescored)
        times = 0 if phase_seconds is None else _address_of_times(phase_seconds)
        records = _records(sequences, numbers, wanted)
        outputs, vocab, hidden_size = len(rows), self.config.vocab_size, self.config.hidden_size
        ids = torch.empty(outputs, self._candidates, dtype=torch.int32)
        logits = torch.empty(outputs, self._candidates)
        normalizers = torch.empty(2, outputs)
        left = leave_logits and self.device != "cpu" and outputs <= _abi.SK_LEFT_LOGITS
        whole = self._logits_buffer(0 if left else outputs)
        hidden = self._no_hidden
        if wanted_hidden:
            hidden = torch.empty(len(wanted_hidden), hidden_size)
        _FORWARD.pack_into(
            self._arguments, 0, _abi.SK_ABI_VERSION, _FORWARD.size,
            ctypes.addressof(records), kv.data_ptr(), kv.nbytes, kv.nbytes // self.kv_block_bytes,
            len(sequences), outputs, len(wanted_hidden), int(prompts), 0,
            rows.buffer_info()[0], temps.buffer_info()[0], wanted_hidden.buffer_info()[0],
            len(whole) * vocab, outputs * self._candidates, hidden.numel(),
            0 if left else whole.data_ptr(), ids.data_ptr(), logits.data_ptr(), normalizers.data_ptr(),
            normalizers.data_ptr() + 4 * outputs, hidden.data_ptr(), times,
            known.buffer_info()[0] if needed else 0, found.buffer_info()[0] if needed else 0,
            0 if union_reads is None else union_reads.data_ptr(),
        )  # fmt: skip
        status = self._library.sk_forward(self._model, ctypes.byref(self._arguments))
        native.check(self._library, status)
        return Rows(ids, logits, normalizers[0], normalizers[1], whole, hidden)

    def row_of_logits(self, rows: Rows, row: int) -> torch.Tensor:
        """[vocab] logits of an output of the last forward, which returned `rows`; valid until the next."""
        if len(rows.logits):
            return rows.logits[row]
        logits = torch.empty(self.config.vocab_size)
        status = self._library.sk_device_logits(self._model, row, pointer(logits), len(logits))
        native.check(self._library, status)
        return logits

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The LM head on hidden states of `forward`, [rows, hidden_size] -> [rows, vocab]."""
        hidden = hidden.contiguous()
        logits = torch.empty(len(hidden), self.config.vocab_size)
        arguments = native.new_struct(_abi.sk_logits_args)
        arguments.hidden, arguments.logits = pointer(hidden), pointer(logits)
        arguments.hidden_count, arguments.logits_count = hidden.numel(), logits.numel()
        arguments.rows = len(hidden)
        status = self._library.sk_logits(self._model, ctypes.byref(arguments))
        native.check(self._library, status)
        return logits

    def graphs(self) -> GraphCounts | None:
        """How steps were launched on a GPU; None on the CPU."""
        if self.device == "cpu":
            return None
        info = native.new_struct(_abi.sk_graphs_info)
        status = self._library.sk_device_graphs(self._model, ctypes.byref(info))
        native.check(self._library, status)
        why_not = bytes(info.why_not).split(b"\0")[0].decode(errors="replace")
        return GraphCounts(info.captures, info.launches, info.kept, why_not)

    def close(self) -> None:
        """End the model and let go of the weights."""
        self._model = 0
        self._destroy()

    def _check_lengths(
        self,
        rows: array[int],
        temperatures: array[float],
        kv: KvMemory,
        wanted: Sequence[Wanted],
        union_reads: torch.Tensor | None,
    ) -> None:
        """Of what the library cannot measure. Raises ValueError."""
        if len(rows) != len(temperatures):
            raise ValueError(f"{len(rows)} output rows have {len(temperatures)} temperatures")
        if kv.device != self.device:
            raise ValueError(f"kv is on {kv.device}, the decoder on {self.device}")
        for own in wanted:
            _check_tensor("statistics", own.statistics, self._sums_shape, leading=1)
            _check_tensor("reads", own.reads, self._reads_shape)
        _check_tensor("union_reads", union_reads, self._reads_shape)

    def _logits_buffer(self, rows: int) -> torch.Tensor:
        """[rows, vocab], reused: fresh pages for 3 MB would cost a tenth of a step each time."""
        if rows == self._logits.shape[0]:
            return self._logits
        if rows > self._logits.shape[0]:
            buffer = torch.empty(rows, self.config.vocab_size)
            if rows > KEPT_LOGITS_ROWS:
                return buffer
            self._logits = buffer
        return self._logits[:rows]

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def model_arguments(
    packed: PackedDecoder, *, threads: int, isa: str = "auto", kv_bits: int = 16
) -> _abi.sk_model_args:
    """What sk_model_create takes. Raises NativeCallError."""
    config, arguments = packed.config, native.new_struct(_abi.sk_model_args)
    arguments.hidden_size, arguments.vocab_size = config.hidden_size, config.vocab_size
    arguments.head_dim, arguments.num_layers = config.head_dim, len(config.layers)
    arguments.threads = native.unsigned("threads", threads, bits=32)
    arguments.isa = native.isa_value(isa)
    arguments.rms_norm_eps, arguments.rope_scale = config.rms_norm_eps, config.rope_scale
    arguments.rope_frequencies = pointer(packed.rope_frequencies)
    arguments.rope_rows = len(packed.rope_frequencies)
    arguments.activation_bits = packed.formats.activation_bits
    arguments.kv_bits = native.unsigned("kv_bits", kv_bits, bits=32)
    arguments.layers = ctypes.cast(packed.layers, ctypes.POINTER(_abi.sk_layer))
    arguments.norm = pointer(packed.norm)
    arguments.embedding, arguments.lm_head = packed.embedding, packed.lm_head
    arguments.reduce = native.new_struct(_abi.sk_reduce)
    arguments.scan = arguments.scan_basis = native.new_struct(_abi.sk_matrix)
    if packed.scan is not None:
        arguments.scan, arguments.scan_basis = packed.scan.matrix, packed.scan.basis
        arguments.scan_errors = pointer(packed.scan.errors)
    if packed.choice is not None:
        arguments.num_corrections = packed.choice.num_corrections
        arguments.corrections = ctypes.cast(
            packed.choice.corrections, ctypes.POINTER(_abi.sk_correction)
        )
    return arguments


def _refuse_scan(packed: PackedDecoder, device: str) -> None:
    """Raises NativeCallError."""
    if packed.scan is not None:
        raise native.NativeCallError(
            _abi.sk_status.SK_STATUS_UNSUPPORTED,
            f"the LM head has a scan (int4+exact), which is for the CPU alone, not for {device}",
        )


NOTHING = Wanted()


def _check_tensor(
    name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], leading: int = 0
) -> None:
    """Of int64, with so many dimensions before `shape`. Raises ValueError."""
    if tensor is not None and (
        tensor.shape[leading:] != shape or tensor.dtype != torch.int64 or not tensor.is_contiguous()
    ):
        expected = ", ".join(["blocks"] * leading + [str(size) for size in shape])
        raise ValueError(
            f"{name} are {tensor.dtype} {list(tensor.shape)}; expected contiguous torch.int64 "
            f"[{expected}]"
        )


def _address_of_times(phase_seconds: array[float]) -> int:
    """Raises ValueError: the library cannot measure it."""
    if phase_seconds.typecode != "d" or len(phase_seconds) != len(PHASES):
        raise ValueError(
            f"phase_seconds are {len(phase_seconds)} numbers of type {phase_seconds.typecode!r}; "
            f"expected {len(PHASES)} of type 'd'"
        )
    return phase_seconds.buffer_info()[0]


def _scan_arrays(
    outputs: int, needed: Sequence[int] | None, rescored: array[int] | None
) -> tuple[array[int], array[int]]:
    """Raises ValueError: the library cannot measure them."""
    wanted = array("I", needed or ())
    found = array("I") if rescored is None else rescored
    count = outputs if needed else 0
    if len(wanted) != count or len(found) != count or found.typecode != "I":
        raise ValueError(
            f"{outputs} output rows have {len(wanted)} numbers in `needed` and {len(found)} of type "
            f"{found.typecode!r} in `rescored`; expected as many of type 'I', or none"
        )
    return wanted, found


def _records(
    sequences: Sequence[Tokens], numbers: array[int], wanted: Sequence[Wanted]
) -> ctypes.Array[_abi.sk_sequence]:
    """The batch's sk_sequences, whose tokens and block tables stand in `numbers` one after another."""
    records = (_abi.sk_sequence * len(sequences))()
    address, size = numbers.buffer_info()[0], numbers.itemsize
    for index, (sequence, own) in enumerate(zip(sequences, wanted, strict=True)):
        tokens, blocks = len(sequence.token_ids), len(sequence.block_table)
        table = address + tokens * size
        sums, reads, choice = own.statistics, own.reads, own.choice
        _SEQUENCE.pack_into(
            records, index * _SEQUENCE.size, _abi.SK_ABI_VERSION, _SEQUENCE.size,
            address, table, tokens, sequence.start, blocks, 0 if sums is None else len(sums),
            0 if sums is None else sums.data_ptr(), SCORES[own.score], own.score_share,
            0 if choice is None else ctypes.addressof(choice.struct),
            0 if reads is None else reads.data_ptr(),
        )  # fmt: skip
        address = table + blocks * size
    return records


def _record(kind: type[ctypes.Structure]) -> struct.Struct:
    """The layout of a C struct of numbers and pointers, all of whose fields are packed at once."""
    codes: dict[Any, str] = {ctypes.c_uint32: "I", ctypes.c_uint64: "Q", ctypes.c_float: "f"}
    return struct.Struct("@" + "".join(codes.get(field[1], "P") for field in kind._fields_))


_SEQUENCE = _record(_abi.sk_sequence)
_FORWARD = _record(_abi.sk_forward_args)


def _destroy(library: ctypes.CDLL, model: int, _packed: PackedDecoder | None) -> None:
    library.sk_model_destroy(model)
