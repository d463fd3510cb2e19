"""`sparserve chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from typing import Annotated

import typer
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from sparserve.cli import connection
from sparserve.cli import sparsity_options as options
from sparserve.cli.dialogue import COMMANDS, Dialogue, Quit
from sparserve.cli.local import connected
from sparserve.cli.options import with_settings
from sparserve.cli.output import err, fail, out, print_text, tell_result
from sparserve.client import AsyncClient
from sparserve.config import EngineSettings
from sparserve.errors import SparserveError


@with_settings(EngineSettings)
def chat(
    settings: EngineSettings,
    server: connection.Server = None,
    api_key: connection.ApiKey = None,
    tls_ca: connection.TlsCa = None,
    client_cert: connection.ClientCert = None,
    client_key: connection.ClientKey = None,
    system: Annotated[str, typer.Option(help="The system message.")] = "",
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; at most 2. Default: the server's.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="New tokens of an answer. Default: the server's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers.")] = None,
    policy: options.Policy = None,
    density: options.Density = None,
    target_kl: options.TargetKl = None,
    choose_by: options.ChooseBy = None,
    core_density: options.CoreDensity = None,
    predictor: options.Predictor = None,
    score: options.Score = None,
    refresh_interval: options.RefreshInterval = None,
    draft: options.Draft = None,
    draft_tokens: options.DraftTokens = None,
) -> None:
    """Talk with a model, here or on a server; /help lists the commands.

    Esc-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D leaves. Where stdin is no terminal,
    each of its lines is a message and the answers go to stdout.
    """
    given = {
        "temperature": temperature, "max_tokens": max_tokens, "seed": seed,
        "policy": policy, "density": density, "target_kl": target_kl, "choose_by": choose_by,
        "core_density": core_density, "predictor": predictor, "score": score,
        "refresh_interval": refresh_interval, "draft": draft, "draft_tokens": draft_tokens,
    }  # fmt: skip
    to = connection.connection(server, api_key, tls_ca, client_cert, client_key)
    asyncio.run(_chat(to, settings, Dialogue(system, given)))


async def _chat(
    to: connection.Connection | None, settings: EngineSettings, dialogue: Dialogue
) -> None:
    async with connected(to, settings) as client:
        if sys.stdin.isatty():
            model = (await client.model_info()).model
            err.print(f"[dim]talking with {model}; /help lists the commands[/]")
            await converse(client, dialogue)
        else:
            await read_from_pipe(client, dialogue)


async def converse(client: AsyncClient, dialogue: Dialogue) -> None:
    """Until the user leaves; an error ends one answer, not the conversation."""
    async for line in _typed_lines():
        try:
            if line.startswith("/"):
                err.print(dialogue.command(line), markup=False)
            else:
                await _answer_unless_interrupted(client, dialogue, line)
        except Quit:
            return
        except SparserveError as error:
            fail(error)


async def read_from_pipe(client: AsyncClient, dialogue: Dialogue) -> None:
    """Raises the first error: nobody is there to go on."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        line = line.strip()
        try:
            if line.startswith("/"):
                err.print(dialogue.command(line), markup=False)
            elif line:
                await _answer(client, dialogue, line)
        except Quit:
            return


async def _typed_lines() -> AsyncIterator[str]:
    """What the user types, without empty lines, until Ctrl-D or Ctrl-C twice."""
    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    names = [usage.split(" ")[0] for usage in COMMANDS]
    session: PromptSession[str] = PromptSession(
        "> ", completer=WordCompleter(names, sentence=True), key_bindings=bindings
    )
    leaving = False
    while True:
        try:
            line = (await session.prompt_async()).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if leaving:
                return
            leaving = True
            err.print("[dim]Ctrl-C again, or Ctrl-D, to leave[/]")
            continue
        leaving = False
        if line:
            yield line


async def _answer_unless_interrupted(
    client: AsyncClient, dialogue: Dialogue, question: str
) -> None:
    """Ctrl-C ends the answer, on the server too; what was said stays in the conversation."""
    answering = asyncio.create_task(_answer(client, dialogue, question))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, answering.cancel)
    try:
        await asyncio.wait({answering})
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        answering.cancel()  # where this task itself is cancelled
    if not answering.cancelled():
        await answering  # raises its error
    else:
        err.print("\n[dim]stopped[/]")


async def _answer(client: AsyncClient, dialogue: Dialogue, question: str) -> None:
    dialogue.ask(question)
    said: list[str] = []
    try:
        async for delta in client.chat_stream(dialogue.messages, **dialogue.settings):
            said.append(delta.text)
            print_text(delta.text)
            if delta.result is not None:
                out.out("")
                tell_result(delta.result)
    finally:
        dialogue.answer("".join(said))
