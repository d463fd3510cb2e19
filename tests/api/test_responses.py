"""The answer to a request out of the engine's updates, for several choices and with all that can be asked."""

import pytest

from sparserve.api.responses import Responder
from sparserve.engine.request import (
    Finish,
    FinishReason,
    GeneratedToken,
    GenerationRequest,
    PromptToken,
    SamplingParams,
    Timings,
    TopToken,
    Update,
    merge_finishes,
)
from sparserve.engine.tokenizer import TextTokenizer
from sparserve.v1 import inference_pb2 as pb


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return TextTokenizer(tiny_model.tokenizer, None, 259, {})


def finish(reason: FinishReason, tokens: int, ttft: float, **more: object) -> Finish:
    return Finish(reason, Timings(0.5, ttft, 0.25, 1.0), 3, tokens, cached_tokens=2, **more)


def token(token_id: int, *top: int) -> GeneratedToken:
    return GeneratedToken(token_id, -0.5, tuple(TopToken(i, -0.25) for i in top))


ENDS = [
    finish(FinishReason.LENGTH, 2, 1.0),
    finish(FinishReason.STOP_STRING, 1, 1.5, stop_string="!"),
    finish(FinishReason.STOP_TOKEN, 1, 1.25, stop_token_id=7),
]
UPDATES = [
    Update("r", 0, prompt=(PromptToken(3, None), PromptToken(4, -1.5, (TopToken(5, -0.125),)))),
    Update("r", 0, text="a", tokens=(token(64, 65, 66),)),
    Update("r", 2, text="c", tokens=(token(66),), finish=ENDS[2]),
    Update("r", 1, text="", tokens=(token(65),)),
    Update("r", 1, text="b", finish=ENDS[1]),
    Update("r", 0, text="d", tokens=(token(67, 64),), finish=ENDS[0]),
]


async def as_stream(updates):
    for update in updates:
        yield update


@pytest.fixture
def responder(tokenizer):
    request = GenerationRequest("r", (3, 4), sampling=SamplingParams(n=3))
    return lambda **options: Responder(request, pb.ResponseOptions(**options), tokenizer, "tiny")


async def test_a_stream_ends_each_choice_and_then_sums_up(responder):
    events = [event async for event in responder(top_logprobs=2).stream(as_stream(UPDATES))]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == [
        "started", "prompt", "delta", "delta", "finished", "delta", "delta", "finished", "delta",
        "finished", "summary",
    ]  # fmt: skip
    assert [e.delta.index for e in events if e.HasField("delta")] == [0, 2, 1, 1, 0]
    ends = [e.finished for e in events if e.HasField("finished")]
    assert ends == [
        pb.Finished(index=2, reason=pb.FINISH_REASON_STOP_TOKEN, token_id=7),
        pb.Finished(index=1, reason=pb.FINISH_REASON_STOP_STRING, stop="!"),
        pb.Finished(index=0, reason=pb.FINISH_REASON_LENGTH),
    ]
    summary = events[-1].summary
    assert summary.usage == pb.Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=4)
    whole = merge_finishes(ENDS)
    assert summary.timings.ttft_seconds == whole.timings.ttft == 1.0
    assert summary.timings.decode_seconds == whole.timings.decode == 1.5


async def test_a_whole_answer_has_its_choices_in_order(responder):
    answer = await responder(top_logprobs=2).whole(as_stream(UPDATES))
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.text for choice in answer.choices] == ["ad", "b", "c"]
    assert [[t.id for t in choice.tokens] for choice in answer.choices] == [[64, 67], [65], [66]]
    assert answer.choices[2].finished.token_id == 7
    assert answer.usage == pb.Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=4)
    events = [event async for event in responder(top_logprobs=2).stream(as_stream(UPDATES))]
    assert (answer.timings, answer.sparsity) == (events[-1].summary.timings, events[-1].summary.sparsity)  # fmt: skip
    assert answer.prompt == events[1].prompt


async def test_tokens_tell_their_text_and_the_likeliest_in_their_place(responder, tokenizer):
    answer = await responder(top_logprobs=2).whole(as_stream(UPDATES))
    first = answer.choices[0].tokens[0]
    assert first == pb.Token(
        id=64,
        logprob=-0.5,
        text=tokenizer.token_text(64),
        top=[pb.TopToken(id=i, logprob=-0.25, text=tokenizer.token_text(i)) for i in (65, 66)],
    )
    assert first.text == tokenizer.decode([64])
    assert not answer.prompt.tokens[0].HasField("logprob")
    assert answer.prompt.tokens[1].logprob == -1.5
    assert answer.prompt.tokens[1].top[0].id == 5


@pytest.mark.parametrize("options", [{}, {"token_ids": True}, {"logprobs": True}])
async def test_only_what_was_asked_for_is_sent(responder, options):
    answer = await responder(**options, text=False).whole(as_stream(UPDATES[1:]))
    assert not any(choice.text for choice in answer.choices)
    tokens = [token for choice in answer.choices for token in choice.tokens]
    assert len(tokens) == (4 if options else 0)
    assert {token.HasField("logprob") for token in tokens} <= {"logprobs" in options}
    assert {token.HasField("text") for token in tokens} <= {"logprobs" in options}
    assert not answer.HasField("prompt")
