"""Random tiny decoders of any shape, for the packer, the library and the oracle."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from sparse_kernels import native, reference
from sparse_kernels.choice import NeuronChoice, Score, core_words
from sparse_kernels.decoder import BLOCK_SIZE, Decoder, Rows, Wanted
from sparse_kernels.formats import DecoderFormats, LayerFormats
from sparse_kernels.pack import PackedDecoder, pack, with_choice
from sparse_kernels.weights import (
    ChoiceTensors,
    DecoderConfig,
    EndTensors,
    Factors,
    LayerShape,
    LayerTensors,
)
from sparserve.compression.quantize import quantize, quantize_layer

LEVELS = ("portable", "avx2", "avx512", "amx")
BFLOAT16_MODEL = DecoderFormats()
TWO_LAYERS = (LayerShape(4, 2, 96), LayerShape(4, 2, 96))


@dataclass(frozen=True)
class Tiny:
    config: DecoderConfig
    ends: EndTensors
    layers: list[LayerTensors]
    formats: DecoderFormats = BFLOAT16_MODEL
    choice: ChoiceTensors | None = None

    def packed(self) -> PackedDecoder:
        packed = pack(self.config, self.ends, self.layers, self.formats)
        return packed if self.choice is None else with_choice(packed, self.choice)

    def quantized(self, formats: DecoderFormats) -> "Tiny":
        ends = self.ends
        if formats.lm_head.quantized:
            head = ends.embedding if ends.lm_head is None else ends.lm_head
            ends = replace(ends, lm_head=quantize(head, formats.lm_head, "lm_head"))
        layers = [
            with_low_rank(quantize_layer(layer, own, ""), own, index)
            for index, layer in enumerate(self.layers)
            for own in [formats.layer(index)]
        ]
        return Tiny(self.config, ends, layers, formats)


def with_low_rank(layer: LayerTensors, formats: LayerFormats, seed: int) -> LayerTensors:
    """Random low-rank terms of the ranks of `formats`, about half as large as what they are added to."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "qkv": (("q", "k", "v"), formats.attention),
        "output": (("output",), formats.attention),
        "gate_up": (("gate", "up"), formats.gate_up),
        "down": (("down",), formats.down),
    }
    for basis, (names, format) in parts.items():
        if not format.rank:
            continue
        size = 1.0
        for name in names:
            matrix = getattr(layer, name)
            rows, columns = matrix.codes.shape
            codes = torch.randint(0, 256, (rows, format.rank), generator=generator)
            scales = torch.rand(rows, generator=generator) * 0.013 * format.rank**-0.5
            if name == "down":  # the scales are about the matrix's, see Factors
                wanted, scales = scales * (columns / rows) ** 0.5, matrix.scales.float().amax(dim=1)
                size = float(wanted.mean() / scales.mean())
            factors = Factors(codes.to(torch.uint8), scales.half())
            layer = replace(layer, **{name: replace(matrix, factors=factors)})
        values = torch.randn(format.rank, columns, generator=generator) * size * columns**-0.5
        layer = replace(layer, **{f"{basis}_basis": values.bfloat16()})
    return layer


def make_tiny(
    *,
    hidden_size: int = 64,
    vocab_size: int = 50,
    head_dim: int = 16,
    layers: Sequence[LayerShape] = TWO_LAYERS,
    biases: bool = False,
    head_norms: bool = False,
    tied: bool = False,
    rope_rows: int = 1,
    rope_scale: float = 1.0,
    rms_norm_eps: float = 1e-5,
    seed: int = 0,
    formats: DecoderFormats = BFLOAT16_MODEL,
) -> Tiny:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator)
        return (values * scale * columns**-0.5).bfloat16()

    def vector(length: int, base: float = 1.0) -> torch.Tensor:
        return base + 0.2 * torch.randn(length, generator=generator)

    def layer(shape: LayerShape) -> LayerTensors:
        q, kv = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
        tensors = LayerTensors(
            q=matrix(q, hidden_size),
            k=matrix(kv, hidden_size),
            v=matrix(kv, hidden_size),
            output=matrix(hidden_size, q),
            gate=matrix(shape.intermediate_size, hidden_size),
            up=matrix(shape.intermediate_size, hidden_size),
            down=matrix(hidden_size, shape.intermediate_size),
            attention_norm=vector(hidden_size),
            mlp_norm=vector(hidden_size),
        )
        if biases:
            tensors = replace(
                tensors,
                q_bias=vector(q, 0.0),
                k_bias=vector(kv, 0.0),
                v_bias=vector(kv, 0.0),
                output_bias=vector(hidden_size, 0.0),
                down_bias=vector(hidden_size, 0.0),
            )
        if head_norms:
            tensors = replace(tensors, q_norm=vector(head_dim), k_norm=vector(head_dim))
        return tensors

    exponents = torch.arange(0, head_dim, 2) / head_dim
    frequencies = 1.0 / 100.0**exponents
    if rope_rows > 1:
        frequencies = frequencies * torch.linspace(1, 0.5, rope_rows)[:, None]
    config = DecoderConfig(
        hidden_size, vocab_size, head_dim, rms_norm_eps, frequencies, layers, rope_scale
    )
    ends = EndTensors(
        matrix(vocab_size, hidden_size, 8.0),
        vector(hidden_size),
        None if tied else matrix(vocab_size, hidden_size, 4.0),
    )
    return Tiny(config, ends, [layer(shape) for shape in layers]).quantized(formats)


@pytest.fixture(scope="session")
def tiny_decoder() -> Callable[..., Tiny]:
    """`tiny_decoder(hidden_size=…, …)`: its constants and random weights."""
    return make_tiny


@pytest.fixture(scope="session")
def chooser() -> Callable[..., Tiny]:
    """`chooser(formats, **shape)`: a tiny decoder whose sequences can choose in every way, two corrections."""

    def make(formats: DecoderFormats, **shape: Any) -> Tiny:
        tiny = make_tiny(**shape, formats=formats)
        layers, hidden = tiny.config.layers, tiny.config.hidden_size
        widest = max(layer.intermediate_size for layer in layers)
        generator = torch.Generator().manual_seed(3)

        def pair(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
            inputs, outputs = torch.randn(2, rank, hidden, generator=generator) * hidden**-0.5
            return inputs.bfloat16(), outputs.bfloat16()

        factors = torch.rand(2, len(layers), widest, generator=generator) + 0.5
        tensors = ChoiceTensors(
            factors[0] if formats.gate_up.low_bits else None,
            factors[1],
            [[pair(rank) for _ in layers] for rank in (5, 32)],
        )
        return replace(tiny, choice=tensors)

    return make


@pytest.fixture(scope="session")
def random_core() -> Callable[..., torch.Tensor]:
    """`random_core(tiny, share, seed)` -> words."""

    def make(tiny: Tiny, share: float, seed: int = 0) -> torch.Tensor:
        layers = tiny.config.layers
        widest = max(layer.intermediate_size for layer in layers)
        generator = torch.Generator().manual_seed(seed)
        return core_words(torch.rand(len(layers), widest, generator=generator) < share)

    return make


@pytest.fixture(scope="session")
def cpu_levels() -> list[str]:
    """All that this machine's CPU runs, ascending."""
    return list(LEVELS[: LEVELS.index(native.cpu_features().highest_isa) + 1])


@pytest.fixture(
    scope="session", params=["cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]
)
def levels(request: pytest.FixtureRequest, cpu_levels: list[str]) -> list[str]:
    """What a machine can compute with: each level of the CPU; for a GPU and its emulator one by that name."""
    if request.param == "cpu":
        return cpu_levels
    if request.param == "emulator":
        try:
            native.load("emulator")
        except native.NativeLibraryError as error:
            pytest.skip(str(error))
    return [request.param]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`soak_on_emulator(*words, unless=…)`: what has one of these words in its name, and none of `unless`, is no part
    of the default run where it is for the emulator, which takes seconds where a CPU takes milliseconds."""
    for item in items:
        mark = item.get_closest_marker("soak_on_emulator")
        if mark is None or "emulator" not in item.name:
            continue
        named = not mark.args or any(word in item.name for word in mark.args)
        if named and not any(word in item.name for word in mark.kwargs.get("unless", ())):
            item.add_marker(pytest.mark.soak)


@pytest.fixture(params=["emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return _loaded(request.param)


@pytest.fixture
def emulator() -> Iterator[str]:
    """For tests in which it fails by order; it works again after them."""
    yield _loaded("emulator")
    native.load("emulator").sk_emulator_reset()


def _loaded(kind: str) -> str:
    try:
        native.load(kind)
    except native.NativeLibraryError as error:
        pytest.skip(str(error))
    return kind


@pytest.fixture(scope="session", params=[16, 8], ids=["bfloat16 KV", "int8 KV"])
def kv_bits(request: pytest.FixtureRequest) -> int:
    """Of keys and values in the cache, each in turn."""
    return int(request.param)


@dataclass(frozen=True)
class Part:
    """Some tokens of a sequence."""

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]


@dataclass
class Run:
    """One sequence: tokens, its blocks, and all that came out so far."""

    tokens: Sequence[int]
    table: Sequence[int]
    temperature: float = 1.0
    done: int = 0
    rows: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    statistics: torch.Tensor | None = None  # [KV blocks, layers, neurons]
    choice: NeuronChoice | None = None
    reads: torch.Tensor | None = None  # [layers, 4]
    score: Score = Score.NORM
    score_share: float = 1.0


class Machine:
    """A decoder with a KV cache, on which several runs may go on. `isa`: one of `levels`."""

    def __init__(
        self, tiny: Tiny, blocks: int, threads: int, isa: str, kv_bits: int, core_copies: bool
    ) -> None:
        self.tiny, self.num_blocks = tiny, blocks
        packed = tiny.packed()
        on_cpu = {"threads": threads, "isa": isa}
        device = {"device": isa} if isa in ("emulator", "cuda") else on_cpu
        self.decoder = Decoder(packed, **device, kv_bits=kv_bits, core_copies=core_copies)
        self.kv = self.decoder.new_kv(blocks)
        if self.decoder.device == "cpu":  # elsewhere they are let go of
            self.packed = packed

    @contextmanager
    def changed_kv(self) -> Iterator[torch.Tensor]:
        """All bytes of the KV cache, which are written back."""
        kv = self.kv.read(0, self.kv.nbytes)
        yield kv
        self.kv.write(0, kv)

    def step(
        self,
        *steps: tuple[Run, int],
        prompts: bool = False,
        union_reads: torch.Tensor | None = None,
    ) -> Rows:
        """The next tokens of some runs, as one batch; every row is an output."""
        layers = self.tiny.config.layers
        parts, sums, temperatures = [], [], []
        for run, count in steps:
            stop = run.done + count
            parts.append(Part(run.tokens[run.done : stop], run.done, run.table))
            blocks = (stop - 1) // BLOCK_SIZE - run.done // BLOCK_SIZE + 1
            widest = max(layer.intermediate_size for layer in layers)
            sums.append(torch.zeros(blocks, len(layers), widest, dtype=torch.int64))
            temperatures += [run.temperature] * count
        everything = range(len(temperatures))
        rows = self.decoder.forward(
            parts,
            self.kv,
            output_rows=everything,
            temperatures=temperatures,
            hidden_rows=everything,
            prompts=prompts,
            wanted=[
                Wanted(run.choice, part, run.score, run.score_share, run.reads)
                for (run, _), part in zip(steps, sums, strict=True)
            ],
            union_reads=union_reads,
        )
        row = 0
        for (run, count), part in zip(steps, sums, strict=True):
            for _ in range(count):
                run.rows.append(tuple(result[row].clone() for result in rows))
                row += 1
            self._add_statistics(run, part)
            run.done += count
        return rows

    def _add_statistics(self, run: Run, part: torch.Tensor) -> None:
        if run.statistics is None:
            run.statistics = torch.zeros(len(run.table), *part.shape[1:], dtype=torch.int64)
        first = run.done // BLOCK_SIZE
        run.statistics[first : first + len(part)] += part

    def alone(
        self, tokens: Sequence[int], temperature: float = 1.0, *, prompts: bool = False
    ) -> Run:
        """All tokens in one piece, in the first blocks."""
        run = Run(tokens, range(-(-len(tokens) // BLOCK_SIZE)), temperature)
        self.step((run, len(tokens)), prompts=prompts)
        return run

    def blocks_of(self, run: Run) -> list[torch.Tensor]:
        """Of each layer the run's KV blocks, [blocks, bytes of a block]."""
        heads = [layer.num_kv_heads for layer in self.tiny.config.layers]
        head_bytes = self.decoder.kv_block_bytes // sum(heads)
        kv = self.kv.read(0, self.kv.nbytes)
        layers = kv.split([self.num_blocks * count * head_bytes for count in heads])
        return [part.view(self.num_blocks, -1)[list(run.table)] for part in layers]

    def kv_of(self, run: Run) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Of each layer and block the keys and values [BLOCK_SIZE, num_kv_heads, head_dim]."""
        config, bits = self.tiny.config, self.decoder.kv_bits
        return [
            [reference.block_of(shape, config.head_dim, bits, block) for block in blocks]
            for shape, blocks in zip(config.layers, self.blocks_of(run), strict=True)
        ]


@pytest.fixture(scope="session")
def make_machine() -> Callable[..., Machine]:
    """`make_machine(tiny, blocks, threads, isa, kv_bits, core_copies)`."""

    def make(
        tiny: Tiny,
        blocks: int = 32,
        threads: int = 1,
        isa: str = "auto",
        kv_bits: int = 16,
        core_copies: bool = True,
    ) -> Machine:
        return Machine(tiny, blocks, threads, isa, kv_bits, core_copies)

    return make


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Run]:
    """`make_run(tokens, table, temperature)`."""
    return Run


@pytest.fixture(scope="session")
def make_part() -> Callable[..., Part]:
    """`make_part(token_ids, start, block_table)`."""
    return Part


@pytest.fixture(scope="session")
def random_tokens() -> Callable[..., list[int]]:
    """`random_tokens(count, seed)` of a vocabulary of 50."""

    def draw(count: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 50, (count,), generator=generator).tolist()

    return draw
