"""What a report says of each system, as JSON, as points of a picture and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparserve.bench.quality_points import OURS, Point, Points
from sparserve.bench.report_tiers import FEATURES, Row, Tier, tiers_of


@dataclass(frozen=True, slots=True)
class Report:
    version: str
    time: str
    machine: str
    threads: int
    cpus_used_by_others: float  # on average while speed was measured; see `machine.CpuWatch`
    command: str
    model: str
    model_hash: str  # of its files
    text: str  # the file's name
    text_hash: str
    windows: int
    prompt_tokens: int  # of a window
    decode_tokens: int  # that are scored
    baseline: str  # the label of a row
    tiers: Sequence[float]
    rows: Sequence[Row]

    def as_json(self) -> dict[str, Any]:
        tiers = [tier.as_json() for tier in tiers_of(self.rows, self.tiers)]
        return {**asdict(self), "tiers": tiers}


def points_of(report: Report) -> Points:
    points = [
        Point(
            system=row.system,
            weights=row.recipe or row.format,
            policy=row.policy,
            label=row.label,
            kl=row.kl,
            kl_low=row.kl_low,
            kl_high=row.kl_high,
            speed=row.tokens_per_second,
            speed_low=row.tokens_per_second_low,
            speed_high=row.tokens_per_second_high,
            bits=row.bits_decoder,
            pruned=row.pruned,
            healed=row.healed,
        )
        for row in report.rows
    ]
    first = report.rows[0]
    return Points(points, (), report.model, first.batch, first.context)


def markdown(report: Report) -> str:
    """Tables of the systems, of what is fastest at each tier, and of what sparsity, pruning and healing bring there,
    with a line that says how it was measured."""
    tiers = tiers_of(report.rows, report.tiers)
    return "\n".join(
        [
            *_systems(report),
            "",
            _conditions(report),
            "",
            "| KL at most | fastest of sparserve | fastest peer | sparserve against the peer |",
            "|---:|---|---|---:|",
            *(f"| {tier.kl:g} | {_told(tier.ours, tier.peer, tier.ratio)} |" for tier in tiers),
            "",
            *_features(report, tiers),
            f"`{report.command}`",
            "",
        ]
    )


def _systems(report: Report) -> list[str]:
    columns: dict[str, Callable[[Row], str]] = {
        "bits per decoder weight": lambda row: f"{row.bits_decoder:.2f}",
        "bits per weight of the file": lambda row: f"{row.bits_file:.2f}",
        "pruned": lambda row: f"{row.pruned:.1%}" if row.pruned else "-",
        "healed through": lambda row: row.healed or "-",
        "KL, 95 % interval": lambda row: f"{row.kl:.2g} ({row.kl_low:.2g} to {row.kl_high:.2g})",
        "top-1": lambda row: f"{row.top1:.1%}",
        "perplexity": lambda row: f"{row.perplexity:.2f}",
        "tokens/s": lambda row: f"{row.tokens_per_second:.1f}",
        f"x {report.baseline}": lambda row: f"{row.ratio:.2f}x",
    }
    for name in ("pruned", "healed through"):
        if {columns[name](row) for row in report.rows} == {"-"}:
            del columns[name]
    lines = [
        f"| {_name(row)} | {' | '.join(told(row) for told in columns.values())} |"
        for row in report.rows
    ]
    head = f"| {report.model} | {' | '.join(columns)} |"
    return [head, "|---|" + len(columns) * "---:|", *lines]


def _name(row: Row) -> str:
    return row.label if row.system != OURS else f"{OURS} {row.label}"


def _conditions(report: Report) -> str:
    first = report.rows[0]
    what = "1 sequence" if first.batch == 1 else f"{first.batch} sequences"
    ceilings = [row.read_ceiling_gb_s for row in report.rows]
    bits = (
        " Bits are of a weight of the original." if any(row.pruned for row in report.rows) else ""
    )
    return (
        f"{report.machine}, {report.threads} threads; {what} after {first.context} tokens, {first.new_tokens} new "
        f"ones; medians of {len(first.rounds)} alternated rounds, ratios of each round's own; memory reads at "
        f"{min(ceilings):.0f} to {max(ceilings):.0f} GB/s, {report.cpus_used_by_others:.2f} CPUs used by others. "
        f"KL to the model in float32 over {report.windows} windows of {report.text}, "
        f"{report.prompt_tokens} + {report.decode_tokens} tokens.{bits}"
    )


def _features(report: Report, tiers: Sequence[Tier]) -> list[str]:
    """A table of those that some row of ours has; [] where none has any."""
    ours = [row for row in report.rows if row.system == OURS]
    lines = [
        f"| {tier.kl:g} | {name} | {_told(pair.without, pair.having, pair.ratio)} |"
        for name, has in FEATURES.items()
        if any(map(has, ours))
        for tier in tiers
        for pair in [tier.features[name]]
    ]
    if not lines:
        return []
    head = "| KL at most | what | fastest without it | fastest with it | with it against without |"
    return [head, "|---:|---|---|---|---:|", *lines, ""]


def _told(one: Row | None, other: Row | None, ratio: float | None) -> str:
    cells = [
        "-" if row is None else f"{row.label}, KL {row.kl:.2g}, {row.tokens_per_second:.1f} tokens/s"
        for row in (one, other)
    ]  # fmt: skip
    return " | ".join([*cells, "-" if ratio is None else f"{ratio:.2f}x"])
