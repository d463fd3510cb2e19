"""`sparserve chat`: a conversation from a pipe, in a terminal, and its commands."""

import asyncio
import io
import json
import os
import signal
import time

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.control import strip_control_codes

from sparserve.cli.chat import converse
from sparserve.cli.dialogue import COMMANDS, SETTINGS, CommandError, Dialogue, Quit
from sparserve.client import AsyncClient, InvalidRequest

TINY = ("--threads", "1", "--kv-cache-gib", "0.01")
CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture
def run_piped(run_main, monkeypatch):
    """`run_piped("hello\\n", …)`: `sparserve chat` with lines on its stdin, in this process."""

    def run(lines: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return run_main("chat", *arguments)

    return run


@pytest.fixture
async def terminal(serving):
    """(server, dialogue, what types keys, the conversation's task) of a talk that goes on."""
    with create_pipe_input() as keyboard, create_app_session(keyboard, DummyOutput()):
        async with (
            serving() as server,
            AsyncClient(f"127.0.0.1:{server.port}") as client,
        ):
            dialogue = Dialogue(settings={"temperature": 0.0, "max_tokens": 8})
            task = asyncio.ensure_future(converse(client, dialogue))
            yield server, dialogue, keyboard.send_text, task
            task.cancel()
            await asyncio.wait({task})


def test_lines_of_a_pipe_are_answered_one_by_one(run_piped, tiny_folder, tmp_path):
    file = tmp_path / "talk.json"
    status, out, err = run_piped(
        f"hello\n\n/set temperature 0\nand now?\n/save {file}\n/quit\nnever asked\n",
        "--model", tiny_folder, *TINY, "--max-tokens", "6", "--seed", "3", "--system", "Be kind.",
    )  # fmt: skip
    assert status == 0
    messages = json.loads(file.read_text())
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in messages][0::2][0] == "Be kind."
    assert [m["content"] for m in messages if m["role"] == "user"] == ["hello", "and now?"]
    answers = [strip_control_codes(m["content"]) for m in messages if m["role"] == "assistant"]
    assert out == "".join(answer + "\n" for answer in answers)
    assert err.count("TTFT") == 2


async def test_a_server_is_asked_with_the_whole_conversation(run_piped, serving):
    async with serving() as server:
        target = f"127.0.0.1:{server.port}"
        fields = ["--max-tokens", "5", "--temperature", "0"]
        status, out, _ = await asyncio.to_thread(
            run_piped, "one\ntwo\n", "--server", target, *fields
        )
        async with AsyncClient(target) as client:
            plain = {"max_tokens": 5, "temperature": 0}
            first = await client.chat([{"role": "user", "content": "one"}], **plain)
            second = await client.chat(
                [
                    {"role": "user", "content": "one"},
                    {"role": "assistant", "content": first.text},
                    {"role": "user", "content": "two"},
                ],
                **plain,
            )
    assert status == 0
    assert out == strip_control_codes(f"{first.text}\n{second.text}\n")


@pytest.mark.parametrize(
    ("lines", "flags", "told"),
    [
        ("hello\n", ["--temperature", "3"], "sampling.temperature is 3"),
        ("/nope\n", [], "no command is named /nope"),
        ("hello\n", ["--server", "127.0.0.1:1"], "--model"),
    ],
)
def test_the_first_error_of_a_pipe_is_one_line_and_the_end(
    run_piped, tiny_folder, lines, flags, told
):
    status, _, err = run_piped(lines + "more\n", "--model", tiny_folder, *TINY, *flags)
    assert status == 1
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert told in line


async def test_a_typed_message_may_have_several_lines(terminal, until):
    _, dialogue, keys, task = terminal
    keys("one\x1b\rtwo\r")
    await until(lambda: len(dialogue.turns) == 2)
    assert dialogue.turns[0] == {"role": "user", "content": "one\ntwo"}
    keys("/system Be kind.\r\r/reset\r")
    await until(lambda: not dialogue.turns)
    assert dialogue.system == "Be kind."
    keys(CTRL_D)
    await asyncio.wait_for(task, 30)


async def test_ctrl_c_at_the_prompt_leaves_when_pressed_twice(terminal, until, capsys):
    _, dialogue, keys, task = terminal
    keys(CTRL_C)
    keys("hello\r")
    await until(lambda: len(dialogue.turns) == 2)
    assert not task.done()
    assert "Ctrl-C again" in capsys.readouterr().err
    keys(CTRL_C + CTRL_C)
    await asyncio.wait_for(task, 30)


async def test_ctrl_c_stops_an_answer_and_its_request_and_the_talk_goes_on(
    terminal, until, monkeypatch, capsys
):
    server, dialogue, keys, task = terminal
    backend, calls = server.engine.engine.backend, []
    forward = backend.forward

    def slow_forward(batch: object) -> object:
        calls.append(batch)
        time.sleep(0.01)
        return forward(batch)

    monkeypatch.setattr(backend, "forward", slow_forward)
    dialogue.settings["max_tokens"] = 400
    keys("hello\r")
    await until(lambda: len(calls) > 10)
    os.kill(os.getpid(), signal.SIGINT)
    await until(lambda: server.engine.in_flight == 0)
    await until(lambda: "stopped" in capsys.readouterr().err)
    assert [turn["role"] for turn in dialogue.turns] == ["user", "assistant"]
    assert 0 < len(dialogue.turns[1]["content"]) < 390
    dialogue.settings["max_tokens"] = 3
    keys("again\r")
    await until(lambda: len(dialogue.turns) == 4)
    keys("/quit\r")
    await asyncio.wait_for(task, 30)


async def test_an_error_ends_its_answer_and_not_the_conversation(terminal, until, capsys):
    _, dialogue, keys, task = terminal
    keys("/set min_tokens 9\rhello\r")
    await until(lambda: "INVALID_ARGUMENT" in capsys.readouterr().err)
    assert dialogue.turns == []  # a question without an answer is not kept
    keys("/set min_tokens 0\rhello\r")
    await until(lambda: len(dialogue.turns) == 2)
    assert not task.done()


def test_help_tells_of_every_command():
    told = Dialogue().command("/help")
    assert all(usage in told for usage in COMMANDS)
    assert all(name in told for name in SETTINGS)


def test_undo_forgets_a_question_with_its_answer():
    dialogue = Dialogue()
    for text in ("one", "two"):
        dialogue.ask(text)
        dialogue.answer(text.upper())
    dialogue.command("/undo")
    assert [m["content"] for m in dialogue.messages] == ["one", "ONE"]
    dialogue.command("/undo")
    with pytest.raises(CommandError, match="nothing was said yet"):
        dialogue.command("/undo")


def test_the_system_message_is_first_until_it_is_removed():
    dialogue = Dialogue()
    dialogue.ask("hi")
    dialogue.command("/system  Be kind. ")
    assert dialogue.messages[0] == {"role": "system", "content": "Be kind."}
    dialogue.command("/system")
    assert [m["role"] for m in dialogue.messages] == ["user"]


def test_settings_are_set_shown_and_unset():
    dialogue = Dialogue()
    assert "default" in dialogue.command("/set")
    texts = {"policy": "core", "choose_by": "gate", "predictor": "auto", "score": "norm", "draft": "ngram"}  # fmt: skip
    for name, kind in SETTINGS.items():
        dialogue.command(f"/set {name} {texts.get(name, 1)}")
        assert dialogue.settings[name] == texts.get(name, 1)
        assert type(dialogue.settings[name]) is kind
    assert "top_k 1" in dialogue.command("/set")
    dialogue.command("/set top_k none")
    assert dialogue.settings["top_k"] is None
    assert "top_k" not in dialogue.command("/set")


@pytest.mark.parametrize(
    "line", ["/set nope 1", "/set seed", "/set seed x", "/set top_k 1.5", "/save", "/save /", "/x"]
)
def test_a_command_that_cannot_be_is_an_error_and_changes_nothing(line):
    dialogue = Dialogue()
    with pytest.raises(CommandError):
        dialogue.command(line)
    assert dialogue == Dialogue()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/set temperature 9", "sampling.temperature is 9; it must be in [0, 2]"),
        ("/set top_p nan", "sampling.top_p is nan; it must be in (0, 1]"),
        ("/set max_tokens 0", "stopping.max_tokens is 0; it must be >= 1"),
        ("/set policy best", "policy is 'best'; it must be one of dense, core, token, exact, auto"),
        ("/set seed -1", "sampling.seed is -1; it must be in [0, 2^64)"),
    ],
)
def test_a_setting_out_of_range_is_refused_at_once_with_the_range(line, told):
    dialogue = Dialogue()
    with pytest.raises(InvalidRequest) as refused:
        dialogue.command(line)
    assert str(refused.value) == told
    assert dialogue == Dialogue()


def test_quit_leaves():
    with pytest.raises(Quit):
        Dialogue().command("/quit")
