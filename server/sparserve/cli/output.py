"""What the commands print: errors, progress bars, streamed text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from sparserve.client import Result
from sparserve.model.catalog import DownloadProgress
from sparserve.model.loader import LoadProgress

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def fail(error: Exception) -> None:
    err.print("[bold red]error:[/] ", end="")
    err.print(str(error), markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class ProgressBars:
    on_download: DownloadProgress
    on_tensor: LoadProgress


@contextmanager
def counting_bar() -> Iterator[DownloadProgress]:
    """`show(what, done, total)` draws a bar on stderr for each `what`, gone when done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=None)
            progress.update(tasks[what], completed=done, total=total or None)

        yield show


@contextmanager
def progress_bars() -> Iterator[ProgressBars]:
    """Bars for downloading and loading a model."""
    with counting_bar() as show:
        yield ProgressBars(show, lambda done, total: show("loading weights", done, total))


def print_text(text: str) -> None:
    """A piece of a stream, at once; characters that would move the cursor are left out."""
    out.out(text, end="", highlight=False)
    out.file.flush()


def tell_result(result: Result) -> None:
    """One dim line on stderr: how a generation ended, and how fast it was."""
    speed = result.decode_tokens_per_second
    parts = [
        f"{result.finish_reason.lower()}: {result.prompt_tokens} prompt + {result.completion_tokens} new tokens",
        f"TTFT {result.ttft_seconds * 1000:.0f} ms",
        *([f"{speed:.1f} tokens/s"] if speed else []),
    ]
    err.print(f"[dim]{', '.join(parts)}[/]")
    if result.core_share is not None:
        share = f"{result.core_share:.1%} of the neurons carry 90 % of this prompt's activations"
        err.print(f"[dim]{share}[/]")
