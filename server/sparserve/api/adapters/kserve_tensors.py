"""Tensors of KServe's protocol: which there are, and both ways in which their elements travel."""

from __future__ import annotations

import reprlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import cast

from sparserve.api.status import shortened
from sparserve.errors import InvalidRequest
from sparserve.protocols import kserve_pb2 as pb

Element = bytes | bool | int | float


class DataType(Enum):
    BYTES = "BYTES"
    BOOL = "BOOL"
    UINT32 = "UINT32"
    FP32 = "FP32"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    name: str
    datatype: DataType
    size: int = 1  # -1: one element for each choice
    optional: bool = True  # of inputs


INPUTS = (
    TensorSpec("text_input", DataType.BYTES, optional=False),
    TensorSpec("stream", DataType.BOOL),
    TensorSpec("sampling_parameters", DataType.BYTES),
    TensorSpec("exclude_input_in_output", DataType.BOOL),
    TensorSpec("return_finish_reason", DataType.BOOL),
    TensorSpec("return_cumulative_logprob", DataType.BOOL),
    TensorSpec("return_num_input_tokens", DataType.BOOL),
    TensorSpec("return_num_output_tokens", DataType.BOOL),
)
OUTPUTS = (
    TensorSpec("text_output", DataType.BYTES, -1),
    TensorSpec("finish_reason", DataType.BYTES, -1),
    TensorSpec("cumulative_logprob", DataType.FP32, -1),
    TensorSpec("num_input_tokens", DataType.UINT32),
    TensorSpec("num_output_tokens", DataType.UINT32, -1),
)
_INPUTS_BY_NAME = {spec.name: spec for spec in INPUTS}
_CONTENTS = {
    DataType.BYTES: "bytes_contents",
    DataType.BOOL: "bool_contents",
    DataType.UINT32: "uint_contents",
    DataType.FP32: "fp32_contents",
}
_NUMBERS = {DataType.UINT32: "I", DataType.FP32: "f"}  # as struct packs them
_LENGTH = struct.Struct("<I")  # before each element of raw BYTES


def read_inputs(request: pb.ModelInferRequest) -> dict[str, Element]:
    """The one element of each input by its name. Raises InvalidRequest."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            "raw_input_contents",
            f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs; there must be one for each, or none",
        )
    found: dict[str, Element] = {}
    for index, tensor in enumerate(request.inputs):
        spec = _spec_of(tensor, found)
        if not raw:
            found[spec.name] = _listed_element(spec, tensor)
        elif tensor.HasField("contents"):
            raise _wrong(spec, "has contents beside raw_input_contents; send one of them")
        else:
            found[spec.name] = _raw_element(spec, raw[index])
    for spec in INPUTS:
        if not (spec.optional or spec.name in found):
            raise _wrong(spec, f"is missing; it is {spec.datatype.value} of shape [1]")
    return found


def add_output(
    response: pb.ModelInferResponse, spec: TensorSpec, values: Sequence[Element], raw: bool
) -> None:
    """A tensor with `values`; all of a response have the same `raw`."""
    output = response.outputs.add(name=spec.name, datatype=spec.datatype.value, shape=[len(values)])
    if raw:
        response.raw_output_contents.append(_packed(spec.datatype, values))
    else:
        getattr(output.contents, _CONTENTS[spec.datatype]).extend(values)


def _spec_of(
    tensor: pb.ModelInferRequest.InferInputTensor, found: dict[str, Element]
) -> TensorSpec:
    spec = _INPUTS_BY_NAME.get(tensor.name)
    if spec is None:
        known = ", ".join(_INPUTS_BY_NAME)
        raise InvalidRequest(
            "inputs", f"input {reprlib.repr(tensor.name)} is unknown; there are {known}"
        )
    if spec.name in found:
        raise _wrong(spec, "is given twice")
    if tensor.datatype != spec.datatype.value:
        given = reprlib.repr(tensor.datatype)
        raise _wrong(spec, f"has data type {given}; it must be {spec.datatype.value}")
    if list(tensor.shape) != [1]:
        raise _wrong(spec, f"has shape {reprlib.repr(list(tensor.shape))}; it must be [1]")
    if tensor.parameters:
        given = ", ".join(sorted(tensor.parameters))
        raise _wrong(
            spec, f"has parameters ({shortened(given)}), which are not served; send its elements"
        )
    return spec


def _listed_element(spec: TensorSpec, tensor: pb.ModelInferRequest.InferInputTensor) -> Element:
    name = _CONTENTS[spec.datatype]
    filled = [field.name for field, _ in tensor.contents.ListFields()]
    elements = getattr(tensor.contents, name)
    if filled not in ([], [name]) or len(elements) != 1:
        given = ", ".join(f"{len(getattr(tensor.contents, f))} {f}" for f in filled) or "nothing"
        raise _wrong(spec, f"has {given}; it must have 1 {name}")
    element: Element = elements[0]
    return element


def _raw_element(spec: TensorSpec, raw: bytes) -> Element:
    if spec.datatype is DataType.BOOL:
        if raw not in (b"\0", b"\1"):
            raise _wrong(spec, f"has raw contents {reprlib.repr(raw)}; it must be one byte, 0 or 1")
        return raw == b"\1"
    if len(raw) < _LENGTH.size:
        raise _wrong(spec, f"has {len(raw)} raw bytes; there must be 4 with its length before it")
    (length,) = _LENGTH.unpack_from(raw)
    if length != len(raw) - _LENGTH.size:
        raise _wrong(
            spec,
            f"says that it has {length} bytes, and {len(raw) - _LENGTH.size} follow; it must be one element",
        )
    return raw[_LENGTH.size :]


def _packed(datatype: DataType, values: Sequence[Element]) -> bytes:
    if datatype is DataType.BYTES:
        elements = cast(Sequence[bytes], values)
        return b"".join(_LENGTH.pack(len(element)) + element for element in elements)
    return struct.pack(f"<{len(values)}{_NUMBERS[datatype]}", *values)


def _wrong(spec: TensorSpec, what: str) -> InvalidRequest:
    return InvalidRequest(f"inputs[{spec.name}]", f"input {spec.name} {what}")
