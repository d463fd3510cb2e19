"""`sparserve demo`: the main job, end to end, on a small real model."""

from __future__ import annotations

import asyncio
import urllib.request
from typing import TYPE_CHECKING, Annotated

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from sparserve.cli.environment import check_environment
from sparserve.cli.local import build_with_bars, local_server, server_settings
from sparserve.cli.output import err, out, print_text
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


def demo(
    max_tokens: Annotated[int, typer.Option(help="New tokens per answer.", min=1)] = 64,
    question: Annotated[
        list[str] | None, typer.Option(help="Ask this instead; may be given again.")
    ] = None,
) -> None:
    """Fetch SmolLM2-135M-Instruct once, serve it on a free port, and stream answers over gRPC.

    Prints each answer as it arrives, then time to first token, tokens per second and the metrics that
    the server counted meanwhile. Engine settings are taken from the environment (SPARSERVE_…).
    """
    check_environment(())
    settings = server_settings()
    built = build_with_bars(settings)
    asyncio.run(_run(built, settings, tuple(question or QUESTIONS), max_tokens))


async def _run(
    built: BuiltEngine, settings: ServerSettings, questions: tuple[str, ...], max_tokens: int
) -> None:
    async with local_server(built, settings) as server:
        target = f"{settings.host}:{server.port}"
        info = built.engine.backend.info
        err.print(
            f"serving {built.model_name} on {target}: backend {info.title}, {info.dtype}, {info.threads} threads"
        )
        async with AsyncClient(target) as client:
            results = []
            for question in questions:
                out.print(f"\n[bold]{question}[/]")
                results.append(await _answer(client, question, max_tokens))
            out.print()
            _print_speeds(questions, results)
        await asyncio.to_thread(
            _print_metrics, f"http://{settings.host}:{server.metrics_port}/metrics"
        )


async def _answer(client: AsyncClient, question: str, max_tokens: int) -> Result:
    messages = [{"role": "user", "content": question}]
    async for delta in client.chat_stream(messages, max_tokens=max_tokens, temperature=0):
        print_text(delta.text)
        if delta.result is not None:
            out.out("")
            return delta.result
    raise CallFailed("INTERNAL", "the stream ended without a result")


def _print_speeds(questions: tuple[str, ...], results: list[Result]) -> None:
    table = Table(
        "question", "prompt tokens", "new tokens", "TTFT", "tokens/s", "finished", title="over gRPC"
    )
    for question, result in zip(questions, results, strict=True):
        table.add_row(
            question if len(question) <= 40 else question[:39] + "…",
            str(result.prompt_tokens),
            str(result.completion_tokens),
            f"{result.ttft_seconds * 1000:.0f} ms",
            f"{result.decode_tokens_per_second:.1f}",
            result.finish_reason.lower(),
        )
    out.print(table)


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
