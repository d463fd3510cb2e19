"""Many requests on one stream, answered at once: their responses go out as they come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from sparserve.api.status import status_of
from sparserve.engine.request import MAX_REQUEST_ID_LENGTH
from sparserve.errors import RequestError
from sparserve.logs import CallRecord, current_call, set_current_call
from sparserve.protocols import kserve_pb2 as pb

log = logging.getLogger("sparserve.access")

# Responses that wait for the client to read; beyond them the engine's own backlog fills.
_MAX_UNSENT = 16

Answer = Callable[[pb.ModelInferRequest], AsyncGenerator[pb.ModelInferResponse]]
_Outbox = asyncio.Queue[pb.ModelStreamInferResponse | None]


async def answer_stream(
    requests: AsyncIterator[pb.ModelInferRequest], answer: Answer, most: int
) -> AsyncGenerator[pb.ModelStreamInferResponse]:
    """The responses to all of `requests`; a further request is not read while `most` are being answered.

    What `answer` raises is told in a response. Closing the iterator ends all of them.
    """
    outbox: _Outbox = asyncio.Queue(_MAX_UNSENT)
    reading = asyncio.create_task(_read(requests, answer, most, outbox))
    try:
        while (response := await outbox.get()) is not None:
            yield response
        await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _read(
    requests: AsyncIterator[pb.ModelInferRequest], answer: Answer, most: int, outbox: _Outbox
) -> None:
    room = asyncio.Semaphore(most)
    try:
        async with asyncio.TaskGroup() as group:
            async for request in requests:
                await room.acquire()
                task = group.create_task(_answer(request, answer, outbox))
                task.add_done_callback(lambda _: room.release())
    except asyncio.CancelledError:
        raise  # nobody reads the outbox any more
    except Exception:
        await outbox.put(None)
        raise
    await outbox.put(None)


async def _answer(request: pb.ModelInferRequest, answer: Answer, outbox: _Outbox) -> None:
    call = CallRecord(current_call().span)
    set_current_call(call)
    code = "CANCELLED"
    try:
        async with aclosing(answer(request)) as responses:
            async for response in responses:
                await outbox.put(pb.ModelStreamInferResponse(infer_response=response))
        code = "OK"
    except Exception as error:
        if isinstance(error, RequestError):
            call.blamed_field = error.field
        status, message, _ = status_of(error)
        code = status.name
        failed = pb.ModelInferResponse(id=request.id[:MAX_REQUEST_ID_LENGTH])
        failed.parameters["triton_final_response"].bool_param = True
        await outbox.put(
            pb.ModelStreamInferResponse(error_message=f"{code}: {message}", infer_response=failed)
        )
    finally:
        log.info("request of a stream ended", extra={"code": code, **call.summary()})
