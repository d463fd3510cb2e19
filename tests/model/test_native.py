"""The native backend's own: scores of prompts, what it tells of itself, and its one copy of the weights."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_kernels import native
from sparse_kernels.choice import ALL_NEURONS, NeuronChoice, core_words
from sparse_kernels.formats import DecoderFormats, LayerFormats, MatrixFormat
from sparserve.compression.quantize import quantize
from sparserve.errors import CorruptCheckpoint, UnsupportedModel
from sparserve.model import loader
from sparserve.model.backend import BLOCK_SIZE, Backend, ForwardBatch, Phase, SequenceInput
from sparserve.model.candidates import target_scores, top_candidates
from sparserve.model.loader import load_model
from sparserve.model.native import NativeBackend
from sparserve.model.packing import make_decoder
from sparserve.model.weights import LayerWeights

INT8, INT4 = MatrixFormat(8, 64), MatrixFormat(4, 32)
ALL_INT8 = DecoderFormats(INT8, INT8, INT8, INT8)
FORMATS = {
    "int8": ALL_INT8,
    "int4, head int8": DecoderFormats(INT4, INT4, INT4, INT8),
    "planes": DecoderFormats(INT8, MatrixFormat(8, 64, low_bits=4), INT8, INT8),
    "feed-forward": DecoderFormats(gate_up=INT4, down=INT4),
    "attention": DecoderFormats(attention=INT8),
    "head": DecoderFormats(lm_head=INT4),
}
# Attention in bfloat16 and int8, feed-forwards in int4 and int8.
BY_LAYER = DecoderFormats(gate_up=INT4, down=INT4, overrides=((1, LayerFormats(INT8, INT8, INT8)),))


@pytest.fixture(scope="module")
def backend(tiny_bfloat16, make_backend) -> Backend:
    return make_backend(tiny_bfloat16, kind="cpu", threads=2)


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, 259, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_scores_are_those_of_the_rows_that_the_targets_follow(backend, all_logits):
    """More targets than are scored at once, in the middle of a batch, and a first token alone."""
    tokens, other = random_tokens(150, 1), random_tokens(20, 2)
    asking = SequenceInput(tokens, 0, range(10), Phase.PREFILL, targets=tokens[1:], num_top=3)
    second = SequenceInput(other, 0, [20, 21], Phase.PREFILL, targets=other[1:11], num_top=0)
    plain = replace(second, block_table=[30, 31], targets=())
    output = backend.forward(
        ForwardBatch([plain, asking, second, replace(plain, output_offsets=[5])])
    )
    assert [part is None for part in output.scores] == [True, False, False, True]
    for sequence, scores in ((asking, output.scores[1]), (second, output.scores[2])):
        rows = replace(sequence, targets=(), output_offsets=range(len(sequence.targets)))
        logits = all_logits(backend.forward(ForwardBatch([rows])))
        expected = target_scores(logits, sequence.targets, sequence.num_top)
        assert torch.equal(scores.logprobs, expected.logprobs)
        assert torch.equal(scores.top_ids, expected.top_ids)
        assert torch.equal(scores.top_logprobs, expected.top_logprobs)
        exact = logits.double().log_softmax(dim=1)[range(len(logits)), list(sequence.targets)]
        torch.testing.assert_close(scores.logprobs.double(), exact, atol=1e-5, rtol=1e-5)


def test_candidates_are_those_of_the_whole_rows(backend, all_logits):
    tokens = random_tokens(30, 3)
    span = SequenceInput(
        tokens, 0, [7, 3], Phase.PREFILL, output_offsets=[29, 4, 4], temperature=0.3
    )
    output = backend.forward(ForwardBatch([span]))
    expected = top_candidates(all_logits(output), torch.full((3,), 0.3))
    found = output.candidates
    assert torch.equal(found.token_ids.long(), expected.token_ids)
    assert torch.equal(found.logits, expected.logits)
    for name in ("log_normalizer", "log_normalizer_1"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-6
        )


def test_it_is_near_the_reference_backend(tiny_bfloat16, backend, make_backend, all_logits):
    reference = make_backend(tiny_bfloat16)
    rows = []
    for one in (backend, reference):
        tokens, logits = random_tokens(90, 4), []
        for start, stop, phase in ((0, 70, Phase.PREFILL), (70, 90, Phase.DECODE)):
            span = SequenceInput(
                tokens[start:stop], start, range(6), phase, output_offsets=range(stop - start)
            )
            logits.append(all_logits(one.forward(ForwardBatch([span]))))
        rows.append(torch.cat(logits))
    ours, theirs = rows
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_biases_are_those_of_the_reference_backend(
    tiny_bfloat16, with_biases, make_backend, all_logits
):
    """In prompts and steps, alone and in a batch, whatever neurons are chosen."""
    biased = with_biases(tiny_bfloat16)
    # Without one bias of down alone it is another model.
    without = replace(biased.weights, layers=[*biased.weights.layers])
    without.layers[1] = replace(without.layers[1], bd=torch.zeros(64))
    neurons = torch.rand(2, 96, generator=torch.Generator().manual_seed(1)) < 0.6
    core = NeuronChoice(core_words(neurons))
    tokens, other = random_tokens(60, 6), random_tokens(12, 7)

    def run(backend) -> torch.Tensor:
        rows = []

        def step(*batch: SequenceInput) -> None:
            rows.append(all_logits(backend.forward(ForwardBatch(batch))))

        def part(start: int, stop: int, phase: Phase, choice=ALL_NEURONS) -> SequenceInput:
            return SequenceInput(
                tokens[start:stop], start, range(4), phase,
                output_offsets=range(stop - start), choice=choice,
            )  # fmt: skip

        step(part(0, 40, Phase.PREFILL))
        step(
            SequenceInput(other, 0, [9], Phase.PREFILL, output_offsets=[11]),
            part(40, 41, Phase.DECODE),
        )
        step(part(41, 42, Phase.DECODE, core))
        step(part(42, 60, Phase.DECODE))
        return torch.cat(rows)

    ours, theirs = (run(make_backend(biased, kind=kind)) for kind in ("cpu", "reference"))
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    for kind in ("cpu", "reference"):
        found = run(make_backend(replace(biased, weights=without), kind=kind))
        assert (found - theirs).norm() > 0.05 * theirs.norm()


def rounded(model, formats: DecoderFormats):
    """The model whose weights are, in float32, the numbers that the integers stand for."""

    def of(weight: torch.Tensor, format: MatrixFormat) -> torch.Tensor:
        if not format.quantized:
            return weight.float()
        return quantize(weight, format, "").dequantize()

    def layer(given: LayerWeights) -> LayerWeights:
        attention = {n: of(getattr(given, n), formats.attention) for n in ("wq", "wk", "wv", "wo")}
        gate_up = {n: of(getattr(given, n), formats.gate_up) for n in ("w_gate", "w_up")}
        return replace(given, **attention, **gate_up, w_down=of(given.w_down.T, formats.down).T)

    weights = model.weights
    layers = [layer(weights.layers[i]) for i in range(model.config.num_layers)]
    head, embedding = of(weights.lm_head, formats.lm_head), weights.embedding.float()
    return replace(
        model, weights=replace(weights, layers=layers, lm_head=head, embedding=embedding)
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
def test_integers_are_near_the_reference_backend_on_the_same_numbers(
    formats, tied, write_tiny_checkpoint, tmp_path, make_backend, all_logits
):
    folder = write_tiny_checkpoint(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=tied)
    model = load_model(str(folder), dtype="bfloat16", layers_at_use=True)
    tokens = random_tokens(60, 5)
    span = SequenceInput(tokens, 0, range(4), Phase.PREFILL, output_offsets=range(60))
    ours, theirs, unrounded = (
        all_logits(backend.forward(ForwardBatch([span])))
        for backend in (
            make_backend(model, kind="cpu", formats=formats),
            make_backend(rounded(model, formats)),
            make_backend(rounded(model, DecoderFormats())),
        )
    )
    off = (ours - theirs).norm()
    assert off < 0.02 * theirs.norm()
    assert off < 0.5 * (ours - unrounded).norm(), "it is the rounded model, not the other"


def test_it_tells_what_it_is(backend, tiny_bfloat16, make_backend):
    info, reference = backend.info, make_backend(tiny_bfloat16).info
    assert info.isa == native.cpu_features().isa
    assert info.title == f"cpu ({info.isa})"
    assert (info.name, info.device, info.dtype, info.threads) == ("cpu", "cpu", "bfloat16", 2)
    for name in (
        "dtype", "choices", "neuron_bytes", "weight_bytes", "mlp_bytes", "kv_dtype", "kv_bytes_per_token",
    ):  # fmt: skip
        assert getattr(info, name) == getattr(reference, name)


@pytest.mark.parametrize(
    ("formats", "attention", "mlp", "head"),
    [
        (DecoderFormats(), 12288 * 2, 18432 * 2, 16576 * 2),
        # A group of 64 is a row: 3 bytes of scale and zero for each.
        (ALL_INT8, 12288 + 192 * 3, 18432 + 288 * 3, 16576 + 259 * 3),
        (FORMATS["planes"], 12288 + 192 * 3, 18432 + 288 * 3, 16576 + 259 * 3),
        (FORMATS["int4, head int8"], 12288 // 2 + 384 * 3, 18432 // 2 + 576 * 3, 16576 + 259 * 3),
        (FORMATS["feed-forward"], 12288 * 2, 18432 // 2 + 576 * 3, 16576 * 2),
        # The mean of two layers.
        (BY_LAYER, (12288 * 3 + 192 * 3) // 2, (18432 + 288 * 3 + 18432 // 2 + 576 * 3) // 2, 16576 * 2),
    ],
)  # fmt: skip
def test_bytes_of_a_step_are_codes_scales_and_zeros(
    formats, attention, mlp, head, tiny_bfloat16, make_backend
):
    info = make_backend(tiny_bfloat16, kind="cpu", formats=formats).info
    vectors = 5 * 64 * 4  # norms
    assert info.mlp_bytes == 2 * mlp
    assert info.weight_bytes == 2 * (attention + mlp) + head + vectors
    assert info.dtype == str(formats)


def test_neurons_are_counted_by_the_bytes_of_their_layer(tiny_bfloat16, make_backend):
    info = make_backend(tiny_bfloat16, kind="cpu", formats=BY_LAYER).info
    int4, int8 = 64 // 2 + 2 * 3, 64 + 3  # a row
    counts = torch.tensor([[10, 5, 0, 0], [20, 7, 0, 0]])
    read = 10 * int4 + 5 * 2 * int4 + 20 * int8 + 7 * 2 * int8
    assert info.read_bytes(None, counts) == read
    assert info.neuron_bytes[None] == ((int4 + int8) / 2, int4 + int8, 0, 0)


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_blocks_of_kv_are_bytes_that_can_be_moved(tiny_bfloat16, kv_bits):
    model, tokens = tiny_bfloat16, random_tokens(33, 5)
    decoder = make_decoder(model.config, model.weights, threads=1, kv_bits=kv_bits)
    backend = NativeBackend(model.config, decoder, num_blocks=9)

    def last_logits(table: list[int], start: int) -> torch.Tensor:
        span = SequenceInput(
            tokens[start:], start, table, Phase.DECODE, output_offsets=[32 - start]
        )
        return backend.forward(ForwardBatch([span])).candidates.logits

    expected = last_logits([4, 1, 7], 0)
    blocks = backend.read_blocks([4, 1])
    layer_bytes = (
        model.config.num_kv_heads * BLOCK_SIZE * 2 * (model.config.head_dim * kv_bits // 8)
    )
    layer_bytes += 0 if kv_bits == 16 else model.config.num_kv_heads * BLOCK_SIZE * 2 * 2  # scales
    assert (blocks.dtype, blocks.shape) == (
        torch.uint8,
        (2, model.config.num_layers * layer_bytes),
    )
    backend.write_blocks([4, 1], torch.zeros_like(blocks))
    assert not torch.equal(last_logits([4, 1, 8], 32), expected)
    backend.write_blocks([2, 3], blocks)
    assert torch.equal(last_logits([2, 3, 8], 32), expected)


# --- one copy of the weights ---


@pytest.fixture
def watched(monkeypatch) -> list[weakref.ref]:
    """References to every layer's tensors that are read."""
    seen: list[weakref.ref] = []
    real = loader.read_layer

    def read_layer(*args):
        layer = real(*args)
        alive = sum(ref() is not None for ref in seen)
        assert alive == 0, "another layer is in memory"
        seen.extend(weakref.ref(getattr(layer, name)) for name in ("wq", "w_gate", "attn_norm"))
        return layer

    monkeypatch.setattr(loader, "read_layer", read_layer)
    return seen


@pytest.mark.parametrize("formats", [DecoderFormats(), ALL_INT8], ids=str)
@pytest.mark.parametrize("source", ["float32", "bfloat16", "quantized"])
def test_layers_are_read_once_one_at_a_time_and_not_kept(
    source, formats, watched, write_tiny_checkpoint, write_gguf, tmp_path
):
    if source == "quantized":
        from gguf import GGMLQuantizationType

        path = tmp_path / "tiny.gguf"
        write_gguf(path, GGMLQuantizationType.Q8_0, layers=5)
    else:
        dtype = getattr(torch, source)
        path = write_tiny_checkpoint(tmp_path, dtype=dtype, num_hidden_layers=5)
    progress = []
    model = load_model(
        str(path),
        dtype="bfloat16",
        layers_at_use=True,
        on_tensor=lambda done, total: progress.append((done, total)),
    )
    assert watched == []
    decoder = make_decoder(model.config, model.weights, formats, threads=1)
    backend = NativeBackend(model.config, decoder, num_blocks=2)
    gc.collect()
    assert len(watched) == 5 * 3
    assert [ref() for ref in watched] == [None] * 15
    total = progress[-1][1]
    assert progress == [(done, total) for done in range(1, total + 1)]
    ends = weakref.ref(model.weights.embedding)
    span = SequenceInput([1, 2, 3], 0, [1], Phase.PREFILL, output_offsets=[2])
    expected = backend.forward(ForwardBatch([span])).candidates.logits
    del model
    gc.collect()
    assert ends() is None
    assert torch.equal(backend.forward(ForwardBatch([span])).candidates.logits, expected)


def test_a_damaged_layer_is_told_when_it_is_packed(write_tiny_checkpoint, tmp_path):
    folder = write_tiny_checkpoint(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, folder / "model.safetensors")
    model = load_model(str(folder), layers_at_use=True)
    with pytest.raises(CorruptCheckpoint, match=name):
        make_decoder(model.config, model.weights, threads=1)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.layers.1.mlp.down_proj.weight", "layer 1: down holds values that are not finite"),
        ("model.layers.0.self_attn.q_proj.weight", "layer 0: q holds"),
        ("model.embed_tokens.weight", "embedding holds"),
        ("model.norm.weight", "norm holds"),
    ],
)
def test_weights_that_are_not_finite_are_a_damaged_checkpoint(
    write_tiny_checkpoint, tmp_path, name, told
):
    folder = write_tiny_checkpoint(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    model = load_model(str(folder), layers_at_use=True)
    for formats in (DecoderFormats(), ALL_INT8):
        with pytest.raises(CorruptCheckpoint, match=told):
            make_decoder(model.config, model.weights, formats, threads=1)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.layers.1.mlp.down_proj.weight", "layer 1: down has weights of"),
        ("lm_head.weight", "lm_head has weights of"),
    ],
)
def test_weights_too_large_for_a_scale_are_named(write_tiny_checkpoint, tmp_path, name, told):
    folder = write_tiny_checkpoint(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 5] = 2.0**27
    save_file(tensors, folder / "model.safetensors")
    model = load_model(str(folder), layers_at_use=True)
    make_decoder(model.config, model.weights, threads=1)
    with pytest.raises(UnsupportedModel, match=f"cannot be quantized: {told} .* to 1.34218e\\+08"):
        make_decoder(model.config, model.weights, ALL_INT8, threads=1)


def test_a_value_that_bfloat16_cannot_hold_is_told(write_tiny_checkpoint, tmp_path):
    folder = write_tiny_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 3.4e38  # a float32, rounded to infinity
    save_file(tensors, folder / "model.safetensors")
    model = load_model(str(folder), dtype="bfloat16", layers_at_use=True)
    with pytest.raises(CorruptCheckpoint, match="lm_head holds"):
        make_decoder(model.config, model.weights, threads=1)


def test_many_sequences_of_which_one_chooses_are_computed_in_parts(tiny_bfloat16, make_backend):
    """Rows as each has them alone; the parts' neurons add up, those of dense parts too."""
    backend, alone = (make_backend(tiny_bfloat16, kind="cpu", num_blocks=40) for _ in range(2))
    config = backend.config
    members = torch.zeros(config.num_layers, config.intermediate_size, dtype=torch.bool)
    members[:, ::3] = True
    core = NeuronChoice(core_words(members))
    sequences = [
        SequenceInput(
            random_tokens(1 + i % 2, i), 0, [i], Phase.DECODE, core if i == 5 else ALL_NEURONS, (0,)
        )
        for i in range(20)
    ]
    output = backend.forward(ForwardBatch(sequences))
    for i, sequence in enumerate(sequences):
        own = alone.forward(ForwardBatch([sequence])).candidates
        assert torch.equal(output.candidates.logits[i], own.logits[0])
        assert torch.equal(output.candidates.full_logits(i), own.full_logits(0))
    assert [reads is not None for reads in output.reads] == [i == 5 for i in range(20)]
    assert output.union is not None
    assert output.union.tokens == 2
    assert (output.union.counts == 2 * config.intermediate_size).all()


def test_torch_has_one_thread_beside_those_of_the_forward_but_all_in_the_reference(
    backend, tiny_bfloat16, make_backend
):
    reference = make_backend(tiny_bfloat16, threads=2)
    torch.set_num_threads(2)
    NativeBackend(backend.config, backend._decoder, num_blocks=1)
    assert torch.get_num_threads() == 1
    reference.forward(ForwardBatch([SequenceInput([1], 0, [0], Phase.PREFILL)]))
    assert torch.get_num_threads() == 2
