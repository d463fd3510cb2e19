"""`sparserve generate`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from sparserve.cli.local import connected
from sparserve.cli.options import with_settings
from sparserve.cli.output import err, out, print_text, tell_result
from sparserve.client import AsyncClient
from sparserve.config import EngineSettings
from sparserve.errors import ConfigError


@with_settings(EngineSettings)
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    settings: EngineSettings,
    server: Annotated[
        str | None,
        typer.Option(help="host:port of a running server; without it the model runs here."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask it as a chat message, by the model's template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 128,
    min_tokens: Annotated[int, typer.Option(help="New tokens at least.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy; at most 2.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the fewest tokens that hold this probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Sample from tokens at least so likely, times the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens of prompt and output are less likely.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(help="Above 0, tokens of the output are less likely.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="The same, for each time that they occur.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text. Default: random.")] = None,
    n: Annotated[
        int, typer.Option("--n", help="Texts to generate; printed when all are done.")
    ] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given again.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="File with a JSON schema that the text must fit.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="Regular expression that the whole text must match.")
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option(help="File with a grammar (GBNF) that the text must fit.")
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="The text is one of these; may be given again.")
    ] = None,
    report_neurons: Annotated[
        bool,
        typer.Option(
            "--report-neurons", help="Tell how few neurons carry the prompt's activations."
        ),
    ] = False,
) -> None:
    """Continue a prompt, here or on a server, printing the text as it is made."""
    fields = {
        "max_tokens": max_tokens, "min_tokens": min_tokens or None, "temperature": temperature,
        "top_k": top_k, "top_p": top_p, "min_p": min_p or None,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "seed": seed, "n": n, "stop": stop or (),
        "json_schema": _text_of(json_schema), "regex": regex, "grammar": _text_of(grammar),
        "choice": choice or None, "report_neurons": report_neurons or None,
    }  # fmt: skip
    asyncio.run(_generate(server, settings, prompt, chat, fields))


async def _generate(
    target: str | None, settings: EngineSettings, prompt: str, chat: bool, fields: dict[str, Any]
) -> None:
    async with connected(target, settings) as client:
        asked: Any = [{"role": "user", "content": prompt}] if chat else prompt
        if fields["n"] == 1:
            await _stream(client, asked, chat, fields)
            return
        answer = await (client.chat if chat else client.generate)(asked, **fields)
        for each in answer.choices:
            err.print(f"[dim]{each.index + 1} of {fields['n']}, {each.finish_reason.lower()}:[/]")
            out.out(each.text, highlight=False)
        tell_result(answer.result)


async def _stream(client: AsyncClient, asked: Any, chat: bool, fields: dict[str, Any]) -> None:
    async for delta in (client.chat_stream if chat else client.stream)(asked, **fields):
        print_text(delta.text)
        if delta.result is not None:
            out.out("")
            tell_result(delta.result)


def _text_of(path: Path | None) -> str | None:
    """Raises ConfigError."""
    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
