"""ControlService: what an operator, a balancer or a gateway asks of a server."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

import sparserve
from sparserve.api.requests import check_model
from sparserve.api.responses import POLICY_NUMBERS
from sparserve.api.security.auth import current_caller
from sparserve.api.tokenizer_archive import TokenizerArchive
from sparserve.config import ServerSettings
from sparserve.engine.async_engine import AsyncEngine
from sparserve.engine.policies import Policies
from sparserve.errors import InvalidRequest, NotBuiltYet
from sparserve.model.backend import BLOCK_SIZE
from sparserve.v1 import control_pb2 as pb
from sparserve.v1 import control_pb2_grpc

MAX_ABORT_IDS = 1024
MAX_DRAIN_SECONDS = 86400
_DRAIN_POLL_SECONDS = 0.05
_DRAIN_TELL_SECONDS = 1.0


class ControlService(control_pb2_grpc.ControlServiceServicer):
    def __init__(self, engine: AsyncEngine, model_name: str, settings: ServerSettings) -> None:
        self._engine = engine
        self._model_name = model_name
        self._settings = settings
        self._archive = TokenizerArchive(engine.engine)
        self._drains: set[asyncio.Task[None]] = set()  # the loop itself holds no task alive
        self._start_time = Timestamp()
        self._start_time.GetCurrentTime()

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Any
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[pb.Model(name=self._model_name)])

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Any
    ) -> pb.GetModelInfoResponse:
        check_model(request.model, self._model_name)
        engine = self._engine.engine
        config = engine.backend.config
        return pb.GetModelInfoResponse(
            model=self._model_name,
            architecture=config.architecture,
            num_parameters=config.num_parameters,
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            max_context_length=engine.limits.max_context,
            eos_token_ids=config.eos_token_ids,
            bos_token_id=config.bos_token_id,
            chat_template=engine.tokenizer.chat_template,
            dtype=engine.backend.info.dtype,
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Any
    ) -> pb.GetServerInfoResponse:
        engine, settings = self._engine.engine, self._settings
        info, limits = engine.backend.info, engine.limits
        return pb.GetServerInfoResponse(
            version=sparserve.__version__,
            start_time=self._start_time,
            backend=pb.Backend(
                name=info.name,
                device=info.device,
                dtype=info.dtype,
                threads=info.threads,
                isa=info.isa,
                kv_dtype=info.kv_dtype,
            ),
            limits=pb.Limits(
                max_context_length=limits.max_context,
                max_running_requests=limits.max_running,
                max_waiting_requests=settings.max_waiting,
                max_batched_tokens=limits.max_batched_tokens,
                max_message_bytes=settings.max_message_bytes,
                kv_block_size=BLOCK_SIZE,
                num_kv_blocks=engine.backend.num_blocks,
                default_max_tokens=limits.default_max_tokens,
                max_tokens=limits.max_tokens,
                max_choices=limits.max_choices,
                max_waiting_tokens=settings.max_waiting_tokens,
                max_stream_backlog=settings.max_stream_backlog,
            ),
            policies=[POLICY_NUMBERS[kind] for kind in engine.policies.kinds],
            default_policy=POLICY_NUMBERS[engine.policies.default],
            sparsity=_bounds(engine.policies),
        )

    async def GetLoad(self, request: pb.GetLoadRequest, context: Any) -> pb.GetLoadResponse:
        engine = self._engine.engine
        return pb.GetLoadResponse(
            running_requests=engine.num_running,
            waiting_requests=engine.num_waiting,
            waiting_tokens=engine.waiting_tokens,
            used_kv_blocks=engine.used_blocks,
            num_kv_blocks=engine.backend.num_blocks,
            cached_kv_blocks=engine.cached_blocks,
        )

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        if not 1 <= len(request.request_ids) <= MAX_ABORT_IDS:
            raise InvalidRequest(
                "request_ids",
                f"{len(request.request_ids)} ids given; 1 to {MAX_ABORT_IDS} are allowed",
            )
        caller = current_caller()
        owner = None if caller.control else caller.name
        response = pb.AbortResponse()
        for request_id in dict.fromkeys(request.request_ids):
            aborted = self._engine.abort(request_id, owner)
            (response.aborted if aborted else response.not_found).append(request_id)
        return response

    async def GetTokenizer(
        self, request: pb.GetTokenizerRequest, context: Any
    ) -> AsyncIterator[pb.GetTokenizerResponse]:
        check_model(request.model, self._model_name)
        async for data, sha256 in self._archive.parts():
            yield pb.GetTokenizerResponse(data=data, sha256=sha256)

    async def Drain(
        self, request: pb.DrainRequest, context: Any
    ) -> AsyncIterator[pb.DrainResponse]:
        timeout = self._settings.drain_timeout
        if request.HasField("timeout_seconds"):
            timeout = request.timeout_seconds
        if not 0 <= timeout <= MAX_DRAIN_SECONDS:  # also false for NaN
            raise InvalidRequest(
                "timeout_seconds",
                f"timeout_seconds is {timeout:g}; it must be in [0, {MAX_DRAIN_SECONDS}]",
            )
        # A task of its own: the drain goes on when the client leaves.
        drain = asyncio.create_task(self._engine.drain(timeout))
        self._drains.add(drain)
        drain.add_done_callback(self._drains.discard)
        told, told_at = -1, 0.0
        while True:
            await asyncio.wait({drain}, timeout=_DRAIN_POLL_SECONDS)
            if drain.done():
                break
            left, now = self._engine.in_flight, time.monotonic()
            if left != told or now - told_at >= _DRAIN_TELL_SECONDS:
                yield pb.DrainResponse(requests_in_flight=left)
                told, told_at = left, now
        yield pb.DrainResponse(requests_in_flight=self._engine.in_flight, drained=True)

    async def LoadAdapter(
        self, request: pb.LoadAdapterRequest, context: Any
    ) -> pb.LoadAdapterResponse:
        raise NotBuiltYet("LoadAdapter", "LoRA adapters are not served; merge them into the model")

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: Any
    ) -> pb.UnloadAdapterResponse:
        raise NotBuiltYet("UnloadAdapter", "LoRA adapters are not served")


def _bounds(policies: Policies) -> pb.SparsityBounds:
    most = policies.rules.max_target_kl
    return pb.SparsityBounds(
        min_density=policies.rules.min_density,
        max_target_kl=most if math.isfinite(most) else None,
        has_index=policies.has_index,
    )
