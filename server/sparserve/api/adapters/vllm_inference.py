"""`vllm.Inference` and `vllm.Control`: vLLM's own gRPC interface, which vllm-router speaks."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

import sparserve
from sparserve.api.adapters import OWNER
from sparserve.api.adapters.unserved import Unserved
from sparserve.api.adapters.vllm_inference_requests import own_request, renamed
from sparserve.api.adapters.vllm_inference_responses import Responder
from sparserve.api.control import MAX_ABORT_IDS
from sparserve.api.generation import parse_generation
from sparserve.config import ServerSettings
from sparserve.engine.async_engine import AsyncEngine
from sparserve.engine.stream import RequestStream
from sparserve.errors import InvalidRequest, PromptTooLong, RequestError
from sparserve.model.backend import BLOCK_SIZE
from sparserve.protocols import vllm_control_pb2 as control_pb
from sparserve.protocols import vllm_control_pb2_grpc, vllm_inference_pb2_grpc
from sparserve.protocols import vllm_inference_pb2 as pb
from sparserve.v1 import inference_pb2 as own_pb

INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"]
CONTROL = control_pb.DESCRIPTOR.services_by_name["Control"]


def add(
    server: grpc.aio.Server,
    engine: AsyncEngine,
    model_name: str,
    settings: ServerSettings,
    is_ready: Callable[[], bool],
) -> Sequence[str]:
    """See `registry.AddAdapter`."""
    names = ModelNames(model_name, settings.model)
    vllm_inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(engine, names), server)
    vllm_control_pb2_grpc.add_ControlServicer_to_server(ControlService(engine, names), server)
    server.add_generic_rpc_handlers((Unserved(INFERENCE), Unserved(CONTROL)))
    return INFERENCE.full_name, CONTROL.full_name


class ModelNames:
    """What requests may call the model: vllm-router takes its tokenizer from the folder, or the Hugging Face
    repository, that a request names as its model.
    """

    def __init__(self, served: str, source: str) -> None:
        """`source` is the server's setting `model`."""
        path = Path(source)
        self.served = served
        self.source = str(path.resolve()) if path.exists() else source
        self.aliases = sorted({self.source, source} - {served})

    def own(self, name: str) -> str:
        """The name by which the server knows the model that a request calls `name`."""
        return self.served if name in self.aliases else name


class InferenceService(vllm_inference_pb2_grpc.InferenceServicer):
    """Messages to engine calls; every error is raised and becomes a status in the interceptor."""

    def __init__(self, engine: AsyncEngine, names: ModelNames) -> None:
        self._engine = engine
        self._names = names

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        if request.sampling.num_sequences > 1:
            raise InvalidRequest(
                "sampling.num_sequences",
                f"sampling.num_sequences is {request.sampling.num_sequences}, and Generate answers with "
                "one sequence; use GenerateStream",
            )
        responder, updates = await self._submit(request, context)
        with updates:
            return await responder.whole(updates)

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        responder, updates = await self._submit(request, context)
        with updates:
            async for update in updates:
                yield await responder.response(update)

    async def _submit(
        self, request: pb.GenerateRequest, context: Any
    ) -> tuple[Responder, RequestStream]:
        own = await self._translated(request)
        try:
            generation = await parse_generation(own, context, self._engine, self._names.served)
            updates = self._engine.submit(replace(generation, owner=OWNER))
        except (InvalidRequest, PromptTooLong) as error:
            raise renamed(error) from error
        return Responder(request.response, generation.prompt_token_ids), updates

    async def _translated(self, request: pb.GenerateRequest) -> own_pb.GenerateRequest:
        engine = self._engine.engine
        self._engine.check_room()  # before the work of tokenizing
        try:
            own = await own_request(request, engine.tokenizer)
        except RequestError:
            engine.metrics.requests_rejected.labels(reason="invalid").inc()
            raise
        own.model = self._names.own(own.model)
        return own


class ControlService(vllm_control_pb2_grpc.ControlServicer):
    def __init__(self, engine: AsyncEngine, names: ModelNames) -> None:
        self._engine = engine
        self._names = names
        self._instance_id = uuid.uuid4().hex

    async def GetServerInfo(
        self, request: control_pb.GetServerInfoRequest, context: Any
    ) -> control_pb.ServerInfo:
        engine = self._engine.engine
        return control_pb.ServerInfo(
            engine_version=f"sparserve {sparserve.__version__}",
            api_version=pb.DESCRIPTOR.package,
            instance_id=self._instance_id,
            parallelism=control_pb.ParallelismInfo(
                tensor_parallel_size=1,
                pipeline_parallel_size=1,
                data_parallel_size=1,
                decode_context_parallel_size=1,
                world_size=1,
            ),
            max_model_len=engine.limits.max_context,
            kv_block_size=BLOCK_SIZE,
            total_kv_blocks=engine.backend.num_blocks,
            max_running_requests=engine.limits.max_running,
            max_batched_tokens=engine.limits.max_batched_tokens,
        )

    async def GetModelInfo(
        self, request: control_pb.GetModelInfoRequest, context: Any
    ) -> control_pb.ModelInfo:
        return control_pb.ModelInfo(
            model_id=self._names.source,
            served_model_name=self._names.served,
            served_model_aliases=self._names.aliases,
            supports_text_input=True,
            supports_token_ids_input=True,
        )

    async def Abort(
        self, request: control_pb.AbortRequest, context: Any
    ) -> control_pb.AbortResponse:
        if len(request.request_ids) > MAX_ABORT_IDS:
            raise InvalidRequest(
                "request_ids",
                f"{len(request.request_ids)} ids given, the limit is {MAX_ABORT_IDS}",
            )
        for request_id in request.request_ids:
            self._engine.abort(request_id, OWNER)
        return control_pb.AbortResponse()
