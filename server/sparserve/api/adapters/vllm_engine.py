"""`vllm.grpc.engine.VllmEngine` on our engine: the protocol that the gateway smg speaks to its workers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import grpc

import sparserve
from sparserve.api.adapters import OWNER
from sparserve.api.adapters.vllm_kv_events import kv_event_batches
from sparserve.api.adapters.vllm_requests import own_request, renamed
from sparserve.api.adapters.vllm_responses import VllmResponder
from sparserve.api.adapters.vllm_stubs import common_pb2, vllm_engine_pb2_grpc
from sparserve.api.adapters.vllm_stubs import vllm_engine_pb2 as pb
from sparserve.api.control import MAX_ABORT_IDS
from sparserve.api.generation import parse_generation
from sparserve.api.tokenizer_archive import TokenizerArchive
from sparserve.config import ServerSettings
from sparserve.engine.async_engine import AsyncEngine, EngineState
from sparserve.engine.stream import RequestStream
from sparserve.errors import InvalidRequest, NotBuiltYet, PromptTooLong, RequestError
from sparserve.model.backend import BLOCK_SIZE
from sparserve.v1 import inference_pb2 as own_pb

MAX_FLUSH_SECONDS = 3600


def add(
    server: grpc.aio.Server,
    engine: AsyncEngine,
    model_name: str,
    settings: ServerSettings,
    is_ready: Callable[[], bool],
) -> Sequence[str]:
    """See `registry.AddAdapter`."""
    service = VllmEngineService(engine, model_name, is_ready)
    vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(service, server)
    return [pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name]


class VllmEngineService(vllm_engine_pb2_grpc.VllmEngineServicer):  # type: ignore[misc]
    """Messages to engine calls; every error is raised and becomes a status in the interceptor."""

    def __init__(self, engine: AsyncEngine, model_name: str, is_ready: Callable[[], bool]) -> None:
        self._engine = engine
        self._model_name = model_name
        self._is_ready = is_ready
        self._archive = TokenizerArchive(engine.engine)
        self._rate = _Rate(engine)
        self._started = time.monotonic()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        responder, updates = await self._submit(request, context)
        with updates:
            async for response in responder.answers(updates):
                yield response

    async def _submit(self, request: Any, context: Any) -> tuple[VllmResponder, RequestStream]:
        own = self._translated(request)
        try:
            generation = await parse_generation(own, context, self._engine, self._model_name)
            updates = self._engine.submit(replace(generation, owner=OWNER))
        except (InvalidRequest, PromptTooLong) as error:
            raise renamed(error) from error
        return VllmResponder(generation, stream=request.stream), updates

    def _translated(self, request: Any) -> own_pb.GenerateRequest:
        engine = self._engine.engine
        try:
            return own_request(request, engine.limits.max_context - 1)
        except RequestError:
            engine.metrics.requests_rejected.labels(reason="invalid").inc()
            raise

    async def Abort(self, request: Any, context: Any) -> Any:
        """Of ids that are not in flight it says nothing: their requests may just have ended."""
        if len(request.request_ids) > MAX_ABORT_IDS:
            raise InvalidRequest(
                "request_ids",
                f"{len(request.request_ids)} ids given, the limit is {MAX_ABORT_IDS}",
            )
        for request_id in request.request_ids:
            self._engine.abort(request_id, OWNER)
        return pb.AbortResponse()

    async def HealthCheck(self, request: Any, context: Any) -> Any:
        if self._is_ready():
            return pb.HealthCheckResponse(healthy=True)
        state = self._engine.state
        told = "ending" if state is EngineState.READY else state.value
        return pb.HealthCheckResponse(healthy=False, message=f"the server is {told}")

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        """Without a tokenizer path: a gateway may be on another machine, and GetTokenizer has the files."""
        engine = self._engine.engine
        config, limits = engine.backend.config, engine.limits
        return pb.GetModelInfoResponse(
            model_path=self._model_name,
            served_model_name=self._model_name,
            is_generation=True,
            max_context_length=limits.max_context,
            max_req_input_len=limits.max_context - 1,
            vocab_size=config.vocab_size,
            model_type=config.architecture.removesuffix("ForCausalLM").lower(),
            architectures=[config.architecture],
            eos_token_ids=config.eos_token_ids,
            bos_token_id=config.bos_token_id,
        )

    async def GetServerInfo(self, request: Any, context: Any) -> Any:
        engine = self._engine.engine
        info = engine.backend.info
        return pb.GetServerInfoResponse(
            active_requests=self._engine.in_flight,
            is_paused=not self._is_ready(),
            uptime_seconds=time.monotonic() - self._started,
            server_type="sparserve",
            data_parallel_size=1,
            kv_cache_dtype=info.kv_dtype,
            block_size=BLOCK_SIZE,
            model_dtype=info.dtype,
            max_num_seqs=engine.limits.max_running,
            constrained_decoding_start="first_token",
        )

    async def GetLoads(self, request: Any, context: Any) -> Any:
        engine = self._engine.engine
        running, waiting = engine.num_running, engine.num_waiting
        used, blocks = engine.used_blocks, engine.backend.num_blocks
        load = pb.SchedulerLoad(
            num_running_reqs=running,
            num_waiting_reqs=waiting,
            num_total_reqs=running + waiting,
            num_used_tokens=used * BLOCK_SIZE,
            max_total_num_tokens=blocks * BLOCK_SIZE,
            token_usage=used / blocks,
            gen_throughput=self._rate.tokens_per_second(),
            utilization=running / engine.limits.max_running,
            max_running_requests=engine.limits.max_running,
            num_waiting_uncached_tokens=engine.waiting_tokens,
        )
        return pb.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            version=sparserve.__version__,
            dp_rank_count=1,
            loads=[load],
        )

    async def GetTokenizer(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for data, sha256 in self._archive.parts():
            yield common_pb2.GetTokenizerChunk(data=data, sha256=sha256)

    async def SubscribeKvEvents(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """No history is kept: a subscriber that lost its stream begins again with what is cached."""
        if request.start_sequence_number:
            await context.abort(
                grpc.StatusCode.OUT_OF_RANGE,
                f"start_sequence_number is {request.start_sequence_number}; batches of before are not kept, "
                "begin with 0: the first batch then is what is cached",
            )
        with self._engine.watch_cache() as watch:
            async for batch in kv_event_batches(watch):
                yield batch

    async def FlushCache(self, request: Any, context: Any) -> Any:
        timeout = request.timeout_s
        if not 0 <= timeout <= MAX_FLUSH_SECONDS:  # also false for NaN
            raise InvalidRequest(
                "timeout_s", f"timeout_s is {timeout:g}; it must be in [0, {MAX_FLUSH_SECONDS}]"
            )
        flushed = await self._engine.flush_cache(timeout)
        message = "" if flushed else f"{self._engine.in_flight} requests are in flight"
        return common_pb2.FlushCacheResponse(success=flushed, message=message)

    async def Embed(self, request: Any, context: Any) -> Any:
        raise NotBuiltYet("Embed", "this server generates text only; it makes no embeddings")

    async def StartProfile(self, request: Any, context: Any) -> Any:
        raise NotBuiltYet("StartProfile", "there is no profiler here; see /metrics")

    async def StopProfile(self, request: Any, context: Any) -> Any:
        raise NotBuiltYet("StopProfile", "there is no profiler here; see /metrics")


class _Rate:
    """Tokens generated per second, between two calls that are a second apart at least."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._counter = engine.engine.metrics.generation_tokens
        self._at, self._count, self._rate = time.monotonic(), 0.0, 0.0

    def tokens_per_second(self) -> float:
        now = time.monotonic()
        if now - self._at >= 1:
            count = sum(s.value for m in self._counter.collect() for s in m.samples)
            self._rate = (count - self._count) / (now - self._at)
            self._at, self._count = now, count
        return self._rate
