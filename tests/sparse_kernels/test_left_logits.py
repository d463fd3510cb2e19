"""Logits that stay in a GPU's memory until a row of them is asked for."""

import ctypes

import pytest
import torch

from sparse_kernels import _abi, native
from sparse_kernels.decoder import Decoder
from sparse_kernels.weights import LayerShape

ONE_LAYER = [LayerShape(4, 2, 96)]
ASKED = {"output_rows": [300, 2, 301, 2, 40], "temperatures": [1.0] * 5}


@pytest.fixture
def parts(make_part, random_tokens):
    """302 tokens, more than a pass of the GPU computes together."""
    tokens = random_tokens(301)
    return [make_part(tokens, 0, range(19)), make_part([5], 0, [20])]


@pytest.fixture
def decoder(device, tiny_decoder):
    return Decoder(tiny_decoder(layers=ONE_LAYER).packed(), device=device)


def test_rows_come_as_asked_for(decoder, parts):
    kv = decoder.new_kv(21)
    brought = decoder.forward(parts, kv, **ASKED)
    expected = [brought.logits[row].clone() for row in range(5)]
    left = decoder.forward(parts, kv, **ASKED, leave_logits=True)
    assert left.logits.shape == (0, 50)
    assert torch.equal(left.candidate_logits, brought.candidate_logits)
    for row in (3, 0, 4, 1, 2, 0):
        assert torch.equal(decoder.row_of_logits(left, row), expected[row])
        assert torch.equal(decoder.row_of_logits(brought, row), expected[row])


def test_what_is_not_there_is_told(decoder, parts):
    kv = decoder.new_kv(21)
    left = decoder.forward(parts, kv, **ASKED, leave_logits=True)
    with pytest.raises(native.NativeCallError, match="row is 5; logits of 5 rows were left"):
        decoder.row_of_logits(left, 5)
    library, row = (
        native.load("emulator" if "emulator" in decoder.device else "cuda"),
        torch.empty(50),
    )
    for address, count, told in (
        (0, 50, "logits is null"),
        (row.data_ptr(), 49, "count is 49, it must be 50"),
    ):
        logits = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
        with pytest.raises(native.NativeCallError, match=told):
            native.check(library, library.sk_device_logits(decoder._model, 0, logits, count))
    decoder.logits(torch.ones(1, 64))
    with pytest.raises(native.NativeCallError, match="row is 0; logits of 0 rows were left"):
        decoder.row_of_logits(left, 0)


def test_many_rows_are_brought(decoder, parts):
    rows = range(_abi.SK_LEFT_LOGITS + 1)
    asked = {"output_rows": rows, "temperatures": [1.0] * len(rows)}
    found = decoder.forward(parts, decoder.new_kv(21), **asked, leave_logits=True)
    assert found.logits.shape == (65, 50)


def test_what_stays_is_not_copied(emulator, tiny_decoder, make_part):
    decoder = Decoder(tiny_decoder(vocab_size=1000, layers=ONE_LAYER).packed(), device=emulator)
    count, kv = native.load(emulator).sk_emulator_bytes_out, decoder.new_kv(1)
    count.restype = ctypes.c_uint64
    copied = []
    for left in (False, True):
        before = count()
        asked = {"output_rows": [0], "temperatures": [1.0], "leave_logits": left}
        decoder.forward([make_part([3], 0, [0])], kv, **asked)
        copied.append(count() - before)
    candidates = 256 * 8 + 8
    assert copied == [1000 * 4 + candidates, candidates]
