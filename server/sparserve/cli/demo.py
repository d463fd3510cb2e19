"""`sparserve demo`: the main job, end to end, on a small real model, dense beside sparse."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sparserve.cli.environment import check_environment
from sparserve.cli.local import build_with_bars, local_server, server_settings
from sparserve.cli.output import err, out
from sparserve.client import AsyncClient, Result
from sparserve.config import ServerSettings
from sparserve.errors import CallFailed

if TYPE_CHECKING:
    from sparserve.engine.factory import BuiltEngine

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about the sea.",
)
CORE = {"policy": "core", "density": 0.8}
TOKEN = {"policy": "token"}  # as much as the server's default_target_kl allows


def demo(
    max_tokens: Annotated[int, typer.Option(help="New tokens per answer.", min=1)] = 64,
    question: Annotated[
        list[str] | None, typer.Option(help="Ask this instead; may be given again.")
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(
            help="File of `sparserve calibrate`: tokens then choose their neurons, instead of the prompt a core."
        ),
    ] = None,
) -> None:
    """Fetch SmolLM2-135M-Instruct once, serve it on a free port, and stream answers over gRPC.

    Each question is answered twice, dense and with fewer neurons: the texts side by side as they arrive,
    a mark where they part, their speeds and what they read; then the metrics that the server counted meanwhile.
    Engine settings are taken from the environment (SPARSERVE_…).
    """
    check_environment(())
    settings = server_settings()
    if index is not None:
        settings = settings.model_copy(update={"index": str(index)})
    sparse = CORE if not settings.index else TOKEN
    built = build_with_bars(settings)
    asyncio.run(_run(built, settings, tuple(question or QUESTIONS), max_tokens, sparse))


@dataclass
class _Answer:
    name: str
    fields: dict[str, Any]
    text: str = ""
    result: Result | None = None


async def _run(
    built: BuiltEngine,
    settings: ServerSettings,
    questions: tuple[str, ...],
    max_tokens: int,
    sparse: dict[str, Any],
) -> None:
    async with local_server(built, settings) as server:
        target = f"{settings.host}:{server.port}"
        info = built.engine.backend.info
        err.print(
            f"serving {built.model_name} on {target}: backend {info.title}, {info.dtype}, {info.place}"
        )
        async with AsyncClient(target) as client:
            for question in questions:
                out.print(f"\n[bold]{question}[/]")
                pair = _Answer("dense", {"policy": "dense"}), _Answer(sparse["policy"], sparse)
                with Live(console=out, auto_refresh=False, vertical_overflow="visible") as live:
                    for answer in pair:
                        await _answer(client, question, max_tokens, answer, pair, live)
            out.print()
        await asyncio.to_thread(
            _print_metrics, f"http://{settings.host}:{server.metrics_port}/metrics"
        )


async def _answer(
    client: AsyncClient,
    question: str,
    max_tokens: int,
    answer: _Answer,
    pair: Sequence[_Answer],
    live: Live,
) -> None:
    messages = [{"role": "user", "content": question}]
    asked = {"max_tokens": max_tokens, "temperature": 0, **answer.fields}
    async for delta in client.chat_stream(messages, **asked):
        answer.text += delta.text
        answer.result = delta.result
        live.update(_side_by_side(pair), refresh=True)
    if answer.result is None:
        raise CallFailed("INTERNAL", "the stream ended without a result")


def _side_by_side(pair: Sequence[_Answer]) -> Table:
    table = Table(*(_heading(answer) for answer in pair), expand=True, show_lines=False)
    table.columns[0].ratio = table.columns[1].ratio = 1
    parts = None
    if all(answer.result for answer in pair):
        parts = first_difference(*(answer.text for answer in pair))
    table.add_row(*(_marked(answer.text, parts) for answer in pair))
    return table


def _heading(answer: _Answer) -> str:
    if (result := answer.result) is None:
        return answer.name
    speed = (
        f"{result.decode_tokens_per_second:.0f} tokens/s, TTFT {result.ttft_seconds * 1000:.0f} ms"
    )
    kl = "" if not result.predicted_kl else f", predicted KL {result.predicted_kl:.2f}"
    return f"{answer.name}\n{speed}\n{100 * result.density:.0f} % of MLP bytes{kl}"


def _marked(text: str, parts: int | None) -> Text:
    """`text`, with a mark at its word number `parts`, from which on it differs from the other; None: nowhere."""
    shown = Text(text)  # without characters that would move the cursor
    words = shown.plain.split(" ")
    if parts is None or parts >= len(words):
        return shown
    before, after = (" ".join(some) for some in (words[:parts], words[parts + 1 :]))
    return Text.assemble(
        before + " " * (parts > 0), ("▶" + words[parts], "bold reverse"), (" " + after, "dim")
    )


def first_difference(one: str, other: str) -> int | None:
    """The number of the first word in which two texts differ, one having it at least; None: they are equal."""
    words, others = one.split(" "), other.split(" ")
    if words == others:
        return None
    pairs = enumerate(zip(words, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(words), len(others)))


def _print_metrics(url: str) -> None:
    with urllib.request.urlopen(url, timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
        samples = [sample for family in families for sample in family.samples]
    out.print("[bold]metrics[/] (a selection of what Prometheus would scrape)")
    shown = (
        "_tokens_total",
        "_finished_total",
        "_seconds_sum",
        "_seconds_count",
        "_kv_blocks",
    )
    for sample in samples:
        if sample.name.endswith(shown) and sample.value:
            labels = [value for name, value in sample.labels.items() if name != "model_name"]
            out.print(" ", sample.name, *labels, sample.value, markup=False)
