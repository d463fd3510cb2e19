"""What the library refuses, and the life of a model."""

import ctypes
import gc
import math
import os
import signal
import struct
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_kernels import _abi, decoder, native
from sparse_kernels._abi import sk_status
from sparse_kernels.arena import huge_pages
from sparse_kernels.decoder import Decoder, Wanted, model_arguments

VOCAB, HIDDEN, BLOCKS = 50, 64, 8
ROWS = 256  # that the result buffers have room for: more than any batch here can have
SIZE, VALUE = sk_status.SK_STATUS_BAD_SIZE, sk_status.SK_STATUS_BAD_VALUE
NULL, MISMATCH = sk_status.SK_STATUS_NULL_POINTER, sk_status.SK_STATUS_ABI_MISMATCH


def numbers(kind: Any, values: list[float], room: int = ROWS) -> Any:
    return (kind * room)(*values)


@dataclass
class Call:
    """A valid sk_forward of two sequences, 20 tokens at 0 and 3 at 16, to be damaged."""

    model: Decoder
    buffers: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        library_structs = (_abi.sk_sequence * 3)()  # a zeroed one beyond those that count
        for index, (count, start, table) in enumerate(((20, 0, [1, 2]), (3, 16, [5, 6]))):
            sequence = native.new_struct(_abi.sk_sequence)
            sequence.token_ids = self.keep(numbers(ctypes.c_int32, list(range(count))))
            sequence.block_table = self.keep(numbers(ctypes.c_int32, table))
            sequence.num_tokens, sequence.start, sequence.num_blocks = count, start, len(table)
            library_structs[index] = sequence
        self.sequences = self.keep(library_structs)
        blocks = self.model.kv_block_bytes
        self.kv = huge_pages(BLOCKS * blocks)
        self.arguments = args = native.new_struct(_abi.sk_forward_args)
        args.sequences, args.kv, args.kv_bytes = self.sequences, self.kv.data_ptr(), BLOCKS * blocks
        args.kv_num_blocks, args.num_sequences, args.num_outputs, args.num_hidden = BLOCKS, 2, 2, 1
        args.output_rows = self.keep(numbers(ctypes.c_uint32, [19, 22]))
        args.hidden_rows = self.keep(numbers(ctypes.c_uint32, [0]))
        args.temperatures = self.keep(numbers(ctypes.c_float, [1.0] * ROWS))
        args.logits_count = args.candidates_count = 2 * VOCAB
        args.hidden_count = HIDDEN
        for name, size in (("logits", VOCAB), ("candidate_logits", VOCAB), ("hidden", HIDDEN)):
            setattr(args, name, self.keep(numbers(ctypes.c_float, [], ROWS * size)))
        args.candidate_ids = self.keep(numbers(ctypes.c_int32, [], ROWS * VOCAB))
        args.log_normalizers = self.keep(numbers(ctypes.c_float, []))
        args.log_normalizers_1 = self.keep(numbers(ctypes.c_float, []))

    def keep(self, buffer: Any) -> Any:
        self.buffers.append(buffer)
        return buffer

    def __call__(self) -> int:
        library = native.load()
        return library.sk_forward(self.model._model, ctypes.byref(self.arguments))


@pytest.fixture(scope="module")
def model(tiny_decoder) -> Decoder:
    return Decoder(tiny_decoder().packed(), threads=2)


@pytest.fixture
def call(model) -> Call:
    made = Call(model)
    assert made() == sk_status.SK_STATUS_OK
    return made


def refused(status: int, expected: sk_status, *words: str) -> None:
    text = native.load().sk_last_error().decode()
    assert status == expected, text
    for word in words:
        assert word in text


class TestForward:
    @pytest.mark.parametrize(
        ("name", "value", "status", "words"),
        [
            ("abi_version", 1, MISMATCH, ("sk_forward_args", "abi_version 1")),
            ("struct_size", 8, MISMATCH, ("sk_forward_args", "struct_size 8")),
            ("sequences", None, NULL, ("sequences",)),
            ("kv", None, NULL, ("kv",)),
            ("kv", 64 + 2, VALUE, ("kv is not aligned", "64")),
            ("kv_bytes", 100, SIZE, ("kv has 100 bytes; 8 blocks",)),
            ("kv_num_blocks", 0, SIZE, ("0 blocks",)),
            ("kv_num_blocks", BLOCKS + 1, SIZE, ("9 blocks",)),
            ("kv_num_blocks", 2**32 - 1, SIZE, ("4294967295 blocks",)),
            ("num_sequences", 0, SIZE, ("num_sequences is 0", "1 to 65536")),
            ("num_sequences", 2**32 - 1, SIZE, ("num_sequences is 4294967295",)),
            ("num_outputs", 24, SIZE, ("num_outputs is 24", "23 tokens")),
            ("num_outputs", 3, SIZE, ("logits_count is 100, it must be 150",)),
            ("num_hidden", 2, SIZE, ("hidden_count is 64, it must be 128",)),
            ("logits_count", 99, SIZE, ("logits_count is 99, it must be 100",)),
            ("candidates_count", 512, SIZE, ("candidates_count is 512, it must be 100",)),
            ("hidden_count", 0, SIZE, ("hidden_count is 0, it must be 64",)),
            ("needed", (ctypes.c_uint32 * 2)(1, 51), NULL, ("rescored is null",)),
            *((name, None, NULL, ()) for name in ("output_rows", "temperatures", "hidden_rows")),
            *((name, None, NULL, ()) for name in ("logits", "candidate_ids", "candidate_logits")),
            *((name, None, NULL, ()) for name in ("log_normalizers", "log_normalizers_1")),
            ("hidden", None, NULL, ("hidden",)),
        ],
    )
    def test_arguments(self, call, name, value, status, words) -> None:
        setattr(call.arguments, name, value)
        refused(call(), status, *words)

    @pytest.mark.parametrize(
        ("name", "value", "status", "words"),
        [
            ("abi_version", 0, MISMATCH, ("sk_sequence",)),
            ("struct_size", 0, MISMATCH, ("sk_sequence",)),
            ("token_ids", None, NULL, ("sequence 1", "token_ids")),
            ("block_table", None, NULL, ("sequence 1", "block_table")),
            ("num_tokens", 0, SIZE, ("sequence 1 has 0 tokens",)),
            ("num_tokens", 17, SIZE, ("sequence 1 ends at position 33", "2 KV blocks")),
            ("num_tokens", 2**32 - 1, SIZE, ("sequence 1 has 4294967295 tokens",)),
            ("start", 30, SIZE, ("sequence 1 ends at position 33",)),
            ("start", 2**32 - 1, SIZE, ("ends at position 4294967298",)),
            ("num_blocks", 1, SIZE, ("ends at position 19, beyond its 1 KV blocks",)),
            ("statistics_blocks", 1, SIZE, ("statistics_blocks 1",)),
        ],
    )
    def test_a_sequence(self, call, name, value, status, words) -> None:
        setattr(call.sequences[1], name, value)
        refused(call(), status, *words)

    @pytest.mark.parametrize("value", [-1, VOCAB, 2**31 - 1, -(2**31)])
    def test_token_ids_outside_the_vocabulary(self, call, value) -> None:
        call.sequences[0].token_ids[19] = value
        refused(call(), VALUE, f"sequence 0 has the token id {value}", f"has {VOCAB}")

    @pytest.mark.parametrize("value", [-1, BLOCKS, 2**31 - 1])
    def test_blocks_outside_the_cache(self, call, value) -> None:
        call.sequences[1].block_table[0] = value
        refused(call(), VALUE, f"sequence 1 has the KV block {value}; there are {BLOCKS}")

    def test_blocks_that_no_position_needs_may_be_anything(self, call) -> None:
        call.sequences[1].block_table[2] = -1
        call.sequences[1].num_blocks = 3
        assert call() == sk_status.SK_STATUS_OK

    @pytest.mark.parametrize("name", ["output_rows", "hidden_rows"])
    def test_rows_that_the_batch_does_not_have(self, call, name) -> None:
        getattr(call.arguments, name)[0] = 23
        refused(call(), VALUE, f"{name} has row 23; the batch has 23 tokens")

    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
    def test_temperatures(self, call, value) -> None:
        call.arguments.temperatures[1] = value
        refused(call(), VALUE, "temperature", "row 1")

    def test_statistics_of_another_number_of_blocks(self, call) -> None:
        sums = torch.zeros(3, 2, 96, dtype=torch.int64)
        call.sequences[0].statistics = ctypes.cast(sums.data_ptr(), ctypes.POINTER(ctypes.c_int64))
        for blocks in (0, 1, 3):
            call.sequences[0].statistics_blocks = blocks
            refused(call(), SIZE, f"statistics_blocks {blocks}; its tokens touch 2 blocks")
        assert not sums.any()

    @pytest.mark.parametrize(
        "sums",
        [
            torch.zeros(1, 2, 95, dtype=torch.int64),
            torch.zeros(1, 2, 96, dtype=torch.int32),
            torch.zeros(96, 2, 1, dtype=torch.int64).transpose(0, 2),
        ],
        ids=["shape", "dtype", "strides"],
    )
    def test_statistics_that_the_library_would_write_beyond(self, model, make_part, sums) -> None:
        kv, part = model.new_kv(1), make_part([1], 0, [0])
        with pytest.raises(ValueError, match=r"expected contiguous torch.int64 \[blocks, 2, 96\]"):
            model.forward([part], kv, wanted=[Wanted(statistics=sums)])

    def test_kv_on_another_device(self, model, make_part) -> None:
        kv = model.new_kv(1)
        kv.device = "cuda:0"
        with pytest.raises(ValueError, match="kv is on cuda:0, the decoder on cpu"):
            model.forward([make_part([1], 0, [0])], kv)

    def test_a_row_without_a_temperature(self, model, make_part) -> None:
        kv, part = model.new_kv(1), make_part([1, 2], 0, [0])
        with pytest.raises(ValueError, match="2 output rows have 1 temperatures"):
            model.forward([part], kv, output_rows=[0, 1], temperatures=[1.0])

    def test_more_tokens_together_than_a_forward_takes(self, model, make_part) -> None:
        kv = model.new_kv(4096)
        part = make_part([1] * 40000, 0, range(2500))
        with pytest.raises(native.NativeCallError, match="80000 tokens; it can have 1 to 65536"):
            model.forward([part, part], kv)

    def test_null_and_unknown_models(self) -> None:
        library = native.load()
        null = ctypes.POINTER(_abi.sk_forward_args)()
        refused(library.sk_forward(1, null), NULL, "sk_forward_args")
        args = native.new_struct(_abi.sk_forward_args)
        for handle in (0, 10**9, 2**64 - 1):
            status = library.sk_forward(handle, ctypes.byref(args))
            refused(status, VALUE, f"there is no model {handle}")
            refused(library.sk_model_destroy(handle), VALUE, f"there is no model {handle}")


class TestLogits:
    @pytest.mark.parametrize(
        ("name", "value", "status", "words"),
        [
            ("abi_version", 99, MISMATCH, ("sk_logits_args",)),
            ("rows", 0, SIZE, ("rows is 0",)),
            ("rows", 2**32 - 1, SIZE, ("rows is 4294967295",)),
            ("rows", 3, SIZE, ("hidden_count is 128, it must be 192",)),
            ("hidden_count", 1, SIZE, ("hidden_count is 1, it must be 128",)),
            ("logits_count", 1, SIZE, ("logits_count is 1, it must be 100",)),
            ("hidden", None, NULL, ("hidden",)),
            ("logits", None, NULL, ("logits",)),
            ("reserved", 1, SIZE, ("reserved",)),
        ],
    )
    def test_arguments(self, model, name, value, status, words) -> None:
        args = native.new_struct(_abi.sk_logits_args)
        hidden, logits = (numbers(ctypes.c_float, [], 2 * size) for size in (HIDDEN, VOCAB))
        args.hidden, args.logits, args.rows = hidden, logits, 2
        args.hidden_count, args.logits_count = 2 * HIDDEN, 2 * VOCAB
        library = native.load()
        assert library.sk_logits(model._model, ctypes.byref(args)) == sk_status.SK_STATUS_OK
        setattr(args, name, value)
        refused(library.sk_logits(model._model, ctypes.byref(args)), status, *words)


def create(arguments: _abi.sk_model_args) -> int:
    """The status; a model that comes out is destroyed."""
    library, info = native.load(), native.new_struct(_abi.sk_model_info)
    status: int = library.sk_model_create(ctypes.byref(arguments), ctypes.byref(info))
    if status == sk_status.SK_STATUS_OK:
        assert library.sk_model_destroy(info.model) == sk_status.SK_STATUS_OK
    else:
        assert info.model == 0
    return status


class TestCreate:
    @pytest.mark.parametrize(
        ("path", "value", "status", "words"),
        [
            ("abi_version", 1, MISMATCH, ("sk_model_args",)),
            ("hidden_size", 0, SIZE, ("hidden_size is 0",)),
            ("hidden_size", 2**20 + 1, SIZE, ("hidden_size is 1048577", "1048576")),
            ("hidden_size", 65, SIZE, ("64",)),
            ("vocab_size", 0, SIZE, ("vocab_size is 0",)),
            ("vocab_size", VOCAB + 1, SIZE, ("embedding is 50 x 64", "51 x 64")),
            ("head_dim", 0, SIZE, ("head_dim is 0",)),
            ("head_dim", 15, SIZE, ("head_dim is 15",)),
            ("head_dim", 1026, SIZE, ("head_dim is 1026",)),
            ("num_layers", 0, SIZE, ("num_layers is 0",)),
            ("num_layers", 3, MISMATCH, ("sk_layer",)),  # a zeroed struct comes after the last
            ("num_layers", 4097, SIZE, ("num_layers is 4097", "4096")),
            ("threads", 0, SIZE, ("threads is 0", "1 to 1024")),
            ("threads", 1025, SIZE, ("threads is 1025",)),
            ("device", 1, sk_status.SK_STATUS_UNSUPPORTED, ("device is 1, graphs 0",)),
            ("graphs", 1, sk_status.SK_STATUS_UNSUPPORTED, ("graphs 1", "computes on the CPU")),
            ("isa", 5, VALUE, ("isa is 5",)),
            ("isa", -1, VALUE, ("isa is -1",)),
            ("rms_norm_eps", 0.0, VALUE, ("rms_norm_eps is 0",)),
            ("rms_norm_eps", math.nan, VALUE, ("rms_norm_eps is",)),
            ("rope_scale", math.inf, VALUE, ("rope_scale is inf",)),
            ("rope_frequencies", None, NULL, ("rope_frequencies",)),
            ("rope_rows", 0, SIZE, ("rope_rows is 0",)),
            ("activation_bits", 12, VALUE, ("activation_bits is 12",)),
            ("kv_bits", 4, VALUE, ("kv_bits is 4", "16 or 8")),
            ("kv_bits", 0, VALUE, ("kv_bits is 0",)),
            ("layers", None, NULL, ("layers",)),
            ("norm", None, NULL, ("norm",)),
            ("embedding.codes.data", None, NULL, ("embedding",)),
            ("lm_head.abi_version", 0, MISMATCH, ("lm_head",)),
            ("lm_head.rows", 49, SIZE, ("lm_head is 49 x 64",)),
            ("reduce.struct_size", 0, MISMATCH, ("sk_reduce",)),
            ("layer.num_heads", 0, SIZE, ("num_heads is 0",)),
            ("layer.num_heads", 3, SIZE, ("num_heads is 3", "num_kv_heads 2")),
            ("layer.num_kv_heads", 0, SIZE, ("num_kv_heads is 0",)),
            ("layer.num_kv_heads", 5, SIZE, ("num_kv_heads is 5",)),
            ("layer.intermediate_size", 0, SIZE, ("intermediate_size is 0",)),
            ("layer.intermediate_size", 129, SIZE, ("gate is 128 x 64", "192 x 64")),
            ("layer.qkv.columns", 63, SIZE, ("qkv is 128 x 63",)),
            ("layer.qkv.codes.bytes", 128 * 128 - 1, SIZE, ("qkv has 16383 bytes",)),
            ("layer.qkv.codes.row_stride", 64, SIZE, ("row_stride is 64",)),
            ("layer.qkv.codes.row_stride", 130, VALUE, ("qkv", "row_stride", "tiles of 128")),
            ("layer.output.codes.data", 64 + 2, VALUE, ("output", "tiles of 128")),
            ("layer.down.struct_size", 1, MISMATCH, ("down",)),
            ("layer.attention_norm", None, NULL, ("attention_norm",)),
            ("layer.mlp_norm", None, NULL, ("mlp_norm",)),
        ],
    )
    def test_a_description_that_cannot_be(self, tiny_decoder, path, value, status, words) -> None:
        packed = tiny_decoder().packed()
        layers = (_abi.sk_layer * 3)(*packed.layers)
        arguments = model_arguments(packed, threads=1)
        arguments.layers = layers
        assert create(arguments) == sk_status.SK_STATUS_OK
        *places, name = path.split(".")
        target: Any = arguments
        for place in places:
            target = layers[1] if place == "layer" else getattr(target, place)
        setattr(target, name, value)
        refused(create(arguments), status, *words)

    def test_a_head_that_is_the_embedding_but_not_of_its_shape(self, tiny_decoder) -> None:
        packed = tiny_decoder(tied=True).packed()
        arguments = model_arguments(packed, threads=1)
        assert create(arguments) == sk_status.SK_STATUS_OK
        arguments.lm_head.rows = VOCAB - 1
        refused(create(arguments), SIZE, f"lm_head is {VOCAB - 1} x {HIDDEN}")

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_weights_that_are_not_finite(self, tiny_decoder, value) -> None:
        packed = tiny_decoder().packed()
        matrices = [getattr(packed.layers[1], n) for n in ("qkv", "output", "gate", "up", "down")]
        for matrix in [*matrices, packed.embedding, packed.lm_head]:
            last = (
                matrix.codes.data
                + (matrix.rows - 1) * matrix.codes.row_stride
                + 2 * (matrix.columns - 1)
            )
            place = ctypes.c_uint16.from_address(last)
            before = place.value
            place.value = int(torch.tensor(value).bfloat16().view(torch.int16))
            refused(create(model_arguments(packed, threads=1)), VALUE, f"row {matrix.rows - 1}")
            place.value = before
        packed.layers[0].mlp_norm[5] = value
        refused(create(model_arguments(packed, threads=1)), VALUE, "mlp_norm", "at 5")

    def test_a_level_that_this_cpu_lacks_or_nobody_knows(self, tiny_decoder, cpu_levels) -> None:
        packed = tiny_decoder().packed()
        with pytest.raises(native.NativeCallError, match="isa is 'avx1024'; it can be auto"):
            Decoder(packed, threads=1, isa="avx1024")
        for isa in {"avx2", "avx512", "amx"} - set(cpu_levels):
            with pytest.raises(native.NativeCallError, match=f"isa asks for {isa}") as error:
                Decoder(packed, threads=1, isa=isa)
            assert error.value.status == sk_status.SK_STATUS_UNSUPPORTED

    @pytest.mark.parametrize("threads", [-1, 2**32])
    def test_threads_that_a_field_cannot_hold(self, tiny_decoder, threads) -> None:
        with pytest.raises(native.NativeCallError, match=f"threads is {threads}"):
            Decoder(tiny_decoder().packed(), threads=threads)

    def test_null_pointers(self, tiny_decoder) -> None:
        library, info = native.load(), native.new_struct(_abi.sk_model_info)
        null = ctypes.POINTER(_abi.sk_model_args)()
        refused(library.sk_model_create(null, ctypes.byref(info)), NULL, "sk_model_args")
        arguments = model_arguments(tiny_decoder().packed(), threads=1)
        no_info = ctypes.POINTER(_abi.sk_model_info)()
        refused(library.sk_model_create(ctypes.byref(arguments), no_info), NULL, "sk_model_info")


# --- any values in any fields ---

EDGES = [0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 50, 64, 65, 96, 100, 4095, 4097, 2**16, 2**20, 2**22]
EDGES += [2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
# What a size says of a buffer's length cannot be checked: a lie reads or writes what is beyond it.
TRUE_AT_MOST = {"kv_bytes", "bytes", "num_blocks", "rope_rows"}


def integer_fields(kind: type[ctypes.Structure]) -> list[tuple[str, Any]]:
    fields = [(str(entry[0]), entry[1]) for entry in kind._fields_]
    return [(n, t) for n, t in fields if t in (ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32)]


@st.composite
def damage(draw: st.DrawFn, kinds: dict[str, type[ctypes.Structure]]) -> list[tuple[str, str, int]]:
    """(struct, field, value) of a few fields."""
    changes = []
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(sorted(kinds)))
        name, _ = draw(st.sampled_from(integer_fields(kinds[where])))
        changes.append((where, name, draw(st.sampled_from(EDGES))))
    return changes


def apply(target: ctypes.Structure, name: str, value: int) -> None:
    before = getattr(target, name)
    if name in TRUE_AT_MOST:
        value = min(value, before)
    bits = 8 * getattr(type(target), name).size
    setattr(target, name, value & (1 << bits) - 1)


@given(
    damage({"args": _abi.sk_forward_args, "first": _abi.sk_sequence, "second": _abi.sk_sequence}),
    st.lists(st.tuples(st.integers(0, 63), st.sampled_from([-(2**31), -1, 49, 50, 2**31 - 1]))),
    st.booleans(),
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_forward_is_answered_with_a_status(model, changes, entries, statistics) -> None:
    call = Call(model)
    if statistics:
        sums = torch.zeros(2, 2, 96, dtype=torch.int64)
        call.sequences[0].statistics_blocks = 2
        call.sequences[0].statistics = ctypes.cast(sums.data_ptr(), ctypes.POINTER(ctypes.c_int64))
    targets = {"args": call.arguments, "first": call.sequences[0], "second": call.sequences[1]}
    for where, name, value in changes:
        apply(targets[where], name, value)
    for place, value in entries:
        call.sequences[place % 2].token_ids[place] = value
        call.sequences[place % 2].block_table[place] = value
    assert call() in list(sk_status)
    assert Call(model)() == sk_status.SK_STATUS_OK, "the model still works"


@given(
    damage(
        {
            "args": _abi.sk_model_args,
            "layer": _abi.sk_layer,
            "qkv": _abi.sk_matrix,
            "up": _abi.sk_matrix,
            "embedding": _abi.sk_matrix,
        }
    )
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_description_is_answered_with_a_status(tiny_decoder, changes) -> None:
    packed = tiny_decoder().packed()
    layers = (_abi.sk_layer * 3)(*packed.layers)
    arguments = model_arguments(packed, threads=1)
    arguments.layers = layers
    # Vectors are as long as sizes elsewhere say; here they are long enough for any lie.
    long = torch.ones(_abi.SK_MAX_DIM)
    where = ctypes.cast(long.data_ptr(), ctypes.POINTER(ctypes.c_float))
    arguments.norm = arguments.rope_frequencies = where
    for layer in layers[:2]:
        layer.attention_norm = layer.mlp_norm = where
    targets = {
        "args": arguments,
        "layer": layers[0],
        "qkv": layers[0].qkv,
        "up": layers[1].up,
        "embedding": arguments.embedding,
    }
    for place, name, value in changes:
        if name == "threads":  # each of them would be started
            value = min(value, 8) if value <= _abi.SK_MAX_THREADS else value
        apply(targets[place], name, value)
    assert create(arguments) in list(sk_status)


# --- the life of a model ---


def tasks() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def settled(expected: Callable[[], bool]) -> bool:
    """Whether it comes true: a thread that was joined stays in /proc for a moment."""
    give_up = time.monotonic() + 10
    while not expected() and time.monotonic() < give_up:
        time.sleep(0.01)
    return expected()


def forked(child: Callable[[], int]) -> int:
    """The exit status of `child` in a process of its own, ended by a signal if it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are other threads
        process = os.fork()
    if process == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a handler in Python would never run
            signal.alarm(20)
            os._exit(child())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class TestLife:
    @pytest.mark.parametrize("end", ["close", "with", "del"])
    def test_threads_and_weights_go_with_the_model(self, tiny_decoder, end) -> None:
        gc.collect()
        before = tasks()
        packed = tiny_decoder().packed()
        address = packed.embedding.codes.data
        made = Decoder(packed, threads=3)
        del packed
        assert tasks() == before + 2, "the caller's thread is one of three"
        assert mapped(address)
        if end == "close":
            made.close()
        elif end == "with":
            with made:
                pass
        else:
            del made
            gc.collect()
        assert settled(lambda: tasks() == before)
        assert settled(lambda: not mapped(address))

    def test_closed_twice_is_closed_and_refuses_calls(self, tiny_decoder, make_part) -> None:
        made = Decoder(tiny_decoder().packed(), threads=1)
        kv = made.new_kv(1)
        made.close()
        made.close()
        with pytest.raises(native.NativeCallError, match="there is no model"):
            made.forward([make_part([1], 0, [0])], kv)
        with pytest.raises(native.NativeCallError, match="there is no model"):
            made.logits(torch.zeros(1, HIDDEN))

    def test_the_weights_are_kept_alive(self, tiny_decoder, make_part) -> None:
        made = Decoder(tiny_decoder().packed(), threads=1)
        kv = made.new_kv(1)
        gc.collect()
        arguments = {"output_rows": [0], "temperatures": [1.0]}
        first = made.forward([make_part([1], 0, [0])], kv, **arguments).logits.clone()
        torch.randn(1 << 20)
        assert torch.equal(made.forward([make_part([1], 0, [0])], kv, **arguments).logits, first)

    def test_calls_of_several_threads_take_turns(self, model) -> None:
        results = []

        def work() -> None:
            for _ in range(20):
                call = Call(model)
                assert call() == sk_status.SK_STATUS_OK
                results.append(tuple(call.arguments.logits[: 2 * VOCAB]))

        workers = [threading.Thread(target=work) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(results) == 60
        assert len(set(results)) == 1

    def test_a_forked_process_is_told_that_it_has_no_threads(self, model) -> None:
        call = Call(model)
        assert call() == sk_status.SK_STATUS_OK

        def child() -> int:
            refused(call(), sk_status.SK_STATUS_UNSUPPORTED, f"process {os.getppid()}", "fork")
            status = native.load().sk_model_destroy(model._model)
            return int(status != sk_status.SK_STATUS_UNSUPPORTED)

        assert forked(child) == 0
        assert call() == sk_status.SK_STATUS_OK

    def test_an_idle_model_uses_no_cpu(self, model, make_part) -> None:
        kv = model.new_kv(1)
        model.forward([make_part([1], 0, [0])], kv)
        time.sleep(0.1)  # the threads spin for a moment before they sleep
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.05


@pytest.mark.parametrize(
    ("record", "kind"),
    [(decoder._SEQUENCE, _abi.sk_sequence), (decoder._FORWARD, _abi.sk_forward_args)],
)
def test_records_are_laid_out_as_the_structs(record: struct.Struct, kind: Any) -> None:
    made = kind()
    record.pack_into(made, 0, *range(1, len(kind._fields_) + 1))
    assert record.size == ctypes.sizeof(kind)
    raw = bytes(made)
    for value, (name, kind_of_field, *_) in enumerate(kind._fields_, start=1):
        place = getattr(kind, name)
        own = raw[place.offset : place.offset + place.size]
        if kind_of_field is ctypes.c_float:
            assert struct.unpack("f", own) == (value,), name
        else:
            assert int.from_bytes(own, "little") == value, name


def mapped(address: int) -> bool:
    spans = (line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines())
    bounds = (tuple(int(bound, 16) for bound in span.split("-")) for span in spans)
    return any(first <= address < last for first, last in bounds)
