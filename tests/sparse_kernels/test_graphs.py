"""Steps that a GPU repeats as graphs: the bits of the same steps, launched kernel by kernel."""

from array import array
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

from sparse_kernels import _abi, native
from sparse_kernels.choice import ChoiceKind, NeuronChoice
from sparse_kernels.decoder import BLOCK_SIZE, PHASES, Decoder, Wanted, model_arguments
from sparse_kernels.formats import DecoderFormats, MatrixFormat
from sparse_kernels.kv_memory import KvMemory
from sparse_kernels.weights import LayerShape

BLOCKS = 48  # of KV; three sequences have up to 16
MOST_KEPT = 32
ONE_LAYER = [LayerShape(4, 2, 96)]
IN_PLANES = DecoderFormats(
    MatrixFormat(8, 64), MatrixFormat(8, 64, 4), MatrixFormat(8, 64), MatrixFormat(8, 64)
)


class Pair:
    """A decoder with graphs and one without, each with its KV; both are given the same steps."""

    def __init__(self, tiny, device: str, make_part, kv_bits: int = 16) -> None:
        made = partial(Decoder, tiny.packed(), device=device, kv_bits=kv_bits)
        self.decoders = [made(), made(graphs=False)]
        self.kv = [filled_kv(decoder, BLOCKS) for decoder in self.decoders]
        self.make_part = make_part
        self.reads_shape = (len(tiny.config.layers), 4)

    def step(
        self,
        *places: tuple[int, int],
        choices: Sequence[NeuronChoice | None] = (),
        outputs: Sequence[int] | None = None,
        **asked,
    ) -> None:
        """One token of each sequence, (its number, its position): all that is computed is the same."""
        parts = [
            self.make_part([(7 * position + number) % 50], position, table_of(number, position))
            for number, position in places
        ]
        rows = range(len(parts)) if outputs is None else outputs
        found = []
        for decoder, kv in zip(self.decoders, self.kv, strict=True):
            reads = torch.zeros(len(parts) + 1, *self.reads_shape, dtype=torch.int64)
            wanted = [
                Wanted(choice, reads=own)
                for choice, own in zip(choices or [None] * len(parts), reads, strict=False)
            ]
            told = decoder.forward(
                parts,
                kv,
                output_rows=rows,
                temperatures=[0.5 + row for row in rows],
                wanted=wanted,
                union_reads=reads[-1],
                **asked,
            )
            found.append([*(tensor.clone() for tensor in told), reads])
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs)

    def assert_same_kv(self) -> None:
        ours, theirs = (kv.read(0, kv.nbytes) for kv in self.kv)
        assert torch.equal(ours, theirs)

    @property
    def counts(self) -> tuple[int, int]:
        """Graphs made, and launches of them."""
        captures, launches, _, why_not = self.decoders[0].graphs()
        assert not why_not
        assert self.decoders[1].graphs()[:3] == (0, 0, 0)
        return captures, launches


def filled_kv(decoder: Decoder, blocks: int) -> KvMemory:
    """Of some numbers, so that no context must be computed: no byte makes a large one."""
    kv = decoder.new_kv(blocks)
    bytes_ = torch.randint(0, 64, (kv.nbytes,), generator=torch.Generator().manual_seed(1))
    kv.write(0, bytes_.to(torch.uint8))
    return kv


def table_of(number: int, position: int) -> list[int]:
    """As long as it must be. Blocks of three sequences, in no order."""
    return [(number + 3 * block) * 7 % BLOCKS for block in range(position // BLOCK_SIZE + 1)]


@pytest.fixture
def pair(device, make_part) -> Callable[..., Pair]:
    """`pair(tiny, kv_bits=…)`."""
    return lambda tiny, **settings: Pair(tiny, device, make_part, **settings)


def test_contexts_grow_and_batches_change(pair, kv_bits, tiny_decoder):
    windows = [LayerShape(4, 2, 96), LayerShape(4, 2, 96, window=150)]
    both = pair(tiny_decoder(layers=windows), kv_bits=kv_bits)
    # A chunk of attention has 128 positions: 1, then 2, then 3 of them, in graphs for 1, 2 and 4.
    for position in range(126, 131):
        both.step((0, position), (1, position - 100), (2, 3))
    assert both.counts == (2, 3)
    for position in range(254, 259):
        both.step((0, position), (1, 130))
    for _ in range(2):  # as before, and others; another order
        both.step((2, 17), (0, 128), (1, 90))
        both.step((1, 20))
    both.assert_same_kv()
    assert both.counts == (5, 3 + 3 + 3)


def test_each_sequence_chooses(pair, chooser, random_core):
    tiny = chooser(IN_PLANES, hidden_size=128)

    def thresholds(*values: float) -> torch.Tensor:
        return torch.tensor([values] * len(tiny.config.layers))

    core = random_core(tiny, 0.4)
    choices = [
        NeuronChoice(core),
        None,
        NeuronChoice(None, ChoiceKind.GATE, thresholds(0.2, 0, 0), correction=2),
    ]
    in_planes = NeuronChoice(core, ChoiceKind.PLANES, thresholds(0.1, 0.05, 0.2), correction=1)
    both = pair(tiny)
    # Tables grow within these steps, so that what comes after them moves.
    for position in range(14, 18):
        both.step((0, position), (1, 40), (2, 9), choices=choices)
        choices = choices[1:] + choices[:1]
    assert both.counts == (1, 3)
    for position in range(18, 21):
        both.step((0, position), (1, position), (2, 9), choices=[in_planes, *choices[1:]])
        both.step((0, position), (1, position), (2, 9), choices=[NeuronChoice(core), None, None])
    both.step((0, 30), (1, 31), (2, 32))  # all neurons
    both.assert_same_kv()
    assert both.counts == (3, 3 + 2 + 2)


def test_a_longer_step_moves_its_memory(pair, tiny_decoder):
    both = pair(tiny_decoder(layers=ONE_LAYER))
    for _ in range(3):
        both.step((0, 5))
    assert both.counts == (1, 2)
    both.step(*((number % 3, 100 + number) for number in range(33)))  # too many rows for a graph
    for _ in range(3):
        both.step((0, 5))
    assert both.counts in ((2, 4), (1, 5))  # it may grow where it stands


def test_another_kv_pool(pair, tiny_decoder):
    both = pair(tiny_decoder(layers=ONE_LAYER))
    for _ in range(2):
        both.step((0, 20), (1, 3))
    before = both.kv
    both.kv = [filled_kv(decoder, BLOCKS) for decoder in both.decoders]
    for position in range(20, 24):
        both.step((0, position), (1, 3))
    both.assert_same_kv()
    both.kv = before
    both.step((0, 20), (1, 3))
    both.assert_same_kv()
    assert both.counts == (2, 1 + 3 + 1)


def test_only_steps_that_can_come_again(pair, tiny_decoder):
    both = pair(tiny_decoder(layers=ONE_LAYER))
    for _ in range(3):
        both.step((0, 20), hidden_rows=[0])
        both.step((0, 20), prompts=True)
        both.step((0, 20), phase_seconds=array("d", [0.0] * len(PHASES)))
    assert both.counts == (0, 0)
    for _ in range(2):
        both.step((0, 20), (1, 9), outputs=[1])
        both.step((0, 20), (1, 9), outputs=[])
    assert both.counts == (2, 2)


def test_few_are_kept(device, tiny_decoder, make_part):
    decoder = Decoder(tiny_decoder(layers=ONE_LAYER).packed(), device=device)
    part = make_part([3], 0, [0])
    pools = [decoder.new_kv(blocks) for blocks in range(1, MOST_KEPT + 3)]
    for kv in pools:
        for _ in range(2):
            decoder.forward([part], kv)
    assert decoder.graphs() == (len(pools), len(pools), MOST_KEPT, "")
    for kv in (pools[-1], pools[0]):  # the latest is there, the first is not
        decoder.forward([part], kv)
    assert decoder.graphs() == (len(pools), len(pools) + 1, MOST_KEPT - 1, "")


def test_a_launch_that_fails(emulator, tiny_decoder, make_part):
    both = Pair(tiny_decoder(layers=ONE_LAYER), emulator, make_part)
    library = native.load(emulator)
    for _ in range(2):
        both.step((0, 20), (1, 3))
    library.sk_emulator_fail_launch(4)
    with pytest.raises(native.DeviceLost, match="fails as a test asked for"):
        both.step((0, 21), (1, 4))
    with pytest.raises(native.DeviceLost):
        both.step((0, 21), (1, 4))
    library.sk_emulator_reset()
    both.step((0, 21), (1, 4))
    both.assert_same_kv()


@pytest.mark.parametrize(
    ("what", "told"),
    [(1, "capturing a graph"), (2, "making a graph"), (3, "launch of a graph")],
)
def test_where_no_graph_can_be_made(emulator, tiny_decoder, make_part, what, told):
    both = Pair(tiny_decoder(layers=ONE_LAYER), emulator, make_part)
    both.step((0, 20), (1, 3))
    native.load(emulator).sk_emulator_fail_graph(what)
    for position in range(21, 24):
        both.step((0, position), (1, 3))
    both.assert_same_kv()
    captures, launches, kept, why_not = both.decoders[0].graphs()
    assert (captures, launches, kept) == (int(what == 3), 0, 0)
    assert why_not == f"GPU 0, emulator: {told}: fails as a test asked for"


def test_what_the_library_refuses(emulator, tiny_decoder):
    library, packed = native.load(emulator), tiny_decoder(layers=ONE_LAYER).packed()
    arguments, info = model_arguments(packed, threads=1), native.new_struct(_abi.sk_model_info)
    arguments.graphs = 2
    with pytest.raises(
        native.NativeCallError,
        match="graphs 2 and core_copy_bytes 0; for a GPU they are 1, 0, 0 or 1, and 0",
    ):
        native.check(library, library.sk_model_create(arguments, info))
    decoder = Decoder(packed, device=emulator)
    for count, told in (
        (0, _abi.sk_status.SK_STATUS_OK),
        (1, _abi.sk_status.SK_STATUS_ABI_MISMATCH),
    ):
        counts = native.new_struct(_abi.sk_graphs_info)
        counts.struct_size -= count
        assert library.sk_device_graphs(decoder._model, counts) == told


def test_the_cpu_has_none(tiny_decoder):
    assert Decoder(tiny_decoder().packed()).graphs() is None
