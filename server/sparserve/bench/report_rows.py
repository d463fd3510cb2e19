"""What a report says of each system, and what follows from its rows: quality tiers and the Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparserve.bench.plot_quality import Point, Points
from sparserve.bench.rounds import median_ratio
from sparserve.bench.systems import DENSE_POLICY

OURS = "sparserve"


@dataclass(frozen=True, slots=True)
class Row:
    """One system, its speed and its quality measured alike."""

    system: str  # OURS, or a peer
    label: str  # of no other row
    format: str
    recipe: str | None  # that its weights were compressed by
    policy: str
    # Bits of a weight with its share of scales, zeros, low-rank factors and bases: of the layers' matrices, and of
    # all tensors of the model, where a tied LM head counts once.
    bits_decoder: float
    bits_file: float
    kl: float  # to the original in float32, nats per token; of the 95 % interval the ends
    kl_low: float
    kl_high: float
    top1: float
    perplexity: float
    density: float  # share of the feed-forward bytes that a token of the scored text read
    batch: int
    context: int  # prompt tokens
    new_tokens: int
    tokens_per_second: float  # of all sequences together; median, slowest and fastest round
    tokens_per_second_low: float
    tokens_per_second_high: float
    rounds: Sequence[float]  # tokens/s of each
    read_ceiling_gb_s: float
    percent_of_byte_bound: float
    ratio: float  # of its speed to the baseline's: median of the rounds' own


@dataclass(frozen=True, slots=True)
class Tier:
    """The fastest rows whose KL is at most `kl`; None where there is none."""

    kl: float
    ours: Row | None
    dense: Row | None  # of ours
    peer: Row | None
    ratio: float | None  # our speed over the peer's: median of the rounds' own

    def as_json(self) -> dict[str, Any]:
        rows = {"ours": self.ours, "dense": self.dense, "peer": self.peer}
        labels = {name: None if row is None else row.label for name, row in rows.items()}
        return {"kl": self.kl, **labels, "ratio": self.ratio}


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


def tiers_of(rows: Sequence[Row], limits: Iterable[float]) -> list[Tier]:
    return [_tier(rows, limit) for limit in limits]


def _tier(rows: Sequence[Row], limit: float) -> Tier:
    within = [row for row in rows if row.kl <= limit]
    ours = [row for row in within if row.system == OURS]
    best = _fastest(ours)
    dense = _fastest([row for row in ours if row.policy == DENSE_POLICY])
    peer = _fastest([row for row in within if row.system != OURS])
    ratio = None if best is None or peer is None else median_ratio(best.rounds, peer.rounds)
    return Tier(limit, best, dense, peer, ratio)


def _fastest(rows: Sequence[Row]) -> Row | None:
    return max(rows, key=lambda row: row.tokens_per_second, default=None)


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
        )
        for row in report.rows
    ]
    first = report.rows[0]
    return Points(points, (), report.model, first.batch, first.context)


def markdown(report: Report) -> str:
    """Two tables, of the systems and of the tiers, each with a line that says how it was measured."""
    first = report.rows[0]
    what = "1 sequence" if first.batch == 1 else f"{first.batch} sequences"
    ceilings = [row.read_ceiling_gb_s for row in report.rows]
    head = (
        f"| {report.model} | bits per decoder weight | bits per weight of the file | KL, 95 % interval | top-1 | "
        f"perplexity | tokens/s | x {report.baseline} |"
    )
    return "\n".join(
        [
            head,
            "|---|" + 7 * "---:|",
            *(_line(row) for row in report.rows),
            "",
            f"{report.machine}, {report.threads} threads; {what} after {first.context} tokens, {first.new_tokens} new "
            f"ones; medians of {len(first.rounds)} alternated rounds, ratios of each round's own; memory reads at "
            f"{min(ceilings):.0f} to {max(ceilings):.0f} GB/s, {report.cpus_used_by_others:.2f} CPUs used by others. "
            f"KL to the model in float32 over {report.windows} windows of {report.text}, "
            f"{report.prompt_tokens} + {report.decode_tokens} tokens.",
            "",
            "| KL at most | fastest of sparserve | fastest dense | fastest peer | sparserve against the peer |",
            "|---:|---|---|---|---:|",
            *(_tier_line(tier) for tier in tiers_of(report.rows, report.tiers)),
            "",
            f"`{report.command}`",
            "",
        ]
    )


def _line(row: Row) -> str:
    name = row.label if row.system != OURS else f"{OURS} {row.label}"
    return (
        f"| {name} | {row.bits_decoder:.2f} | {row.bits_file:.2f} | {row.kl:.2g} ({row.kl_low:.2g} to {row.kl_high:.2g}) "
        f"| {row.top1:.1%} | {row.perplexity:.2f} | {row.tokens_per_second:.1f} | {row.ratio:.2f}x |"
    )


def _tier_line(tier: Tier) -> str:
    cells = [
        "-"
        if row is None
        else f"{row.label}, KL {row.kl:.2g}, {row.tokens_per_second:.1f} tokens/s"
        for row in (tier.ours, tier.dense, tier.peer)
    ]
    ratio = "-" if tier.ratio is None else f"{tier.ratio:.2f}x"
    return f"| {tier.kl:g} | {' | '.join(cells)} | {ratio} |"
