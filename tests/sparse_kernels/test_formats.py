"""The plan of formats: what can be, its size and its name."""

import pytest

from sparse_kernels.formats import BFLOAT16, DecoderFormats, LayerFormats, MatrixFormat

INT8, INT4 = MatrixFormat(8, 64), MatrixFormat(4, 64)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((5, 64), "bits of a matrix of 5 bits is 5; it can be 16, 8, 4"),
        ((8, 0), "group_size of a matrix of 8 bits is 0; it can be 32, 64, 128"),
        ((4, 48), "group_size of a matrix of 4 bits is 48"),
        ((8, 64, 2), "low_bits of a matrix of 8 bits is 2; it can be 0, 4"),
        ((4, 64, 3), "low_bits of a matrix of 4 bits is 3; it can be 0, 1, 2"),
        ((16, 64), "bfloat16 has group_size 64 and low_bits 0; both must be 0"),
        ((16, 0, 4), "bfloat16 has group_size 0 and low_bits 4"),
        ((16, 0, 0, 32), "bfloat16 has rank 32; it must be 0"),
        ((4, 64, 0, 48), "rank is 48; it can be multiples of 32 up to 512"),
        ((8, 64, 0, 544), "rank is 544"),
        ((8, 64, 0, -32), "rank is -32"),
    ],
)
def test_a_format_that_cannot_be(arguments, told):
    with pytest.raises(ValueError, match=told):
        MatrixFormat(*arguments)


def test_activations_have_8_or_16_bits():
    with pytest.raises(ValueError, match="activation_bits is 12; it can be 8 or 16"):
        DecoderFormats(activation_bits=12)


@pytest.mark.parametrize(
    ("format", "planes"),
    [
        (BFLOAT16, (16,)), (INT8, (8,)), (INT4, (4,)),
        (MatrixFormat(8, 64, 4), (4, 4)), (MatrixFormat(4, 64, 2), (2, 2)), (MatrixFormat(4, 64, 1), (3, 1)),
    ],
)  # fmt: skip
def test_planes_of_a_code(format, planes):
    assert format.planes == planes


def test_bytes_are_those_of_codes_scales_and_zeros():
    assert BFLOAT16.bytes(10, 100) == 2000
    assert INT8.bytes(10, 100) == 1000 + 10 * 2 * 3
    assert MatrixFormat(4, 32, 1).bytes(10, 100) == 500 + 10 * 4 * 3


def test_bytes_of_a_low_rank_term_are_those_of_its_factors_and_its_basis():
    assert MatrixFormat(8, 64, rank=32).bytes(10, 100) == 1000 + 320 + 10 * (2 + 1) * 3
    assert MatrixFormat(4, 32, rank=96).bytes(10, 100) == 500 + 960 + 10 * (4 + 6) * 3
    assert MatrixFormat(4, 32, rank=96).basis_bytes(100) == 96 * 100 * 2
    assert INT8.basis_bytes(100) == 0


def test_an_lm_head_has_no_low_rank_term():
    with pytest.raises(ValueError, match="lm_head has rank 32; an LM head can have 0"):
        DecoderFormats(lm_head=MatrixFormat(8, 64, rank=32))


ALL_INT4, ALL_INT8 = (LayerFormats(own, own, own) for own in (INT4, INT8))
RANKED = LayerFormats(INT4, INT4, MatrixFormat(4, 32, rank=32))


def test_layers_may_have_formats_of_their_own():
    formats = DecoderFormats(*ALL_INT4.matrices, overrides=((2, ALL_INT8), (5, RANKED)))
    layers = [formats.layer(index) for index in range(7)]
    assert layers == [*2 * [ALL_INT4], ALL_INT8, *2 * [ALL_INT4], RANKED, ALL_INT4]
    formats.check_layers(6)
    with pytest.raises(ValueError, match="given for layer 5; the last one is 4"):
        formats.check_layers(5)


def test_one_layer_of_integers_makes_them_quantized():
    only_in_one = DecoderFormats(overrides=((3, LayerFormats(down=INT4)),))
    assert only_in_one.quantized
    assert only_in_one.layers_quantized
    assert not DecoderFormats(lm_head=INT4).layers_quantized


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (((2, ALL_INT8), (2, RANKED)), "layer 2 after 2; indices must rise"),
        (((2, ALL_INT8), (0, RANKED)), "layer 0 after 2"),
        (((-1, ALL_INT8),), "layer -1 after -1"),
        (((1, ALL_INT4),), "overrides of layer 1 change nothing"),
        (
            ((1, LayerFormats(INT4, MatrixFormat(4, 64, 1), INT4)),),
            r"layer 1 has lower planes of \(1, 0\) bits .* others of \(0, 0\); .* the same in all",
        ),
    ],
)
def test_overrides_that_cannot_be(overrides, told):
    with pytest.raises(ValueError, match=told):
        DecoderFormats(*ALL_INT4.matrices, overrides=overrides)


@pytest.mark.parametrize(
    ("formats", "name"),
    [
        (DecoderFormats(), "bfloat16"),
        (DecoderFormats(activation_bits=8), "bfloat16"),
        (DecoderFormats(INT8, INT8, INT8, INT8), "int8"),
        (DecoderFormats(INT4, INT4, INT4, INT8), "int4 (LM head int8)"),
        (DecoderFormats(*4 * [MatrixFormat(4, 32)]), "int4-g32"),
        (DecoderFormats(gate_up=INT4, down=INT8), "int4 (attention bfloat16, down int8, LM head bfloat16)"),
        (DecoderFormats(INT8, MatrixFormat(8, 64, 4), INT8, INT8, 8), "int8 (gate and up in planes of 4 + 4 bits, 8-bit activations)"),
        (DecoderFormats(*3 * [MatrixFormat(4, 64, rank=32)], INT4), "int4 (low-rank terms of rank 32)"),
        (DecoderFormats(INT4, *2 * [MatrixFormat(4, 64, rank=64)], INT4), "int4 (gate and up of rank 64, down of rank 64)"),
        (DecoderFormats(*ALL_INT4.matrices, INT8, overrides=((0, ALL_INT8), (3, ALL_INT8))), "int4 (LM head int8, in 2 layers int8)"),
        (DecoderFormats(*ALL_INT4.matrices, INT4, 8, overrides=((0, ALL_INT8), (3, RANKED))), "int4 (in 2 layers int4-g32 of rank 32 and int8, 8-bit activations)"),
    ],
)  # fmt: skip
def test_names_tell_what_differs(formats, name):
    assert str(formats) == name
