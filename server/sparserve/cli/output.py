"""What the commands print: errors, progress bars, streamed text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from sparserve.client import Result, Token
from sparserve.errors import ConfigError
from sparserve.model.catalog import DownloadProgress

if TYPE_CHECKING:
    from sparserve.model.loader import LoadProgress
    from sparserve.model.packing import QuantizeProgress

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def fail(error: Exception) -> None:
    err.print("[bold red]error:[/] ", end="")
    err.print(str(error), markup=False, soft_wrap=True)


def warn(text: str) -> None:
    err.print("[yellow]warning:[/] ", end="")
    err.print(text, markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class ProgressBars:
    on_download: DownloadProgress
    on_tensor: LoadProgress
    on_layer: QuantizeProgress


@contextmanager
def counting_bar(*, own_thread: bool = True) -> Iterator[DownloadProgress]:
    """`show(what, done, total)` draws a bar on stderr for each `what`, gone when done.

    Without a thread of its own it is drawn at each `show` and takes no time from what is measured between.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        console=err,
        transient=True,
        disable=not err.is_terminal,
        auto_refresh=own_thread,
    ) as progress:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=None)
            progress.update(
                tasks[what], completed=done, total=total or None, refresh=not own_thread
            )

        yield show


@contextmanager
def progress_bars() -> Iterator[ProgressBars]:
    """Bars for downloading, loading and quantizing a model."""
    with counting_bar() as show:
        yield ProgressBars(
            show,
            lambda done, total: show("loading weights", done, total),
            lambda done, total: show(f"quantizing {total} layers", done, total),
        )


def print_text(text: str) -> None:
    """A piece of a stream, at once; characters that would move the cursor are left out."""
    out.out(text, end="", highlight=False)
    out.file.flush()


def print_logprobs(tokens: Iterable[Token]) -> None:
    """A table on stderr; texts are quoted, so that spaces and line ends show."""
    table = Table("token", "id", "log-probability", "probability")
    for token in tokens:
        logprob = token.logprob if token.logprob is not None else math.nan
        text, share = json.dumps(token.text, ensure_ascii=False), f"{math.exp(logprob):.1%}"
        table.add_row(Text(text), str(token.id), f"{logprob:.4f}", share)
    err.print(table)


def tell_result(result: Result, *, asked_for_neurons: bool = False) -> None:
    """One dim line on stderr: how a generation ended, and how fast it was."""
    speed = result.decode_tokens_per_second
    parts = [
        f"{result.finish_reason.lower()}: {result.prompt_tokens} prompt + {result.completion_tokens} new tokens",
        f"TTFT {result.ttft_seconds * 1000:.0f} ms",
        *([f"{speed:.1f} tokens/s"] if speed else []),
    ]
    err.print(f"[dim]{', '.join(parts)}[/]")
    if told := _sparsity(result):
        err.print(f"[dim]{', '.join(told)}[/]")
    if result.core_share is not None:
        share = f"{result.core_share:.1%} of the neurons carry 90 % of this prompt's activations"
        err.print(f"[dim]{share}[/]")
    elif asked_for_neurons:
        err.print(
            "[dim]--report-neurons needs a prompt of 2 tokens or more: the first one does not count[/]"
        )


def _sparsity(result: Result) -> list[str]:
    """What decoding did to read less; [] where it did nothing."""
    if result.policy == "dense":
        return []
    parts = [
        f"policy {result.policy}: {result.density:.1%} of the feed-forward bytes",
        f"{result.bytes_per_token / 1e6:.1f} MB a token in all",
    ]
    if result.predicted_kl:  # exact loses nothing, and need not say so
        parts.append(f"KL {result.predicted_kl:.3g} predicted")
    if result.coverage is not None:
        settled = "" if result.stable else ", not settled"
        parts.append(f"the core holds {result.coverage:.1%} of the prompt's score{settled}")
    if result.drafted_tokens:
        parts.append(f"{result.accepted_tokens} of {result.drafted_tokens} drafts accepted")
    if result.refreshes:
        parts.append(f"{result.refreshes} refreshes")
    if result.fallbacks:
        parts.append("went on densely")
    return parts


def check_json_file(path: Path | None) -> None:
    """Before the minutes that a report takes. Raises ConfigError."""
    check_folder("--json", path)


def check_folder(flag: str, path: Path | None) -> None:
    """Of a file that `flag` asks for. Raises ConfigError."""
    if path is not None and not path.resolve().parent.is_dir():
        raise ConfigError(f"the folder of {flag} {path} does not exist")


def write_json(path: Path | None, report: object) -> None:
    """What a command measured, where --json asked for it."""
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")
        err.print(f"report written to {path}")
