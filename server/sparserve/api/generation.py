"""From a request message to what the engine takes, with what every protocol owes on the way."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

from sparserve.api import requests
from sparserve.api.requests import check_model
from sparserve.engine.async_engine import AsyncEngine
from sparserve.engine.request import GenerationRequest
from sparserve.errors import RequestError
from sparserve.logs import current_call
from sparserve.v1 import inference_pb2 as pb


async def parse_generation(
    message: pb.GenerateRequest | pb.ChatRequest,
    context: Any,
    engine: AsyncEngine,
    model_name: str,
) -> GenerationRequest:
    """For `engine.submit`, with its constraint compiled; noted in the call's log line.

    Raises what `requests.parse_request` does, UnknownModel, and QueueFull or Unavailable before the work of
    tokenizing.
    """
    arrival = time.monotonic()
    call = current_call()
    call.request_id, call.user = message.request_id, message.user
    engine.check_room()
    own = engine.engine
    try:
        check_model(message.model, model_name)
        seconds_left = context.time_remaining()
        generation, constraint = await asyncio.to_thread(
            lambda: (
                requests.parse_request(
                    message,
                    own.tokenizer,
                    own.limits.max_context - 1,
                    own.policies,
                    seconds_left,
                    arrival,
                ),
                requests.constraint_of(message),
            )
        )
        if constraint is not None:
            compiled = await engine.compile(constraint)
            generation = replace(generation, constraint=compiled)
    except RequestError:
        own.metrics.requests_rejected.labels(reason="invalid").inc()
        raise
    call.request_id = generation.request_id
    call.prompt_tokens = len(generation.prompt_token_ids)
    return generation
