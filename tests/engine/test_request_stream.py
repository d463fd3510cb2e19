"""What the reader of a request sees, however late it reads."""

import pytest

from sparserve.engine.request import (
    Finish,
    FinishReason,
    GeneratedToken,
    PromptToken,
    Timings,
    Update,
    merge_finishes,
)
from sparserve.engine.stream import RequestStream
from sparserve.errors import EngineFailure, SlowReader

TIMES = Timings(0, 0, 0, 0)


def token(index: int, text: str = "x", **fields: object) -> Update:
    return Update("a", index, text, (GeneratedToken(1, -1.0),), **fields)


def end(index: int, error: Exception | None = None) -> Update:
    reason = FinishReason.ERROR if error else FinishReason.LENGTH
    return Update("a", index, finish=Finish(reason, TIMES, 1, 1, error=error))


def stream_of(choices: int = 1, max_backlog: int = 100) -> RequestStream:
    return RequestStream("a", choices, max_backlog, lambda: None)


async def read(stream: RequestStream) -> list[Update]:
    return [update async for update in stream]


async def test_what_piles_up_is_merged_by_choice_and_ends_with_the_last_finish():
    stream = stream_of(choices=2)
    for update in (
        token(1, "a", prompt=(PromptToken(7, None),)),
        token(0, "b"),
        token(1, "c"),
        end(1),
    ):
        stream.put(update)
    assert not stream.is_complete
    stream.put(end(0))
    assert stream.is_complete
    first, second = await read(stream)
    assert (first.index, first.text, len(first.tokens), first.prompt[0].id) == (1, "ac", 2, 7)
    assert first.finish.reason is FinishReason.LENGTH
    assert (second.index, second.text) == (0, "b")
    assert second.finish is not None


async def test_an_error_of_one_choice_ends_the_request_after_what_was_generated():
    stream = stream_of(choices=3)
    failure = EngineFailure("id")
    stream.put(token(2))
    stream.put(end(0, failure))
    stream.put(token(1, "never seen"))
    assert stream.is_complete
    assert stream.has_failed
    assert (await anext(stream)).index == 2
    for _ in range(2):
        with pytest.raises(EngineFailure):
            await anext(stream)


async def test_a_backlog_beyond_the_limit_ends_the_request():
    stream = stream_of(max_backlog=5)
    for _ in range(5):
        stream.put(token(0))
    assert not stream.is_complete
    assert len((await anext(stream)).tokens) == 5, "reading makes room"
    for _ in range(6):
        stream.put(token(0))
    assert stream.has_failed
    stream.put(token(0, "dropped"))
    assert len((await anext(stream)).tokens) == 6
    with pytest.raises(SlowReader, match=r"6 tokens .* limit is 5"):
        await anext(stream)


async def test_a_long_answer_that_has_ended_waits_for_its_reader():
    stream = stream_of(max_backlog=2)
    for _ in range(2):
        stream.put(token(0))
    stream.put(Update("a", 0, "x", (GeneratedToken(1, -1.0),), finish=end(0).finish))
    (update,) = await read(stream)
    assert len(update.tokens) == 3


def test_choices_without_a_token_do_not_count_in_the_times_of_the_whole():
    def ended(*times: float) -> Finish:
        return Finish(FinishReason.CANCELLED, Timings(*times), 1, 1)

    merged = merge_finishes(
        [ended(0.1, 0.5, 0.4, 2.0), ended(0.1, 0, 0, 0), ended(0.2, 0.9, 0.7, 3.0)]
    )
    assert (merged.timings.ttft, merged.timings.decode) == (0.5, pytest.approx(3.4))
    assert merged.timings.queue == 0.1
    assert merged.completion_tokens == 3
    assert merge_finishes([ended(0.1, 0, 0, 0)]).timings == Timings(0.1, 0, 0, 0)
