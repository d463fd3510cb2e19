"""Options of the commands that generate: which neurons decoding reads."""

from __future__ import annotations

from typing import Annotated

import typer

_PANEL = "Sparsity"
_DEFAULT = "Default: the server's."

Policy = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="dense: all neurons; core: those that the prompt used most; token: chosen for each token; exact: sparse "
        f"drafts, verified densely; auto: what is cheapest. token and auto need an index. {_DEFAULT}",
    ),
]
Density = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help=f"Share of the feed-forward layers' bytes that a token reads, up to 1. {_DEFAULT}",
    ),
]
TargetKl = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="In place of --density: mean KL to the dense model, nats per token, that is acceptable.",
    ),
]
ChooseBy = Annotated[
    str | None,
    typer.Option(rich_help_panel=_PANEL, help="With policy token: planes or gate."),
]
CoreDensity = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="With policy token: choose inside a core with this share of neurons.",
    ),
]
Predictor = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="Of a core: stability, the prompt alone; similarity, prompts of the calibration that are like it; "
        "auto, both.",
    ),
]
Score = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="What counts of the prompt's activations: norm, count or signed_count.",
    ),
]
RefreshInterval = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_PANEL, help="A dense pass over the last tokens every so many; 0: never."
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(rich_help_panel=_PANEL, help="With policy exact: ngram, core or token."),
]
DraftTokens = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_PANEL, help="With policy exact: tokens drafted before a verification."
    ),
]
