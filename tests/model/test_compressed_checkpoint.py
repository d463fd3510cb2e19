"""Folders of compressed models: what is written is what is read and served, and damage is told."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_kernels.choice import ChoiceKind
from sparse_kernels.formats import BFLOAT16, DecoderFormats, LayerFormats, MatrixFormat
from sparse_kernels.weights import QuantizedMatrix
from sparserve import __version__
from sparserve.errors import CorruptCheckpoint, UnsupportedModel
from sparserve.model.backend import ForwardBatch, Phase, SequenceInput
from sparserve.model.identity import hash_of_files
from sparserve.model.loader import load_model
from sparserve.model.native import NativeBackend
from sparserve.model.packing import make_decoder
from sparserve.model.placement import Placement
from sparserve.model.weights import layer_shapes

INT8, INT4 = MatrixFormat(8, 64), MatrixFormat(4, 32)
LOW_RANK = MatrixFormat(4, 64, rank=32)
FORMATS = {
    "int8": DecoderFormats(INT8, INT8, INT8, INT8),
    "int4": DecoderFormats(INT4, INT4, INT4),
    "int4, head int4": DecoderFormats(INT4, INT4, INT4, INT4, activation_bits=8),
    "rank 32": DecoderFormats(LOW_RANK, LOW_RANK, MatrixFormat(8, 128, rank=32), INT8),
    "rank 32 of down": DecoderFormats(gate_up=INT4, down=LOW_RANK),
    "planes": DecoderFormats(INT8, MatrixFormat(4, 64, low_bits=1, rank=32), INT8, INT8),
    "by layer": DecoderFormats(
        INT4, INT4, INT4, INT8, overrides=((1, LayerFormats(INT8, LOW_RANK, BFLOAT16)),)
    ),
}
FAMILIES = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32, "tie_word_embeddings": True},
    "odd widths": {"hidden_size": 33, "head_dim": 16},
}


def equal(one, other) -> bool:
    """Of tensors, and of what consists of them."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other) or not hasattr(one, "__dataclass_fields__"):
        return bool(one == other)
    return all(equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))


@pytest.fixture(scope="module")
def source(write_tiny_checkpoint, tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("source"), dtype=torch.bfloat16)


@pytest.fixture
def folder(source, write_compressed, tmp_path) -> Path:
    """With all that a folder may have: codes of 4 and 8 bits, low-rank terms, an LM head."""
    write_compressed(source, FORMATS["rank 32"], tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
def test_what_is_read_is_what_was_written(
    write_tiny_checkpoint, write_compressed, tmp_path, family, formats
):
    original = write_tiny_checkpoint(tmp_path / "in", dtype=torch.bfloat16, **FAMILIES[family])
    made = write_compressed(original, formats, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    seen = []
    model = load_model(
        str(tmp_path / "out"), layers_at_use=True, on_tensor=lambda *step: seen.append(step)
    )
    found = model.compressed
    assert len(found.layers) == len(made.layers) == 2
    assert all(equal(one, other) for one, other in zip(found.layers, made.layers, strict=True))
    assert equal(found.layers[-1], found.layers[1])
    assert equal(found.ends, made.ends)
    assert found.info == made.info
    assert seen == [(1, 3), (2, 3), (3, 3)]
    before = load_model(str(original), layers_at_use=True)
    assert (model.config, model.chat_template) == (before.config, before.chat_template)
    assert model.tokenizer.to_str() == before.tokenizer.to_str()
    assert model.name == "out"


@pytest.mark.parametrize("biases", [("down",), ("output", "down"), ("output",)], ids=str)
def test_biases_that_the_source_does_not_have_come_back(source, write_compressed, tmp_path, biases):
    made = write_compressed(source, FORMATS["rank 32"], tmp_path / "out", biases=biases)
    model = load_model(str(tmp_path / "out"), layers_at_use=True)
    assert (made.info.format_version, model.compressed.info) == (2, made.info)
    before = load_model(str(source)).config
    assert not before.output_bias
    assert not before.down_bias
    added = {f"{name}_bias": True for name in biases}
    assert model.config == replace(before, **added)
    assert model.config.num_parameters == before.num_parameters + 2 * 64 * len(biases)
    for one, other in zip(model.compressed.layers, made.layers, strict=True):
        assert equal(one, other)
        assert all(getattr(one, name).any() for name in added)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format_version": 1}, "added_biases, which came with format version 2, and this is 1"),
        ({"added_biases": ["down", "down"]}, "one of them twice"),
        ({"added_biases": ["gate"]}, "added_biases.0: "),
        ({"added_biases": "down"}, "added_biases: "),
        ({"added_biases": []}, r"nothing reads its tensors \['down_bias'\]"),
        ({"added_biases": ["down", "output"]}, "tensor output_bias is missing"),
    ],
)
def test_added_biases_that_cannot_be_are_told(source, write_compressed, tmp_path, changes, told):
    write_compressed(source, FORMATS["int8"], tmp_path / "out", biases=("down",))
    change_info(tmp_path / "out", **changes)
    with pytest.raises(CorruptCheckpoint, match=told):
        load_model(str(tmp_path / "out"))


def test_a_bias_is_not_added_to_a_source_that_has_one(
    write_tiny_checkpoint, write_compressed, tmp_path
):
    original = write_tiny_checkpoint(tmp_path / "in", dtype=torch.bfloat16, attention_bias=True)
    write_compressed(original, FORMATS["int8"], tmp_path / "out")
    change_info(tmp_path / "out", format_version=2, added_biases=["output"])
    with pytest.raises(CorruptCheckpoint, match=r"names output, and config\.json says .* has one"):
        load_model(str(tmp_path / "out"))


@pytest.mark.parametrize("family", ["untied", "tied", "qwen2", "qwen3", "added biases"])
@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
def test_what_is_served_is_what_was_compressed(
    write_tiny_checkpoint, write_compressed, make_backend, all_logits, tmp_path, family, formats
):
    """The same bits as from the tensors in memory; nearly those of the reference backend in float32."""
    biases = ("output", "down") if family == "added biases" else ()
    changes = FAMILIES.get(family, {})
    original = write_tiny_checkpoint(tmp_path / "in", dtype=torch.bfloat16, **changes)
    made = write_compressed(original, formats, tmp_path / "out", biases=biases)
    model = load_model(str(tmp_path / "out"), dtype="bfloat16", layers_at_use=True)
    decoders = [
        make_decoder(model.config, model.weights, formats, threads=1, compressed=own)
        for own in (model.compressed, made)
    ]
    tokens = torch.randint(0, 259, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    prompt = SequenceInput(tokens, 0, range(2), Phase.PREFILL, output_offsets=range(20))
    step = SequenceInput([7], 20, range(2), Phase.DECODE, output_offsets=[0])

    def run(backend):
        return torch.cat([all_logits(backend.forward(ForwardBatch([s]))) for s in (prompt, step)])

    read, in_memory = (run(NativeBackend(model.config, own, num_blocks=2)) for own in decoders)
    assert torch.equal(read, in_memory)
    reference = run(make_backend(load_model(str(tmp_path / "out"), dtype="float32")))
    tolerance = 0.25 if formats.activation_bits == 8 else 0.03
    torch.testing.assert_close(read, reference, rtol=0, atol=tolerance * float(reference.std()))


def test_weights_in_floating_point_are_integers_and_low_rank_terms(
    source, write_compressed, tmp_path
):
    """Worked out element by element; each data type rounds the same numbers."""
    made = write_compressed(source, FORMATS["rank 32"], tmp_path / "out")
    exact, rounded = (
        load_model(str(tmp_path / "out"), dtype=dtype).weights for dtype in ("float32", "auto")
    )
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    layer, stored = exact.layers[1], made.layers[1]

    def element(
        matrix: QuantizedMatrix, row: int, column: int, basis: torch.Tensor | None
    ) -> float:
        group = column // matrix.group_size
        code, zero = int(matrix.codes[row, column]), int(matrix.zeros[row, group])
        value = float(matrix.scales[row, group]) * (code - zero)
        if basis is None:
            return value
        b = float(matrix.factors.scales[row]) * (matrix.factors.codes[row].double() - 136)
        return value + float(b @ basis[:, column].double())

    expected = {
        ("wk", 3, 60): element(stored.k, 3, 60, stored.qkv_basis),
        ("wo", 63, 5): element(stored.output, 63, 5, stored.output_basis),
        ("w_up", 95, 0): element(stored.up, 95, 0, stored.gate_up_basis),
        ("w_down", 2, 95): element(stored.down, 95, 2, stored.down_basis),
    }
    for (name, row, column), value in expected.items():
        assert getattr(layer, name)[row, column] == pytest.approx(value, rel=1e-5, abs=1e-7)
    head = element(made.ends.lm_head, 258, 63, None)
    assert float(exact.lm_head[258, 63]) == head
    for name in layer_shapes(load_model(str(source)).config, 0):
        one, other = getattr(layer, name), getattr(rounded.layers[1], name)
        assert other.is_contiguous()
        assert torch.equal(one.to(other.dtype), other)
    assert torch.equal(exact.lm_head.bfloat16(), rounded.lm_head)


def test_bits_are_those_of_the_files(folder):
    info = json.loads((folder / "compression.json").read_text())
    files = [*folder.glob("layers/*.safetensors"), folder / "ends.safetensors"]
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    config = load_model(str(folder), layers_at_use=True).config
    assert info["bits_per_weight"] == pytest.approx(8 * sum(sizes) / config.num_parameters)
    in_layers = 8 * (sum(sizes[:-1]) / 2 - 2 * 4 * 64)  # without two norms in float32
    weights = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96
    assert info["bits_per_decoder_weight"] == pytest.approx(in_layers / weights)


def test_layers_of_their_own_count_as_they_are(source, write_compressed, tmp_path):
    made = write_compressed(source, FORMATS["by layer"], tmp_path / "out")
    files = sorted((tmp_path / "out/layers").glob("*.safetensors"))
    sizes = [sum(t.nbytes for t in load_file(file).values()) - 2 * 4 * 64 for file in files]
    assert sizes[1] > 1.5 * sizes[0]
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert made.info.bits_per_decoder_weight == pytest.approx(8 * sum(sizes) / weights)


def change_tensor(path: Path, name: str, change) -> None:
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, path)


def with_value(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


def test_bytes_of_a_step_include_low_rank_terms(source, write_compressed, make_backend, tmp_path):
    planes = MatrixFormat(4, 64, low_bits=1, rank=32)
    formats = DecoderFormats(LOW_RANK, planes, LOW_RANK, INT8)
    write_compressed(source, formats, tmp_path / "out")
    model = load_model(str(tmp_path / "out"), dtype="bfloat16", layers_at_use=True)
    decoder = make_decoder(
        model.config, model.weights, formats, threads=1, compressed=model.compressed
    )
    info = NativeBackend(model.config, decoder, num_blocks=1).info
    row = 64 // 2 + 3 + 32 + 3  # codes, scale and zero, of the factors too
    attention, mlp, bases = 192 * row, 288 * row, 4 * 32 * 64 * 2
    head, vectors = 259 * (64 + 3), 5 * 64 * 4
    assert info.mlp_bytes == 2 * mlp
    assert info.weight_bytes == 2 * (attention + mlp + bases) + head + vectors
    low = (64 + 2 * 32) / 8  # a bit of each code
    expected = (2 * (row - low), row, 2 * low, 0)
    assert info.neuron_bytes[ChoiceKind.PLANES] == expected


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("file", "name", "change", "told"),
    [
        ("layers/00001", "up.codes", lambda t: None, "up.codes is missing"),
        ("layers/00001", "q.factors.scales", lambda t: None, "q.factors.scales is missing"),
        ("ends", "lm_head.zeros", lambda t: None, "lm_head.zeros is missing"),
        ("ends", "embedding", lambda t: None, "embedding is missing"),
        ("layers/00001", "gate.codes", lambda t: t[:-1], r"gate.codes is torch.uint8 \[95, 32\]; expected torch.uint8 \[96, 32\]"),
        ("layers/00001", "gate.codes", lambda t: torch.cat((t, t)), r"gate.codes is torch.uint8 \[192, 32\]"),
        ("layers/00001", "q.scales", lambda t: t.float(), "q.scales is torch.float32 .* expected torch.float16"),
        ("layers/00001", "down_basis", lambda t: t[:16], r"down_basis is .* \[16, 64\]; expected .* \[32, 64\]"),
        ("layers/00001", "mlp_norm", with_value(NAN), "mlp_norm has values that are not finite"),
        ("layers/00001", "qkv_basis", with_value(INF), "qkv_basis has values that are not finite"),
        ("layers/00001", "k.scales", with_value(NAN), "k.scales has values that are not finite"),
        ("layers/00001", "k.scales", with_value(-1), "k.scales has negative scales"),
        ("layers/00001", "up.factors.scales", with_value(-1), "up.factors.scales has negative"),
        ("layers/00001", "v.zeros", with_value(16), "v.zeros has 16, at most 15 can be"),
        ("ends", "embedding", with_value(NAN), "embedding has values that are not finite"),
        ("ends", "norm", with_value(INF), "norm has values that are not finite"),
        ("ends", "lm_head.scales", with_value(INF), "lm_head.scales has values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "changed",
)  # fmt: skip
def test_damaged_tensors_are_told(folder, file, name, change, told):
    path = folder / f"{file}.safetensors"
    change_tensor(path, name, change)
    with pytest.raises(CorruptCheckpoint, match=rf"{path} is damaged: tensor {told}"):
        list(load_model(str(folder), layers_at_use=True).compressed.layers)
    with pytest.raises(CorruptCheckpoint, match=told):  # all layers are read at first
        load_model(str(folder))


def test_a_tensor_that_nothing_reads_is_told(folder):
    path = folder / "layers/00000.safetensors"
    save_file({**load_file(path), "q_bias": torch.zeros(64)}, path)
    with pytest.raises(CorruptCheckpoint, match=r"nothing reads its tensors \['q_bias'\]"):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["layers/00001.safetensors", "ends.safetensors"])
@pytest.mark.parametrize("left", [0, 6, 100, -1])
def test_truncated_files_are_told(folder, name, left):
    path = folder / name
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CorruptCheckpoint, match=f"{path} cannot be read as safetensors"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "layers/00001.safetensors").unlink(), "files of 1 layers, and config.json asks for 2"),
        (lambda f: (f / "layers/00001.safetensors").rename(f / "layers/00002.safetensors"), "00001.safetensors is missing"),
        (lambda f: (f / "layers/00002.safetensors").write_bytes(b""), "files of 3 layers"),
        (lambda f: (f / "ends.safetensors").unlink(), "ends.safetensors is missing"),
    ],
)  # fmt: skip
def test_missing_and_further_files_are_told(folder, damage, told):
    damage(folder)
    with pytest.raises(CorruptCheckpoint, match=told):
        load_model(str(folder), layers_at_use=True)


def change_info(folder: Path, **changes: object) -> None:
    path = folder / "compression.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format_version": None}, "format_version is None, expected 1"),
        ({"format_version": "1"}, "format_version is '1', expected 1"),
        ({"format_version": True}, "format_version is True"),
        ({"recipe": [1]}, "recipe: "),
        ({"source": {"name": "x", "path": "y"}}, "source.hash: Field required"),
        ({"texts": ["a", 1]}, "texts.1: "),
        ({"formats": {"gate_up": {"bits": 5}}}, r"formats.gate_up: .* bits of a matrix .* is 5"),
        ({"formats": {"gate_up": {"bits": 4.5}}}, "formats.gate_up.bits: "),
        ({"formats": {"down": {"bits": 4, "group_size": 64, "rank": 33}}}, "formats.down: .* rank is 33"),
        ({"formats": {"activation_bits": 4}}, "formats: .* activation_bits is 4"),
        ({"formats": None}, "formats: Field required"),
        ({"formats": {"overrides": [[2, {"down": {"bits": 4, "group_size": 64}}]]}}, "formats are given for layer 2; the last one is 1"),
        ({"formats": {"overrides": [["1", {}]]}}, "formats.overrides.0.0: "),
        ({"formats": {"overrides": [[1, {}]]}}, "formats: .* overrides of layer 1 change nothing"),
    ],
)  # fmt: skip
def test_damaged_info_is_told(folder, changes, told):
    change_info(folder, **changes)
    with pytest.raises(CorruptCheckpoint, match=rf"compression.json: {told}"):
        load_model(str(folder))


def test_info_without_overrides_has_none(folder):
    """As it was written before layers could differ."""
    formats = json.loads((folder / "compression.json").read_text())["formats"]
    del formats["overrides"]
    change_info(folder, formats=formats)
    assert load_model(str(folder), layers_at_use=True).compressed.formats == FORMATS["rank 32"]


def test_other_formats_than_the_files_have_are_told(folder):
    change_info(folder, formats={"gate_up": {"bits": 8, "group_size": 64}})
    with pytest.raises(CorruptCheckpoint, match=r"ends\.safetensors is damaged"):
        load_model(str(folder))


@pytest.mark.parametrize("text", ["{", "[]", "\udcff", ""])
def test_info_that_is_no_object_is_told(folder, text):
    (folder / "compression.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CorruptCheckpoint, match=r"compression\.json"):
        load_model(str(folder))


def test_a_newer_version_is_unsupported(folder):
    change_info(folder, format_version=3, sparserve_version="9.1", formats="not those of today")
    told = f"has format version 3, made by sparserve '9.1'; sparserve {__version__} reads version 2"
    with pytest.raises(UnsupportedModel, match=told):
        load_model(str(folder))


def test_the_hash_of_a_folder_covers_every_file(folder):
    hashes = {hash_of_files(folder)}
    change_tensor(folder / "layers/00001.safetensors", "mlp_norm", with_value(0.5))
    hashes.add(hash_of_files(folder))
    change_tensor(folder / "ends.safetensors", "norm", with_value(0.5))
    hashes.add(hash_of_files(folder))
    change_info(folder, texts=[])
    hashes.add(hash_of_files(folder))
    (folder / "layers/00001.safetensors").rename(folder / "layers/00003.safetensors")
    hashes.add(hash_of_files(folder))
    assert len(hashes) == 5


def test_layers_are_not_kept(folder):
    layers = load_model(str(folder), layers_at_use=True).compressed.layers
    change_tensor(folder / "layers/00001.safetensors", "mlp_norm", with_value(0.5))
    assert float(layers[1].mlp_norm[3]) == 0.5
    assert [float(layer.mlp_norm[3]) for layer in layers[1:]] == [0.5]
    with pytest.raises(IndexError):
        layers[2]


def test_layers_that_do_not_fit_stay_on_disk(folder):
    whole = load_model(str(folder))
    outside, layer = 4 * (2 * 259 * 64 + 64), 4 * (12288 + 18432 + 128)
    room = Placement("auto", outside + layer * 3 // 2)
    limited = load_model(str(folder), dtype="float32", placement=room)
    change_tensor(folder / "layers/00001.safetensors", "mlp_norm", with_value(0.5))
    assert torch.equal(limited.weights.layers[0].wq.bfloat16(), whole.weights.layers[0].wq)
    assert float(limited.weights.layers[1].mlp_norm[3]) == 0.5
    assert float(whole.weights.layers[1].mlp_norm[3]) != 0.5
