"""`inference.GRPCInferenceService`: KServe's v2 protocol with Triton's extensions.

The model looks like one of Triton's vLLM backend: text_input and friends in, text_output out.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc

from sparserve.api.adapters import OWNER, kserve_model
from sparserve.api.adapters.kserve_requests import InferRequest, blame_parameters, read_request
from sparserve.api.adapters.kserve_responses import Responder
from sparserve.api.adapters.kserve_stream import answer_stream
from sparserve.api.adapters.unserved import Unserved
from sparserve.api.generation import parse_generation
from sparserve.api.requests import check_model
from sparserve.config import ServerSettings
from sparserve.engine.async_engine import AsyncEngine, EngineState
from sparserve.engine.stream import RequestStream
from sparserve.errors import InvalidRequest, RequestError
from sparserve.protocols import kserve_pb2 as pb
from sparserve.protocols import kserve_pb2_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]


def add(
    server: grpc.aio.Server,
    engine: AsyncEngine,
    model_name: str,
    settings: ServerSettings,
    is_ready: Callable[[], bool],
) -> Sequence[str]:
    """See `registry.AddAdapter`."""
    service = InferenceService(engine, model_name, is_ready)
    kserve_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    server.add_generic_rpc_handlers((Unserved(SERVICE),))
    return (SERVICE.full_name,)


class InferenceService(kserve_pb2_grpc.GRPCInferenceServiceServicer):
    """Messages to engine calls. Errors are raised and become a status in the interceptor; those of a
    request on a stream are told on it, and the stream goes on.
    """

    def __init__(self, engine: AsyncEngine, model_name: str, is_ready: Callable[[], bool]) -> None:
        self._engine = engine
        self._model_name = model_name
        self._is_ready = is_ready
        self._statistics = kserve_model.Statistics(engine.engine.metrics, model_name)

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Any
    ) -> pb.ServerLiveResponse:
        dead = (EngineState.BROKEN, EngineState.STOPPED)
        return pb.ServerLiveResponse(live=self._engine.state not in dead)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Any
    ) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._is_ready())

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Any
    ) -> pb.ModelReadyResponse:
        self._check_model(request.name, request.version)
        return pb.ModelReadyResponse(ready=self._is_ready())

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Any
    ) -> pb.ServerMetadataResponse:
        return kserve_model.server_metadata()

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Any
    ) -> pb.ModelMetadataResponse:
        self._check_model(request.name, request.version)
        return kserve_model.model_metadata(self._model_name)

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Any
    ) -> pb.ModelConfigResponse:
        self._check_model(request.name, request.version)
        return pb.ModelConfigResponse(config=kserve_model.model_config(self._model_name))

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: Any
    ) -> pb.ModelStatisticsResponse:
        self._check_model(request.name, request.version)
        return pb.ModelStatisticsResponse(model_stats=[self._statistics.message()])

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Any
    ) -> pb.ModelInferResponse:
        infer = self._read(request)
        if infer.stream:
            raise InvalidRequest(
                "inputs[stream]",
                "stream is true, and ModelInfer answers once; use ModelStreamInfer, or leave stream out",
            )
        responder, updates = await self._submit(infer, context)
        with updates:
            return await responder.whole(updates)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Any
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        most = self._engine.engine.limits.max_running + self._engine.max_waiting

        def answer(request: pb.ModelInferRequest) -> AsyncGenerator[pb.ModelInferResponse]:
            return self._responses(request, context)

        async with aclosing(answer_stream(requests, answer, most)) as answers:
            async for response in answers:
                yield response

    async def _responses(
        self, request: pb.ModelInferRequest, context: Any
    ) -> AsyncGenerator[pb.ModelInferResponse]:
        """All to one request of a stream."""
        infer = self._read(request)
        responder, updates = await self._submit(infer, context)
        with updates:
            async for response in responder.stream(updates):
                yield response

    def _read(self, request: pb.ModelInferRequest) -> InferRequest:
        try:
            self._check_model(request.model_name, request.model_version)
            return read_request(request)
        except RequestError:
            self._engine.engine.metrics.requests_rejected.labels(reason="invalid").inc()
            raise

    async def _submit(self, infer: InferRequest, context: Any) -> tuple[Responder, RequestStream]:
        try:
            generation = await parse_generation(
                infer.message, infer.deadline(context), self._engine, self._model_name
            )
            updates = self._engine.submit(replace(generation, owner=OWNER))
        except InvalidRequest as error:
            raise blame_parameters(error) from error
        self._statistics.begin()
        return Responder(infer, self._model_name, len(generation.prompt_token_ids)), updates

    def _check_model(self, name: str, version: str) -> None:
        check_model(name, self._model_name)
        kserve_model.check_version(version)
