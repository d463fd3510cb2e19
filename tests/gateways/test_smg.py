"""The openai SDK through the gateway smg to two servers of ours, in this process.

Cache-aware balancing sends a prompt where its beginning is cached, so a test that wants a certain server
computes the beginning there first; a prompt of its own is anybody's.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from sparserve.api.server import Server
from sparserve.client import AsyncClient
from sparserve.config import ServerSettings
from sparserve.engine.async_engine import EngineState
from sparserve.engine.factory import assemble_engine
from sparserve.model.loader import load_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

SETTINGS: dict[str, Any] = {
    "backend": "reference",
    "port": 0,
    "metrics_port": 0,
    "threads": 1,
    "kv_cache_gib": 0.05,
    "max_running": 3,
    "max_waiting": 0,
    "adapters": "vllm",
    "adapters_port": 0,
}
GREEDY = {"temperature": 0.0, "extra_body": {"ignore_eos": True}}
ENDLESS = {**GREEDY, "max_tokens": 12_000}


@dataclass
class Pair:
    """Two servers, and a client of the gateway before them."""

    servers: tuple[Server, Server]
    client: openai.AsyncOpenAI
    model: str

    async def chat(self, text: str, **options: Any) -> Any:
        messages = [{"role": "user", "content": text}]
        return await self.client.chat.completions.create(
            model=self.model, messages=messages, **{**GREEDY, **options}
        )

    @property
    def in_flight(self) -> int:
        return sum(server.engine.in_flight for server in self.servers)

    @property
    def used_blocks(self) -> int:
        return sum(server.engine.engine.used_blocks for server in self.servers)

    def finished(self) -> list[int]:
        """Choices that each server has brought to an end."""
        return [int(_sum(s.engine.engine.metrics.requests_finished)) for s in self.servers]


def _sum(counter: Any, **labels: str) -> float:
    return sum(
        sample.value
        for metric in counter.collect()
        for sample in metric.samples
        if labels.items() <= sample.labels.items()
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(long_folder: Path, start_smg: Any) -> AsyncIterator[Pair]:
    model = load_model(str(long_folder))
    servers = []
    for _ in range(2):
        settings = ServerSettings(**SETTINGS)
        built = assemble_engine(model, settings)
        servers.append(Server(built.engine, built.model_name, settings))
        await servers[-1].start()
    urls = [f"grpc://127.0.0.1:{server.adapters_port}" for server in servers]
    smg = await asyncio.to_thread(start_smg, urls)
    client = openai.AsyncOpenAI(
        base_url=f"{smg.base_url}/v1", api_key="none", max_retries=0, timeout=60
    )
    async with client:
        yield Pair((servers[0], servers[1]), client, model.name)
    for server in servers:
        await server.drain_and_stop()


async def known_to(server: AsyncClient, title: str) -> str:
    """A long text that a server has in its cache, and has told so."""
    words = f"{title}: " + "".join(chr(97 + (7 * i) % 26) for i in range(600))
    await server.chat([{"role": "user", "content": words}], max_tokens=1)
    await asyncio.sleep(0.3)
    return words


@pytest_asyncio.fixture(loop_scope="module")
async def direct(pair: Pair) -> AsyncIterator[list[AsyncClient]]:
    """Clients of our own API, past the gateway."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(AsyncClient(f"127.0.0.1:{server.port}"))
            for server in pair.servers
        ]


async def test_a_chat_has_the_text_that_our_own_api_gives(pair, direct):
    answer = await pair.chat("What is a neuron?", max_tokens=16)
    own = await direct[0].chat(
        [{"role": "user", "content": "What is a neuron?"}],
        max_tokens=16, temperature=0.0, ignore_eos=True,
    )  # fmt: skip
    assert answer.choices[0].message.content == own.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == pair.model
    assert answer.usage.completion_tokens == 16
    assert answer.usage.prompt_tokens == own.result.prompt_tokens
    assert [model.id async for model in pair.client.models.list()] == [pair.model]


async def test_a_stream_has_the_same_text_piece_by_piece_and_the_usage(pair):
    whole = await pair.chat("Stream to me", max_tokens=80)
    pieces = [
        piece
        async for piece in await pair.chat(
            "Stream to me", max_tokens=80, stream=True, stream_options={"include_usage": True}
        )
    ]
    texts = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert sum(1 for text in texts if text) > 3
    assert pieces[-1].usage.completion_tokens == 80
    assert pieces[-2].choices[0].finish_reason == "length"


async def test_two_choices_differ_and_come_again_with_their_seed(pair):
    drawn = [
        await pair.chat("Two of you", n=2, seed=11, temperature=1.5, max_tokens=16)
        for _ in range(2)
    ]
    first, second = ([choice.message.content for choice in answer.choices] for answer in drawn)
    assert first == second
    assert len(set(first)) == 2
    assert drawn[0].usage.completion_tokens == 32


async def test_log_probabilities_are_those_of_our_own_api(pair, direct):
    answer = await pair.chat("How likely?", max_tokens=4, logprobs=True, top_logprobs=2)
    own = await direct[0].chat(
        [{"role": "user", "content": "How likely?"}],
        max_tokens=4, temperature=0.0, ignore_eos=True, top_logprobs=2,
    )  # fmt: skip
    told = answer.choices[0].logprobs.content
    assert [one.logprob for one in told] == pytest.approx(list(own.logprobs), abs=1e-5)
    assert [[top.logprob for top in one.top_logprobs] for one in told] == [
        pytest.approx([top.logprob for top in token.top], abs=1e-5)
        for token in own.choices[0].tokens
    ]


async def test_a_json_schema_is_kept_to(pair):
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}, "old": {"type": "boolean"}},
        "required": ["kind", "old"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}}
    # Spaces between the parts are allowed, and what random weights like: not too many, with this seed.
    answer = await pair.chat(
        "Which pet?", response_format=form, max_tokens=2000, temperature=1.0, seed=1, extra_body={}
    )
    pet = json.loads(answer.choices[0].message.content)
    assert set(pet) == {"kind", "old"}
    assert pet["kind"] in ("cat", "dog")


async def test_completions_go_on_from_text(pair, direct):
    answer = await pair.client.completions.create(
        model=pair.model, prompt="Once upon a time", max_tokens=12, **GREEDY
    )
    own = await direct[1].generate(
        "Once upon a time", max_tokens=12, temperature=0.0, ignore_eos=True
    )
    assert answer.choices[0].text == own.text


async def test_what_is_wrong_with_a_request_is_said_with_400(pair):
    with pytest.raises(openai.BadRequestError, match="a stop string has 300 characters"):
        await pair.chat("Hm", stop="x" * 300)


@pytest.mark.parametrize("stream", [True, False])
async def test_who_hangs_up_is_not_computed_for(pair, until, stream):
    assert pair.in_flight == 0
    task = asyncio.create_task(pair.chat(f"Never mind {stream}", stream=stream, **ENDLESS))
    if stream:
        answer = await task
        await anext(aiter(answer))
    await until(lambda: pair.in_flight == 1 and pair.used_blocks > 0, "it is computed")
    if stream:
        await answer.close()
    else:
        task.cancel()
    await until(lambda: pair.in_flight == 0 and pair.used_blocks == 0, "all blocks are free")


@pytest.mark.parametrize("holder", [0, 1])
async def test_a_prompt_goes_where_its_beginning_is_cached(pair, direct, holder):
    """The gateway has not seen it: the server's events told where it is."""
    words = await known_to(direct[holder], f"Chapter {holder}")
    before = pair.finished()
    for number in range(4):
        answer = await pair.chat(f"{words} {number}", max_tokens=1)
        assert answer.usage.prompt_tokens_details.cached_tokens >= 600
    gained = [after - earlier for after, earlier in zip(pair.finished(), before, strict=True)]
    assert gained[holder] == 4
    assert gained[1 - holder] == 0


async def test_what_an_exhausted_server_refuses_the_other_answers(pair, direct, until):
    full = pair.servers[1].engine
    words = await known_to(direct[1], "Full")
    fields = {"max_tokens": 12_000, "temperature": 0.0, "ignore_eos": True}
    streams = [direct[1].stream("Crowded", **fields) for _ in range(SETTINGS["max_running"])]
    for stream in streams:
        await anext(stream)
    rejected = full.engine.metrics.requests_rejected
    before = _sum(rejected, reason="queue_full")
    # As long as it takes to be sent to the full one, which has their beginning.
    for number in range(50):
        answer = await pair.chat(f"{words} {number}", max_tokens=2)
        assert answer.usage.completion_tokens == 2
        if _sum(rejected, reason="queue_full") > before:
            break
    else:
        pytest.fail("the full server was never asked")
    for stream in streams:
        await stream.aclose()
    await until(lambda: full.in_flight == 0)


async def test_a_draining_server_gets_nothing_more_and_what_it_has_ends_well(pair, direct, until):
    """The last: it does not come back."""
    leaving = pair.servers[0].engine
    words = await known_to(direct[0], "Leaving")
    stream = aiter(await pair.chat(words, stream=True, max_tokens=400))
    await anext(stream)
    assert leaving.in_flight == 1
    before = pair.finished()
    drain = asyncio.create_task(leaving.drain(60))
    await until(lambda: leaving.state is EngineState.DRAINING)
    for number in range(6):
        await pair.chat(f"{words} {number}", max_tokens=1)
    pieces = [piece async for piece in stream]
    assert pieces[-1].choices[0].finish_reason == "length"
    await drain
    gained = [after - earlier for after, earlier in zip(pair.finished(), before, strict=True)]
    assert gained == [1, 6]
