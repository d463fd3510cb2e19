"""Layers and ends of a compressed model as the named tensors of safetensors files, and back.

A bfloat16 matrix is one tensor, `up`. A quantized one is `up.codes`, `up.scales` and `up.zeros`, with a
low-rank term also `up.factors.codes` and `up.factors.scales`. Codes of 4 bits are two to a byte: columns
2 j in the lower half, 2 j + 1 in the upper one. Bases, norms and biases have the names of LayerTensors.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from sparse_kernels.formats import DecoderFormats, LayerFormats, MatrixFormat
from sparse_kernels.weights import EndTensors, Factors, LayerTensors, Matrix, QuantizedMatrix
from sparserve.errors import CorruptCheckpoint
from sparserve.model.config import ModelConfig
from sparserve.model.stacks import STACKS
from sparserve.model.weights import layer_shapes

# Fields of LayerTensors -> those of LayerWeights.
MATRICES = {
    name: field for own in STACKS for name, field in zip(own.names, own.fields, strict=True)
}
# Names of tensors up to the first dot -> fields of LayerFormats.
PART_OF = {name: own.part for own in STACKS for name in (*own.names, own.basis)}
VECTORS = {
    "attention_norm": "attn_norm", "mlp_norm": "mlp_norm", "q_bias": "bq", "k_bias": "bk", "v_bias": "bv",
    "output_bias": "bo", "down_bias": "bd", "q_norm": "q_norm", "k_norm": "k_norm",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Spec:
    """What a tensor must be. Floating-point ones must be finite, scales not negative."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    below: int = 256  # of integers

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def layer_specs(config: ModelConfig, index: int, formats: LayerFormats) -> dict[str, Spec]:
    """Of all tensors in the file of layer `index`."""
    shapes = layer_shapes(config, index)
    specs: dict[str, Spec] = {}
    for name, (shape, format) in _matrices(config, index, formats).items():
        specs |= _matrix_specs(name, shape, format)
    for name, shape in formats.basis_shapes(config.hidden_size, shapes["wo"][1]).items():
        specs[name] = Spec(shape, torch.bfloat16)
    for name, field in VECTORS.items():
        if field in shapes:
            specs[name] = Spec(shapes[field], torch.float32)
    return specs


def end_specs(config: ModelConfig, formats: DecoderFormats) -> dict[str, Spec]:
    """Of all tensors in the file of embedding, norm and LM head."""
    vocab = (config.vocab_size, config.hidden_size)
    specs = {
        "embedding": Spec(vocab, torch.bfloat16),
        "norm": Spec((config.hidden_size,), torch.float32),
    }
    return specs | (
        _matrix_specs("lm_head", vocab, formats.lm_head) if _has_head(config, formats) else {}
    )


def part_bytes(config: ModelConfig, index: int, formats: LayerFormats) -> dict[str, int]:
    """Of the matrices of layer `index` with all that belongs to them, by field of LayerFormats."""
    found = dict.fromkeys(("attention", "gate_up", "down"), 0)
    for name, spec in layer_specs(config, index, formats).items():
        if name not in VECTORS:
            found[PART_OF[name.partition(".")[0]]] += spec.nbytes
    return found


def layer_weights(config: ModelConfig) -> int:
    """Elements of the matrices of all layers."""
    return sum(
        math.prod(shapes[field])
        for shapes in map(partial(layer_shapes, config), range(config.num_layers))
        for field in MATRICES.values()
    )


def bits_per_weight(config: ModelConfig, formats: DecoderFormats) -> tuple[float, float]:
    """(of the layers' matrices with all that belongs to them, of the whole model); the latter's weights
    are those of the original, where a tied LM head counts once."""
    in_matrices = files = 0
    for index in range(config.num_layers):
        plan = formats.layer(index)
        in_matrices += sum(part_bytes(config, index, plan).values())
        files += sum(spec.nbytes for spec in layer_specs(config, index, plan).values())
    weights = layer_weights(config)
    files += sum(spec.nbytes for spec in end_specs(config, formats).values())
    return 8 * in_matrices / weights, 8 * files / config.num_parameters


def tensors_of_layer(layer: LayerTensors) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for field in fields(layer):
        value = getattr(layer, field.name)
        if value is not None:
            tensors |= _tensors_of_matrix(field.name, value)
    return tensors


def tensors_of_ends(ends: EndTensors) -> dict[str, torch.Tensor]:
    head = {} if ends.lm_head is None else _tensors_of_matrix("lm_head", ends.lm_head)
    return {"embedding": ends.embedding, "norm": ends.norm, **head}


def layer_of(
    tensors: Mapping[str, torch.Tensor], config: ModelConfig, index: int, formats: LayerFormats
) -> LayerTensors:
    """`tensors`: what `fault` found nothing in."""
    matrices = {
        name: _matrix_of(tensors, name, shape[1], format)
        for name, (shape, format) in _matrices(config, index, formats).items()
    }
    others = {name: t for name, t in tensors.items() if name in VECTORS or name.endswith("_basis")}
    return LayerTensors(**matrices, **others)  # type: ignore[arg-type]


def ends_of(
    tensors: Mapping[str, torch.Tensor], config: ModelConfig, formats: DecoderFormats
) -> EndTensors:
    """`tensors`: what `fault` found nothing in."""
    head = None
    if _has_head(config, formats):
        head = _matrix_of(tensors, "lm_head", config.hidden_size, formats.lm_head)
    return EndTensors(tensors["embedding"], tensors["norm"], head)


def read_tensors(path: Path, specs: Mapping[str, Spec]) -> dict[str, torch.Tensor]:
    """Those of the file at `path`, memory-mapped and checked. Raises CorruptCheckpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            wrong = _wrong_names(names, specs)
            tensors = {} if wrong else {name: file.get_tensor(name) for name in sorted(names)}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read as safetensors: {error}") from error
    if wrong := wrong or fault(tensors, specs):
        raise CorruptCheckpoint(f"{path} is damaged: {wrong}")
    return tensors


def fault(tensors: Mapping[str, torch.Tensor], specs: Mapping[str, Spec]) -> str | None:
    """What is first found wrong with `tensors`, if anything."""
    if wrong := _wrong_names(set(tensors), specs):
        return wrong
    faults = (_fault(name, tensors[name], spec) for name, spec in specs.items())
    return next((found for found in faults if found is not None), None)


def _wrong_names(names: set[str], specs: Mapping[str, Spec]) -> str | None:
    if missing := sorted(specs.keys() - names):
        return f"tensor {missing[0]} is missing"
    if extra := sorted(names - specs.keys()):
        return f"nothing reads its tensors {reprlib.repr(extra)}"
    return None


def _fault(name: str, tensor: torch.Tensor, spec: Spec) -> str | None:
    if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
        return f"tensor {name} is {tensor.dtype} {list(tensor.shape)}; expected {spec.dtype} {list(spec.shape)}"
    # NaN if one is, and ten times as fast as isfinite.
    least, largest = (float(end) for end in tensor.aminmax())
    if not spec.dtype.is_floating_point and largest >= spec.below:
        return f"tensor {name} has {largest:g}, at most {spec.below - 1} can be"
    if not (math.isfinite(least) and math.isfinite(largest)):
        return f"tensor {name} has values that are not finite"
    if name.endswith(".scales") and least < 0:
        return f"tensor {name} has negative scales"
    return None


def _has_head(config: ModelConfig, formats: DecoderFormats) -> bool:
    return formats.lm_head.quantized or not config.tie_word_embeddings


def _matrices(
    config: ModelConfig, index: int, formats: LayerFormats
) -> dict[str, tuple[tuple[int, int], MatrixFormat]]:
    """By field of LayerTensors, as they are stored."""
    shapes, stored = layer_shapes(config, index), {}
    for name, field in MATRICES.items():
        format: MatrixFormat = getattr(formats, PART_OF[name])
        rows, columns = shapes[field]
        stored[name] = (
            ((columns, rows) if name == "down" and format.quantized else (rows, columns)),
            format,
        )
    return stored


def _matrix_specs(name: str, shape: tuple[int, int], format: MatrixFormat) -> dict[str, Spec]:
    if not format.quantized:
        return {name: Spec(shape, torch.bfloat16)}
    rows, columns = shape
    groups = (rows, format.groups(columns))
    specs = {
        f"{name}.codes": Spec((rows, -(-columns * format.bits // 8)), torch.uint8),
        f"{name}.scales": Spec(groups, torch.float16),
        f"{name}.zeros": Spec(groups, torch.uint8, 1 << format.bits),
    }
    if format.rank:
        specs[f"{name}.factors.codes"] = Spec((rows, format.rank), torch.uint8)
        specs[f"{name}.factors.scales"] = Spec((rows,), torch.float16)
    return specs


def _tensors_of_matrix(name: str, matrix: Matrix) -> dict[str, torch.Tensor]:
    if not isinstance(matrix, QuantizedMatrix):
        return {name: matrix}
    codes = matrix.codes if matrix.bits == 8 else _in_pairs(matrix.codes)
    tensors = {
        f"{name}.codes": codes,
        f"{name}.scales": matrix.scales,
        f"{name}.zeros": matrix.zeros,
    }
    if matrix.factors is not None:
        tensors[f"{name}.factors.codes"] = matrix.factors.codes
        tensors[f"{name}.factors.scales"] = matrix.factors.scales
    return tensors


def _matrix_of(
    tensors: Mapping[str, torch.Tensor], name: str, columns: int, format: MatrixFormat
) -> Matrix:
    if not format.quantized:
        return tensors[name]
    codes = tensors[f"{name}.codes"]
    factors = None
    if format.rank:
        factors = Factors(tensors[f"{name}.factors.codes"], tensors[f"{name}.factors.scales"])
    return QuantizedMatrix(
        codes if format.bits == 8 else _apart(codes, columns),
        tensors[f"{name}.scales"],
        tensors[f"{name}.zeros"],
        format.bits,
        format.group_size,
        factors,
    )


def _in_pairs(codes: torch.Tensor) -> torch.Tensor:
    """[rows, columns] -> [rows, half of them rounded up]. Raises ValueError of a code beyond 4 bits."""
    if (largest := int(codes.max())) > 15:  # it would run into its neighbour
        raise ValueError(f"a code is {largest}, and 4 bits hold 15")
    padded = F.pad(codes, (0, codes.shape[1] % 2))
    return padded[:, ::2] | padded[:, 1::2] << 4


def _apart(pairs: torch.Tensor, columns: int) -> torch.Tensor:
    """What `_in_pairs` was given."""
    both = pairs.to(torch.int16)  # of which the lower byte comes first
    both = (both << 4).bitwise_or_(both).bitwise_and_(0x0F0F)
    return both.view(torch.uint8)[:, :columns]
