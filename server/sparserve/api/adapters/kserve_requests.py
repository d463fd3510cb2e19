"""A request of KServe's protocol to our own: every tensor and parameter is taken, or refused by its name."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

from sparserve.api.adapters.kserve_parameters import set_parameters
from sparserve.api.adapters.kserve_tensors import OUTPUTS, Element, read_inputs
from sparserve.engine.request import MAX_REQUEST_ID_LENGTH
from sparserve.errors import InvalidRequest
from sparserve.protocols import kserve_pb2 as pb
from sparserve.v1 import inference_pb2 as own_pb

_OUTPUT_NAMES = tuple(spec.name for spec in OUTPUTS)
_EMPTY_FINAL = "triton_enable_empty_final_response"
_TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class InferRequest:
    message: own_pb.GenerateRequest
    id: str
    text: str
    stream: bool
    prepends_input: bool
    outputs: tuple[str, ...]  # in their order in OUTPUTS
    raw: bool
    wants_empty_final: bool
    timeout: float | None  # seconds

    def deadline(self, context: Any) -> Deadline:
        """The earlier of the call's and the request's own."""
        left = context.time_remaining()
        times = [seconds for seconds in (left, self.timeout) if seconds is not None]
        return Deadline(min(times, default=None))


@dataclass(frozen=True, slots=True)
class Deadline:
    seconds: float | None

    def time_remaining(self) -> float | None:
        return self.seconds


def read_request(request: pb.ModelInferRequest) -> InferRequest:
    """Raises InvalidRequest."""
    if len(request.id) > MAX_REQUEST_ID_LENGTH:  # every response repeats it
        raise InvalidRequest(
            "id", f"id has {len(request.id)} characters, the limit is {MAX_REQUEST_ID_LENGTH}"
        )
    inputs = read_inputs(request)
    timeout, wants_empty_final = _request_parameters(request)
    stream = bool(inputs.get("stream", False))
    text = _text("text_input", inputs["text_input"])
    message = own_pb.GenerateRequest(model=request.model_name, text=text)
    set_parameters(message, _text("sampling_parameters", inputs.get("sampling_parameters", b"{}")))
    outputs = _outputs(request, inputs)
    if "cumulative_logprob" in outputs:
        message.response.logprobs = True
    return InferRequest(
        message=message,
        id=request.id,
        text=text,
        stream=stream,
        prepends_input=_prepends_input(inputs, stream),
        outputs=outputs,
        raw=bool(request.raw_input_contents),
        wants_empty_final=wants_empty_final,
        timeout=timeout,
    )


def blame_parameters(error: InvalidRequest) -> InvalidRequest:
    """The same error with the tensor that held the field."""
    group, _, rest = error.field.partition(".")
    if group in ("sampling", "stopping", "sparsity", "constraint"):
        return InvalidRequest(
            f"inputs[sampling_parameters].{rest}", f"input sampling_parameters: {error}"
        )
    return error


def _text(name: str, element: Element) -> str:
    assert isinstance(element, bytes)
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"inputs[{name}]", f"input {name} is not UTF-8: {error.reason}"
        ) from error


def _prepends_input(inputs: dict[str, Element], stream: bool) -> bool:
    """As Triton's vLLM backend: by default a whole answer begins with the prompt, a stream does not."""
    prepends = not inputs.get("exclude_input_in_output", stream)
    if prepends and stream:
        raise InvalidRequest(
            "inputs[exclude_input_in_output]",
            "input exclude_input_in_output is false, and stream is true; a stream never repeats the input",
        )
    return prepends


def _outputs(request: pb.ModelInferRequest, inputs: dict[str, Element]) -> tuple[str, ...]:
    asked = {name for name in _OUTPUT_NAMES if inputs.get(f"return_{name}")}
    if request.outputs:
        asked = {_output_name(output) for output in request.outputs}
    else:
        asked.add("text_output")
    return tuple(name for name in _OUTPUT_NAMES if name in asked)


def _output_name(output: pb.ModelInferRequest.InferRequestedOutputTensor) -> str:
    if output.name not in _OUTPUT_NAMES:
        raise InvalidRequest(
            "outputs",
            f"output {reprlib.repr(output.name)} is unknown; there are {', '.join(_OUTPUT_NAMES)}",
        )
    if output.parameters:
        given = reprlib.repr(sorted(output.parameters))
        raise InvalidRequest(
            f"outputs[{output.name}]",
            f"output {output.name} has parameters {given}; none are served",
        )
    return output.name


def _request_parameters(request: pb.ModelInferRequest) -> tuple[float | None, bool]:
    """-> (timeout in seconds, whether an empty final response is wanted)."""
    timeout, empty_final = None, False
    for name, value in request.parameters.items():
        kind = value.WhichOneof("parameter_choice")
        if name == _EMPTY_FINAL and kind == "bool_param":
            empty_final = value.bool_param
        elif (
            name == _TIMEOUT
            and kind in ("int64_param", "uint64_param")
            and getattr(value, kind) > 0
        ):
            timeout = getattr(value, kind) / 1e6
        else:
            raise InvalidRequest(
                "parameters",
                f"parameter {reprlib.repr(name)} with {kind or 'nothing'} is not served; there are "
                f"{_TIMEOUT} (int64_param, microseconds, over 0) and {_EMPTY_FINAL} (bool_param)",
            )
    return timeout, empty_final
