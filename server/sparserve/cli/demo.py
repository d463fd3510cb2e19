"""`sparserve demo`: the main job, end to end, on a small real model."""

from __future__ import annotations

import asyncio
import urllib.request
from typing import Annotated

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from sparserve.api.server import Server
from sparserve.cli.output import err, out, progress_bars
from sparserve.client import AsyncClient, Result
from sparserve.config import ServerSettings, load_settings
from sparserve.engine.factory import BuiltEngine, build_engine
from sparserve.errors import CallFailed

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
    settings = load_settings(ServerSettings, {"port": 0, "metrics_port": 0})
    with progress_bars() as bars:
        built = build_engine(settings, on_tensor=bars.on_tensor, on_download=bars.on_download)
    asyncio.run(_run(built, settings, tuple(question or QUESTIONS), max_tokens))


async def _run(
    built: BuiltEngine, settings: ServerSettings, questions: tuple[str, ...], max_tokens: int
) -> None:
    server = Server(built.engine, built.model_name, settings)
    await server.start()
    target = f"{settings.host}:{server.port}"
    info = built.engine.backend.info
    err.print(
        f"serving {built.model_name} on {target}: backend {info.name}, {info.dtype}, {info.threads} threads"
    )
    try:
        async with AsyncClient(target) as client:
            results = []
            for question in questions:
                prompt = built.engine.tokenizer.apply_chat_template(
                    [{"role": "user", "content": question}]
                )
                out.print(f"\n[bold]{question}[/]")
                results.append(await _answer(client, prompt, max_tokens))
            out.print()
            _print_speeds(questions, results)
        await asyncio.to_thread(
            _print_metrics, f"http://{settings.host}:{server.metrics_port}/metrics"
        )
    finally:
        await server.drain_and_stop()


async def _answer(client: AsyncClient, prompt: str, max_tokens: int) -> Result:
    async for delta in client.stream(prompt, max_tokens=max_tokens, temperature=0):
        out.out(delta.text, end="", highlight=False)
        out.file.flush()
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
