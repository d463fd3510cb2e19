"""What the model looks like to a client of KServe's protocol: tensors, configuration, statistics."""

from __future__ import annotations

import time

import sparserve
from sparserve.api.adapters.kserve_tensors import INPUTS, OUTPUTS, DataType
from sparserve.errors import InvalidRequest
from sparserve.metrics import PREFIX, Metrics
from sparserve.protocols import kserve_pb2 as pb

VERSION = "1"
PLATFORM = "sparserve"
_DATA_TYPES = {
    DataType.BYTES: pb.TYPE_STRING,
    DataType.BOOL: pb.TYPE_BOOL,
    DataType.UINT32: pb.TYPE_UINT32,
    DataType.FP32: pb.TYPE_FP32,
}
_GOOD_REASONS = ("stop_eos", "stop_token", "stop_string", "length", "context")
_BAD_REASONS = ("cancelled", "deadline", "invalid", "error")


def check_version(version: str) -> None:
    """Raises InvalidRequest."""
    if version not in ("", VERSION):
        raise InvalidRequest(
            "model_version",
            f"version {version!r} is not served here; leave it out, or use {VERSION!r}",
        )


def server_metadata() -> pb.ServerMetadataResponse:
    return pb.ServerMetadataResponse(
        name=PLATFORM,
        version=sparserve.__version__,
        extensions=["model_configuration", "statistics"],
    )


def model_metadata(model_name: str) -> pb.ModelMetadataResponse:
    message = pb.ModelMetadataResponse(name=model_name, versions=[VERSION], platform=PLATFORM)
    for tensors, specs in ((message.inputs, INPUTS), (message.outputs, OUTPUTS)):
        for spec in specs:
            tensors.add(name=spec.name, datatype=spec.datatype.value, shape=[spec.size])
    return message


def model_config(model_name: str) -> pb.ModelConfig:
    config = pb.ModelConfig(
        name=model_name,
        platform=PLATFORM,
        backend=PLATFORM,
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
    )
    for spec in INPUTS:
        data_type = _DATA_TYPES[spec.datatype]
        config.input.add(
            name=spec.name, data_type=data_type, dims=[spec.size], optional=spec.optional
        )
    for spec in OUTPUTS:
        config.output.add(name=spec.name, data_type=_DATA_TYPES[spec.datatype], dims=[spec.size])
    return config


class Statistics:
    """The server's own metrics in Triton's terms: of all requests, whatever protocol they came by.

    Counts are of choices, except queue's and last_inference's, which are of requests.
    """

    def __init__(self, metrics: Metrics, model_name: str) -> None:
        self._registry = metrics.registry
        self._model_name = model_name
        self._last_ms = 0

    def begin(self) -> None:
        """A request of this protocol begins now."""
        self._last_ms = time.time_ns() // 1_000_000

    def message(self) -> pb.ModelStatistics:
        good = sum(self._finished(reason) for reason in _GOOD_REASONS)
        bad = sum(self._finished(reason) for reason in _BAD_REASONS)
        latency = self._duration("e2e_request_latency_seconds")
        return pb.ModelStatistics(
            name=self._model_name,
            version=VERSION,
            last_inference=self._last_ms,
            inference_count=good,
            execution_count=self._duration("engine_step_seconds").count,
            inference_stats=pb.InferStatistics(
                # One histogram holds the times of all, so those that failed are among them.
                success=pb.StatisticDuration(count=good, ns=latency.ns),
                fail=pb.StatisticDuration(count=bad),
                queue=self._duration("request_queue_time_seconds"),
                compute_input=self._duration("request_prefill_time_seconds"),
                compute_infer=self._duration("request_decode_time_seconds"),
            ),
        )

    def _finished(self, reason: str) -> int:
        return int(self._sample("requests_finished_total", {"reason": reason}))

    def _duration(self, histogram: str) -> pb.StatisticDuration:
        return pb.StatisticDuration(
            count=int(self._sample(f"{histogram}_count")),
            ns=int(self._sample(f"{histogram}_sum") * 1e9),
        )

    def _sample(self, name: str, labels: dict[str, str] | None = None) -> float:
        value = self._registry.get_sample_value(f"{PREFIX}_{name}", labels)
        assert value is not None, name
        return value
