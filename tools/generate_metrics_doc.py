"""Generate docs/metrics.md from the table in sparserve.metrics.

Usage: python tools/generate_metrics_doc.py [--check]

With --check nothing is written; exits 1 when the committed page differs.
"""

import sys
from pathlib import Path

from sparserve.metrics import TABLE

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"


def page() -> str:
    lines = [
        "# Metrics",
        "",
        "Served at `/metrics` on `--metrics-port`, in the Prometheus text format. Generated from",
        "`sparserve/metrics.py` by `python tools/generate_metrics_doc.py`; do not edit.",
        "",
        "| name | type | labels | what |",
        "|---|---|---|---|",
    ]
    for spec in TABLE:
        labels = ", ".join(spec.labels) or "none"
        lines.append(
            f"| `{spec.exported}` | {spec.kind.__name__.lower()} | {labels} | {spec.help} |"
        )
    lines += ["", "## Buckets", ""]
    for spec in TABLE:
        if spec.buckets:
            lines.append(
                f"- `{spec.exported}`: {' '.join(f'{bucket:g}' for bucket in spec.buckets)}"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        sys.exit("docs/metrics.md is stale; run python tools/generate_metrics_doc.py")


if __name__ == "__main__":
    main()
