"""Chat, ChatStream, Tokenize and Detokenize on a real server, and both clients for them."""

import asyncio
import json

import grpc
import pytest
from tokenizers import Tokenizer

from sparserve.client import AsyncClient, Client, make_chat_request, make_request
from sparserve.engine import chat
from sparserve.errors import CallFailed
from sparserve.model.loader import load_model
from sparserve.v1 import inference_pb2 as pb

GREEDY = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 12, "token_ids": True}
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
]
RENDERED = "<system>Be kind.\n<user>Hello\n<assistant>"
FIELDS = {"max_tokens": 2, "temperature": 0.0}


@pytest.fixture
def with_template(write_tiny_checkpoint, tmp_path):
    """A tiny model with another chat template, or none."""

    def load(template: str | None):
        folder = write_tiny_checkpoint(tmp_path / "model")
        config = {} if template is None else {"chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return load_model(str(folder))

    return load


async def refused(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


async def test_a_chat_is_the_generation_of_its_rendered_prompt(client, wire):
    answer = await client.chat(MESSAGES, **GREEDY)
    plain = await client.generate(RENDERED, **GREEDY)
    assert answer.choices == plain.choices
    assert answer.result.prompt_tokens == len(RENDERED)
    pieces = [piece async for piece in client.chat_stream(MESSAGES, **GREEDY)]
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [p.finish_reason for p in pieces if p.finish_reason] == ["LENGTH"]
    assert pieces[-1].result.prompt_tokens == len(RENDERED)
    stream = wire.inference.ChatStream(make_chat_request(MESSAGES, **FIELDS))
    kinds = [event.WhichOneof("event") async for event in stream]
    assert kinds[0] == "started"
    assert kinds[-2:] == ["finished", "summary"]


async def test_the_last_message_can_be_continued(client):
    messages = [*MESSAGES, {"role": "assistant", "content": "Well, "}]
    tokenized = await client.tokenize_chat(messages, continue_final_message=True)
    assert tokenized.text == RENDERED + "Well, "
    answer = await client.chat(messages, continue_final_message=True, **GREEDY)
    assert answer.text == (await client.generate(tokenized.text, **GREEDY)).text


async def test_logprobs_come_with_texts_and_the_ends_of_choices(client):
    answer = await client.chat(MESSAGES, logprobs=True, **FIELDS)
    (choice,) = answer.choices
    assert "".join(token.text for token in choice.tokens) == choice.text
    assert len(choice.logprobs) == len(choice.token_ids) == 2
    pieces = [piece async for piece in client.chat_stream(MESSAGES, logprobs=True, **FIELDS)]
    assert sum((piece.tokens for piece in pieces), ()) == choice.tokens


async def test_a_model_without_a_template_generates_and_cannot_chat(
    serving, connect, with_template, details_of
):
    async with serving(model=with_template(None)) as server:
        wire = connect(server)
        request = make_chat_request(MESSAGES, **FIELDS)
        for call in (
            wire.inference.Chat(request),
            wire.inference.ChatStream(request).read(),
            wire.inference.Tokenize(pb.TokenizeRequest(chat=request)),
        ):
            error = await refused(call)
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "no chat template; send a plain prompt" in error.details()
            assert details_of(error)["ErrorInfo"].reason == "CHAT_UNAVAILABLE"
        answer = await wire.inference.Generate(make_request("hello", **FIELDS))
        assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("template", "code", "told"),
    [
        ("{{ raise_exception('roles must alternate') }}", "INVALID_ARGUMENT", "must alternate"),
        ("{{ messages[7].x.y }}", "INVALID_ARGUMENT", "failed on these messages"),
        ("{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}",
         "INVALID_ARGUMENT", "s of work"),
        ("{{ 'x' * 600 }}", "INVALID_ARGUMENT", "the limit is 511"),
        ("{% for", "FAILED_PRECONDITION", "not valid (line 1"),
    ],
)  # fmt: skip
async def test_a_template_that_fails_is_one_clear_status_and_holds_nobody_up(
    serving, connect, with_template, monkeypatch, template, code, told
):
    monkeypatch.setattr(chat, "MAX_RENDER_SECONDS", 0.3)
    async with serving(model=with_template(template)) as server:
        wire = connect(server)
        failing = asyncio.ensure_future(wire.inference.Chat(make_chat_request(MESSAGES)))
        answer = await wire.inference.Generate(make_request("hello", **FIELDS))
        assert answer.usage.completion_tokens == 2
        error = await refused(failing)
        assert (error.code().name, told in error.details()) == (code, True), error.details()
        assert server.engine.in_flight == 0


async def test_tools_reach_a_template_that_knows_them(serving, with_template, client):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    with pytest.raises(CallFailed) as failed:
        await client.chat(MESSAGES, tools=tools)
    assert "tools" in failed.value.violations
    model = with_template("{{ tools | tojson }}{{ mood }}{{ messages[1].tool_calls | tojson }}")
    async with (
        serving(model=model) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as other,
    ):
        call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
        messages = [MESSAGES[0], {"role": "assistant", "tool_calls": [call]}]
        made = await other.tokenize_chat(messages, tools=tools, template_arguments={"mood": "calm"})
        expected = {"name": "f", "description": "", "parameters": {"type": "object"}}
        rendered = [{"type": "function", "function": expected}]
        assert made.text == json.dumps(rendered) + "calm" + json.dumps([call])
        answer = await other.chat(messages, tools=tools, max_tokens=1)
        assert answer.result.prompt_tokens == len(made.text) - len("calm")


async def test_tokenize_gives_the_ids_that_a_prompt_would_have(client, tiny_model):
    made = await client.tokenize("héllo")
    assert made.text == "héllo"
    assert list(made.token_ids) == tiny_model.tokenizer.encode("héllo").ids
    assert made.max_context_length == 512
    assert len((await client.tokenize("x" * 5000)).token_ids) == 5000  # more than a context
    assert (await client.tokenize("")).token_ids == ()
    assert (await client.tokenize_chat(MESSAGES)).text == RENDERED


async def test_detokenize_is_the_way_back(client):
    ids = (await client.tokenize("a 🎉 b")).token_ids
    assert await client.detokenize(ids) == "a 🎉 b"
    assert await client.detokenize([256, *ids, 257]) == "a 🎉 b"
    whole = await client.detokenize([256, *ids, 257], skip_special_tokens=False)
    assert whole == "<bos>a 🎉 b<eos>"
    assert await client.detokenize([]) == ""


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("Tokenize", pb.TokenizeRequest(), "input"),
        ("Tokenize", pb.TokenizeRequest(chat=pb.ChatRequest()), "messages"),
        ("Tokenize", pb.TokenizeRequest(text="x" * ((1 << 20) + 1)), "text"),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[1, 259]), "token_ids[1]"),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[-1]), "token_ids[0]"),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[1] * ((1 << 20) + 1)), "token_ids"),
    ],
)
async def test_what_cannot_be_tokenized_or_back_names_its_field(
    wire, details_of, method, request_, field
):
    error = await refused(getattr(wire.inference, method)(request_))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = details_of(error)["BadRequest"].field_violations
    assert violation.field == field


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Chat", make_chat_request(MESSAGES, model="gpt-9")),
        ("Tokenize", pb.TokenizeRequest(text="x", model="gpt-9")),
        ("Detokenize", pb.DetokenizeRequest(model="gpt-9")),
    ],
)
async def test_another_model_is_not_found(wire, method, request_):
    error = await refused(getattr(wire.inference, method)(request_))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_the_user_is_in_the_servers_log(client, caplog):
    caplog.set_level("INFO")
    await client.chat(MESSAGES, user="ann\nb", request_id="mine", **FIELDS)
    (line,) = (r for r in caplog.records if r.name == "sparserve.access")
    assert (line.user, line.request_id) == ("ann\nb", "mine")


async def test_the_plain_client_does_all_that_the_asyncio_client_does(server, client):
    def plain():
        with Client(f"127.0.0.1:{server.port}") as connected:
            pieces = list(connected.chat_stream(MESSAGES, **GREEDY))
            return (
                connected.chat(MESSAGES, **GREEDY).choices,
                "".join(piece.text for piece in pieces),
                connected.tokenize("hello"),
                connected.tokenize_chat(MESSAGES),
                connected.detokenize([256, 72], skip_special_tokens=False),
                connected.tokenizer_files(),
            )

    answer = await client.chat(MESSAGES, **GREEDY)
    assert await asyncio.to_thread(plain) == (
        answer.choices,
        answer.text,
        await client.tokenize("hello"),
        await client.tokenize_chat(MESSAGES),
        await client.detokenize([256, 72], skip_special_tokens=False),
        await client.tokenizer_files(),
    )


async def test_a_real_model_answers_a_real_question(serving, demo_model):
    async with (
        serving(model=demo_model, max_context=512, kv_cache_gib=0.1, threads=0) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = await client.chat(question, max_tokens=16, temperature=0)
        files = await client.tokenizer_files()
        made = await client.tokenize_chat(question)
    assert "Paris" in answer.text
    theirs = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert theirs.encode(made.text, add_special_tokens=False).ids == list(made.token_ids)
    assert answer.result.prompt_tokens == len(made.token_ids)
