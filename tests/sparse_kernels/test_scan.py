"""The LM head by a scan: the candidates that are asked for have the bits of the exact head."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from sparse_kernels import _abi, native
from sparse_kernels._abi import sk_status
from sparse_kernels.decoder import Decoder, Rows, model_arguments
from sparse_kernels.formats import DecoderFormats, MatrixFormat
from sparse_kernels.native import NativeCallError
from sparse_kernels.pack import PackedDecoder, with_scan
from sparse_kernels.weights import LayerShape, NonFiniteWeights, ScanTensors
from sparserve.compression.scan import make_scan

VOCAB = 3000
ONE_LAYER = [LayerShape(4, 2, 96)]
SHAPES = {
    "as many directions as columns": {"hidden_size": 64, "vocab_size": VOCAB},
    "fewer": {"hidden_size": 192, "vocab_size": VOCAB + 1},
    "columns that fill no tile, tied": {"hidden_size": 100, "vocab_size": 999, "tied": True},
}
NO_DIRECTIONS = torch.zeros(_abi.SK_SCAN_DIRECTIONS, 64, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def states(random_tokens) -> Callable[[Decoder], torch.Tensor]:
    """Hidden states after random tokens, [40, hidden]."""

    def run(decoder: Decoder) -> torch.Tensor:
        return outputs(decoder, random_tokens(40), hidden_rows=range(40)).hidden

    return run


class Prompt:
    """One sequence from its beginning, in the first blocks."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids, self.start = token_ids, 0
        self.block_table = range(-(-len(token_ids) // 16))


def outputs(decoder: Decoder, tokens: Sequence[int], **ask: object) -> Rows:
    return decoder.forward([Prompt(tokens)], decoder.new_kv(8), **ask)


def last_rows(
    decoder: Decoder, tokens: Sequence[int], count: int, needed: Sequence[int] | None = None
) -> tuple[Rows, array]:
    """Candidates of the last `count` rows, and how many logits were rescored."""
    rescored = array("I", [0] * count) if needed else array("I")
    rows = range(len(tokens) - count, len(tokens))
    ask = {"output_rows": rows, "temperatures": [1.0] * count, "needed": needed}
    return outputs(decoder, tokens, rescored=rescored if needed else None, **ask), rescored


def head_of(tiny) -> torch.Tensor:
    return tiny.ends.embedding if tiny.ends.lm_head is None else tiny.ends.lm_head


def scanned(tiny, states) -> PackedDecoder:
    """With a scan made for the model's own states."""
    packed = tiny.packed()
    with Decoder(packed, threads=1) as decoder:
        x = states(decoder)
    inputs = torch.nn.functional.rms_norm(x, packed.norm.shape, packed.norm)
    return with_scan(packed, make_scan(head_of(tiny), inputs))


def assert_same_head(ours: Rows, exact: Rows, needed: Sequence[int]) -> None:
    for row, count in enumerate(needed):
        assert torch.equal(ours.candidate_ids[row, :count], exact.candidate_ids[row, :count])
        assert torch.equal(ours.candidate_logits[row, :count], exact.candidate_logits[row, :count])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("threads", [1, 2])
def test_candidates_have_the_bits_of_the_exact_head(
    shape, threads, cpu_levels, tiny_decoder, random_tokens, states
):
    tiny = tiny_decoder(layers=ONE_LAYER, **shape)
    packed, tokens = scanned(tiny, states), random_tokens(30, seed=1)
    needed, scans = [1, 2, 3, 5, 1, 16, 17, 1], 0  # 46 together
    for isa in cpu_levels:
        decoder = Decoder(packed, threads=threads, isa=isa)
        exact, _ = last_rows(decoder, tokens, len(needed))
        exact = exact._replace(logits=exact.logits.clone())
        for count in (1, 5, len(needed)):  # a batch may have the whole head computed, one row not
            asked = needed[-count:]
            ours, rescored = last_rows(decoder, tokens, count, asked)
            wanted = exact._replace(
                candidate_ids=exact.candidate_ids[-count:],
                candidate_logits=exact.candidate_logits[-count:],
            )
            assert_same_head(ours, wanted, asked)
            whole = [n == tiny.config.vocab_size for n in rescored]
            assert all(whole) or not any(whole)
            if any(whole):
                assert torch.equal(ours.logits, exact.logits[-count:])
                assert torch.equal(ours.log_normalizers, exact.log_normalizers[-count:])
                continue
            scans += count
            assert sum(rescored) <= tiny.config.vocab_size // 4
            assert ours.log_normalizers.isnan().all()
            assert ours.log_normalizers_1.isnan().all()
            for row, own in enumerate(asked):
                assert (ours.candidate_ids[row, own:] == -1).all()
    assert scans, "a scan was enough somewhere"


@pytest.mark.parametrize("needed", [[1, 0], [0, 0], [48, 1], [256, 256]])
def test_rows_that_need_all_or_much_get_all(needed, tiny_decoder, random_tokens, states):
    decoder = Decoder(scanned(tiny_decoder(vocab_size=VOCAB), states), threads=1)
    exact, _ = last_rows(decoder, random_tokens(20), 2)
    expected = [part.clone() for part in exact]
    ours, rescored = last_rows(decoder, random_tokens(20), 2, needed)
    assert list(rescored) == [VOCAB, VOCAB]
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


def test_nearly_equal_tokens_come_in_the_order_of_the_exact_head(
    cpu_levels, tiny_decoder, random_tokens, states
):
    """Hundreds of tokens whose weights differ in a last bit, or not at all."""
    tiny = tiny_decoder(vocab_size=VOCAB)
    with Decoder(tiny.packed(), threads=1) as decoder:
        x = states(decoder)[-1]
    head = tiny.ends.lm_head
    head[100:400] = (x / x.norm() * head.norm(dim=1).mean() * 2).bfloat16()
    head[200:300].view(torch.int16)[:, :3] += 1
    packed, tokens = scanned(tiny, states), random_tokens(40)
    for isa in cpu_levels:
        decoder = Decoder(packed, threads=1, isa=isa)
        exact, _ = last_rows(decoder, tokens, 1)
        ours, rescored = last_rows(decoder, tokens, 1, [48])
        assert 300 <= rescored[0] <= VOCAB // 4
        assert_same_head(ours, exact, [48])


@pytest.fixture
def rough(tiny_decoder) -> tuple:
    """A decoder and a scan without directions, whose token 1234 has the weights of another one."""
    tiny = tiny_decoder(vocab_size=VOCAB)
    scan = make_scan(tiny.ends.lm_head, torch.zeros(1, 64))
    codes = scan.matrix.codes.clone()
    codes[1234] = codes[4].flip(0)
    matrix = replace(scan.matrix, codes=codes)
    off = tiny.ends.lm_head.double() - matrix.dequantize().double()[:, :64]
    errors = torch.stack((torch.zeros(VOCAB), off.norm(dim=1).float() * 1.000001))
    return tiny, ScanTensors(matrix, NO_DIRECTIONS, errors)


def test_a_token_that_the_scan_gets_wrong_is_found_by_its_bound(rough, cpu_levels, random_tokens):
    tiny, scan = rough
    tokens = random_tokens(40)
    packed = tiny.packed()
    with Decoder(packed, threads=1) as decoder:
        hidden = outputs(decoder, tokens, hidden_rows=[39]).hidden[0]
    x = torch.nn.functional.rms_norm(hidden, packed.norm.shape, packed.norm)
    tiny.ends.lm_head[1234] = (x / x.norm() * 20).bfloat16()  # the best by far
    off = float((tiny.ends.lm_head[1234].double() - scan.matrix.dequantize()[1234, :64]).norm())
    scan.errors[1, 1234] = off * 1.000001
    for isa in cpu_levels:
        decoder = Decoder(with_scan(tiny.packed(), scan), threads=1, isa=isa)
        ours, rescored = last_rows(decoder, tokens, 1, [1])
        assert rescored[0] < VOCAB
        assert int(ours.candidate_ids[0, 0]) == 1234
        # It is the bound that finds it.
        blind = replace(scan, errors=torch.zeros(2, VOCAB))
        decoder = Decoder(with_scan(tiny.packed(), blind), threads=1, isa=isa)
        ours, _ = last_rows(decoder, tokens, 1, [1])
        assert int(ours.candidate_ids[0, 0]) != 1234


def test_inputs_that_float32_may_not_hold_are_computed_whole(rough, random_tokens):
    tiny, scan = rough
    tiny.ends.norm.fill_(1e20)
    decoder = Decoder(with_scan(tiny.packed(), scan), threads=1)
    exact, _ = last_rows(decoder, random_tokens(20), 1)
    logits = exact.logits.clone()
    ours, rescored = last_rows(decoder, random_tokens(20), 1, [1])
    assert list(rescored) == [VOCAB]
    assert torch.equal(ours.logits, logits)


def test_without_a_scan_every_row_is_whole(tiny_decoder, random_tokens):
    decoder = Decoder(tiny_decoder(vocab_size=VOCAB).packed(), threads=1)
    assert not decoder.has_scan
    exact, _ = last_rows(decoder, random_tokens(20), 3)
    expected = [part.clone() for part in exact]
    ours, rescored = last_rows(decoder, random_tokens(20), 3, [1, 2, 3])
    assert list(rescored) == [VOCAB] * 3
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("scan.struct_size", 8, "scan"),
        ("scan.rows", VOCAB - 1, "scan is 2999 x 192, the description asks for 3000 x 192"),
        ("scan.columns", 64, "scan is 3000 x 64"),
        ("scan.group_size", 32, "scan has .* scales and"),
        ("scan.codes.bits", 16, "group_size is 64; it can be"),
        ("scan_basis.rows", 63, "scan_basis is 63 x 64, the description asks for 128 x 64"),
        ("scan_basis.codes.data", None, "scan_basis.data is a null"),
        ("scan_errors", None, "scan_errors is a null pointer"),
    ],
)
def test_a_scan_that_cannot_be_is_refused(rough, field, value, told):
    tiny, scan = rough
    packed = with_scan(tiny.packed(), scan)
    arguments = model_arguments(packed, threads=1)
    target = arguments
    *places, name = field.split(".")
    for place in places:
        target = getattr(target, place)
    setattr(target, name, value)
    info = native.new_struct(_abi.sk_model_info)
    library = native.load()
    assert library.sk_model_create(arguments, info) != sk_status.SK_STATUS_OK
    with pytest.raises(NativeCallError, match=told):
        native.check(library, library.sk_model_create(arguments, info))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_errors_that_are_no_bounds_are_refused(rough, value):
    tiny, scan = rough
    packed = with_scan(tiny.packed(), scan)
    packed.scan.errors[1, 17] = value
    with pytest.raises(NativeCallError, match=rf"scan_errors has .* at {VOCAB + 17}; it must be"):
        Decoder(packed, threads=1)


def test_a_scan_beside_a_head_of_integers_is_refused(rough, tiny_decoder):
    _, scan = rough
    int8 = tiny_decoder(vocab_size=VOCAB, formats=DecoderFormats(lm_head=MatrixFormat(8, 64)))
    with pytest.raises(NativeCallError, match="lm_head has 8 bits; beside a scan it can have 16"):
        Decoder(with_scan(int8.packed(), scan), threads=1)
    with pytest.raises(ValueError, match="lm_head is int8; beside a scan"):
        DecoderFormats(lm_head=MatrixFormat(8, 64), lm_head_scan=True)


def test_tensors_of_other_shapes_are_refused(rough):
    tiny, scan = rough
    packed = tiny.packed()
    with pytest.raises(ValueError, match=r"scan errors is .* \[2, 2999\]"):
        with_scan(packed, replace(scan, errors=scan.errors[:, :-1]))
    with pytest.raises(ValueError, match="scan basis is"):
        with_scan(packed, replace(scan, basis=scan.basis.float()))
    with pytest.raises(NonFiniteWeights, match="scan errors"):
        with_scan(packed, replace(scan, errors=scan.errors * torch.inf))


@pytest.mark.parametrize(
    ("needed", "rescored", "error", "told"),
    [
        ([257], array("I", [0]), NativeCallError, "needed is 257 for row 0; a row has 256"),
        ([1, 1], array("I", [0]), ValueError, "1 output rows have 2 numbers"),
        ([1], array("I"), ValueError, "and 0 of type"),
        ([1], array("i", [0]), ValueError, "of type 'i'"),
        (None, array("I", [0]), ValueError, "0 numbers in `needed` and 1"),
    ],
)
def test_calls_that_cannot_be_are_refused(tiny_decoder, needed, rescored, error, told):
    decoder = Decoder(tiny_decoder(vocab_size=VOCAB).packed(), threads=1)
    with pytest.raises(error, match=told):
        outputs(
            decoder, [1, 2], output_rows=[1], temperatures=[1.0], needed=needed, rescored=rescored
        )
