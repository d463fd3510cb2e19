"""Where layers live: the plan, and that the logits do not depend on it."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from sparserve.errors import ConfigError, CorruptCheckpoint
from sparserve.model import placement
from sparserve.model.backend import ForwardBatch, Phase, SequenceInput
from sparserve.model.loader import load_model
from sparserve.model.placement import Placement, plan
from sparserve.model.safetensors_checkpoint import SafetensorsCheckpoint

LAYERS = 6
# float32 of the tiny shapes: matrices and two norms
LAYER_BYTES = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * 64)
HEAD_BYTES = 4 * (2 * 259 * 64 + 64)
CPU, DISK = torch.device("cpu"), None


@pytest.fixture(scope="module")
def folder(write_tiny_checkpoint, tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("deep"), num_hidden_layers=LAYERS)


def auto(layers_in_memory: float) -> Placement:
    """Room for so many layers, beside embedding and LM head. One more must fit, that a layer from
    disk can be read into."""
    return Placement("auto", HEAD_BYTES + int((layers_in_memory + 1) * LAYER_BYTES))


@pytest.fixture
def machine(monkeypatch):
    """`machine(cpu=…, gpus=[…])`: what accelerate finds free, in bytes."""

    def set_up(cpu: int, gpus: list[int]) -> None:
        free = {**dict(enumerate(gpus)), "cpu": cpu}
        monkeypatch.setattr(placement, "get_max_memory", lambda: free)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))

    return set_up


def planned(folder: Path, wanted: Placement) -> tuple[str, list[str]]:
    devices = plan(wanted, SafetensorsCheckpoint(folder).config, torch.float32)
    return str(devices.execution), ["disk" if d is None else str(d) for d in devices.layers]


def test_by_default_all_is_in_main_memory(folder):
    assert planned(folder, Placement()) == ("cpu", ["cpu"] * LAYERS)


def test_what_does_not_fit_main_memory_stays_on_disk(folder, machine):
    machine(cpu=2**40, gpus=[])
    assert planned(folder, Placement("auto")) == ("cpu", ["cpu"] * LAYERS)
    assert planned(folder, auto(2)) == ("cpu", ["cpu"] * 2 + ["disk"] * 4)
    assert planned(folder, auto(0)) == ("cpu", ["disk"] * LAYERS)


def test_gpus_come_first_then_main_memory_then_disk(folder, machine):
    share = placement.GPU_SHARE
    first = int((HEAD_BYTES + 2.5 * LAYER_BYTES) / share)  # one layer, room for one that moves in
    second = int(2.5 * LAYER_BYTES / share)
    machine(cpu=int(2.5 * LAYER_BYTES), gpus=[first, second])
    expected = ["cuda:0"] + ["cuda:1"] * 2 + ["cpu"] + ["disk"] * 2
    assert planned(folder, Placement("auto")) == ("cuda:0", expected)


def test_the_limit_holds_for_each_device(folder, machine):
    machine(cpu=2**40, gpus=[2**40])
    execution, layers = planned(folder, auto(1))
    assert (execution, layers[0]) == ("cuda:0", "cuda:0")
    assert set(layers) == {"cuda:0", "cpu", "disk"}


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        (Placement("auto", 1000), "embedding and LM head need .* GiB more on cpu.*max-memory-gib"),
        (Placement("cpu", 1000), "max_memory_gib has no effect with device_map 'cpu'; .* auto"),
        (Placement("gpu"), "device_map is 'gpu'"),
        (Placement("meta"), "device_map is 'meta'; expected cpu, auto or a CUDA device"),
        (Placement(""), "device_map is ''"),
    ],
    ids=str,
)
def test_what_cannot_be_is_told(folder, machine, wanted, named):
    machine(cpu=2**40, gpus=[])
    with pytest.raises(ConfigError, match=named):
        load_model(str(folder), placement=wanted)


def logits(make_backend, all_logits, model) -> torch.Tensor:
    backend, tokens = make_backend(model), list(range(100, 180))
    rows = []
    for start, stop, phase in ((0, 70, Phase.PREFILL), (70, 80, Phase.DECODE)):
        offsets = tuple(range(stop - start))
        part = SequenceInput(tokens[start:stop], start, range(5), phase, output_offsets=offsets)
        rows.append(all_logits(backend.forward(ForwardBatch([part]))))
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_on_disk_give_the_same_bits_and_no_memory_stays_with_them(
    folder, dtype, make_backend, all_logits
):
    """bfloat16 is converted from the file's float32, so a layer that was kept would be memory."""
    whole = load_model(str(folder), dtype=dtype)
    scale = 1 if dtype == "float32" else 2
    limited = Placement("auto", auto(2).max_memory // scale)
    model = load_model(str(folder), dtype=dtype, placement=limited)
    assert torch.equal(
        logits(make_backend, all_logits, model), logits(make_backend, all_logits, whole)
    )
    alive = [weakref.ref(layer.wq) for layer in model.weights.layers]
    gc.collect()
    kept = [ref() is not None for ref in alive]
    assert kept[0]
    assert not any(kept[2:])


def test_a_damaged_layer_on_disk_is_told_at_load(write_tiny_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_tiny_checkpoint(tmp_path, num_hidden_layers=LAYERS)
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.{LAYERS - 1}.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, folder / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=name):
        load_model(str(folder), placement=auto(1))


def test_quantized_layers_can_stay_on_disk(write_gguf, tmp_path, make_backend, all_logits):
    from gguf import GGMLQuantizationType

    path = tmp_path / "tiny.gguf"
    write_gguf(path, GGMLQuantizationType.Q8_0, layers=LAYERS)
    whole, limited = load_model(str(path)), load_model(str(path), placement=auto(2))
    assert torch.equal(
        logits(make_backend, all_logits, limited), logits(make_backend, all_logits, whole)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", [Placement("cuda"), auto(1)], ids=["all", "one layer"])
def test_a_gpu_gives_the_logits_of_main_memory(folder, wanted, make_backend, all_logits):
    model = load_model(str(folder), placement=wanted)
    assert model.weights.embedding.is_cuda
    assert all(layer.wq.is_cuda for layer in model.weights.layers)
    expected = logits(make_backend, all_logits, load_model(str(folder)))
    actual = logits(make_backend, all_logits, model)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
