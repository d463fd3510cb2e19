"""`sparserve generate`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from sparserve.cli import connection
from sparserve.cli import sparsity_options as options
from sparserve.cli.dialogue import Dialogue
from sparserve.cli.local import connected
from sparserve.cli.options import NO_VALUE, with_settings
from sparserve.cli.output import err, out, print_logprobs, print_text, tell_result
from sparserve.client import AsyncClient, Token
from sparserve.config import EngineSettings
from sparserve.errors import ConfigError

SERVERS = "Default: the server's."


@with_settings(EngineSettings)
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    settings: EngineSettings,
    server: connection.Server = None,
    api_key: connection.ApiKey = None,
    tls_ca: connection.TlsCa = None,
    client_cert: connection.ClientCert = None,
    client_key: connection.ClientKey = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", metavar=NO_VALUE, help="Ask it as a chat message, by the model's template."
        ),
    ] = False,
    system: Annotated[str, typer.Option(help="The system message; with --chat.")] = "",
    max_tokens: Annotated[int | None, typer.Option(help=f"New tokens at most. {SERVERS}")] = None,
    min_tokens: Annotated[int | None, typer.Option(help=f"New tokens at least. {SERVERS}")] = None,
    temperature: Annotated[
        float, typer.Option(help="0 is greedy, whatever is said below; at most 2.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(help=f"Sample from so many likeliest tokens; 0: all. {SERVERS}")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help=f"Sample from the fewest tokens that hold this probability. {SERVERS}"),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help=f"Sample from tokens at least so likely, times the likeliest. {SERVERS}"),
    ] = None,
    typical_p: Annotated[
        float | None,
        typer.Option(help=f"Sample from typical tokens that hold this probability. {SERVERS}"),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help=f"Above 1, tokens of prompt and output are less likely. {SERVERS}"),
    ] = None,
    presence_penalty: Annotated[
        float | None,
        typer.Option(help=f"Above 0, tokens of the output are less likely. {SERVERS}"),
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help=f"The same, for each time that they occur. {SERVERS}")
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID=BIAS", help="Added to the logit of a token id; may be given again."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text. Default: random.")] = None,
    n: Annotated[
        int, typer.Option("--n", help="Texts to generate; printed when all are done.")
    ] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given again.")
    ] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="End with this token; may be given again.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="File with a JSON schema that the text must fit.")
    ] = None,
    json_object: Annotated[
        bool, typer.Option("--json-object", metavar=NO_VALUE, help="The text is a JSON object.")
    ] = False,
    regex: Annotated[
        str | None, typer.Option(help="Regular expression that the whole text must match.")
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option(help="File with a grammar (GBNF) that the text must fit.")
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="The text is one of these; may be given again.")
    ] = None,
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
    logprobs: Annotated[
        bool,
        typer.Option(
            "--logprobs",
            metavar=NO_VALUE,
            help="List each token with its log-probability at the end.",
        ),
    ] = False,
    report_neurons: Annotated[
        bool,
        typer.Option(
            "--report-neurons",
            metavar=NO_VALUE,
            help="Tell how few neurons carry the prompt's activations.",
        ),
    ] = False,
) -> None:
    """Continue a prompt, here or on a server, printing the text as it is made.

    Greedy unless --temperature is above 0. Everything else that is not given is the server's default.
    """
    if system and not chat:
        raise ConfigError("--system is for a chat; give --chat too")
    fields = {
        "max_tokens": max_tokens, "min_tokens": min_tokens, "temperature": temperature,
        "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "logit_bias": _biases(logit_bias), "seed": seed, "n": n,
        "stop": stop, "stop_token_ids": stop_token_id, "json_schema": _text_of(json_schema),
        "policy": policy, "density": density, "target_kl": target_kl, "choose_by": choose_by,
        "core_density": core_density, "predictor": predictor, "score": score,
        "refresh_interval": refresh_interval, "draft": draft, "draft_tokens": draft_tokens,
        "json_object": json_object, "regex": regex, "grammar": _text_of(grammar), "choice": choice,
        "logprobs": logprobs or None, "report_neurons": report_neurons or None,
    }  # fmt: skip
    question = Dialogue(system)
    question.ask(prompt)
    to = connection.connection(server, api_key, tls_ca, client_cert, client_key)
    asyncio.run(_generate(to, settings, question.messages if chat else prompt, chat, fields))


async def _generate(
    to: connection.Connection | None,
    settings: EngineSettings,
    asked: Any,
    chat: bool,
    fields: dict[str, Any],
) -> None:
    async with connected(to, settings) as client:
        if fields["n"] == 1:
            await _stream(client, asked, chat, fields)
            return
        answer = await (client.chat if chat else client.generate)(asked, **fields)
        for each in answer.choices:
            err.print(f"[dim]{each.index + 1} of {fields['n']}, {each.finish_reason.lower()}:[/]")
            out.out(each.text, highlight=False)
            if fields["logprobs"]:
                print_logprobs(each.tokens)
        tell_result(answer.result, asked_for_neurons=bool(fields["report_neurons"]))


async def _stream(client: AsyncClient, asked: Any, chat: bool, fields: dict[str, Any]) -> None:
    tokens: list[Token] = []
    async for delta in (client.chat_stream if chat else client.stream)(asked, **fields):
        print_text(delta.text)
        tokens += delta.tokens
        if delta.result is not None:
            out.out("")
            if fields["logprobs"]:
                print_logprobs(tokens)
            tell_result(delta.result, asked_for_neurons=bool(fields["report_neurons"]))


def _biases(given: list[str] | None) -> dict[int, float] | None:
    """Raises ConfigError."""
    try:
        pairs = [each.split("=") for each in given or ()]
        return {int(token_id): float(bias) for token_id, bias in pairs} or None
    except ValueError as error:
        raise ConfigError(
            f"--logit-bias {' '.join(given or ())}: each must be a token id and a number, such as 42=-100"
        ) from error


def _text_of(path: Path | None) -> str | None:
    """Raises ConfigError."""
    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
