"""Generate docs/metrics.md from the table in sparserve.metrics.

Usage: python tools/generate_metrics_doc.py [--check]

With --check nothing is written; exits 1 when the committed page differs.
"""

import sys
from pathlib import Path

from sparserve.metrics import TABLE, TOKEN_BUCKETS, VLLM_FINISHED_REASONS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"


def page() -> str:
    lines = [
        "# Metrics",
        "",
        "Served at `/metrics` on `--metrics-port`, in the Prometheus text format. Generated from",
        "`sparserve/metrics.py` by `python tools/generate_metrics_doc.py`; do not edit.",
        "",
        "Every series carries the label `model_name`; a further one stands beside the type, with its values.",
        "",
        "| name | type | what |",
        "|---|---|---|",
    ]
    for spec in TABLE:
        kind = spec.kind.__name__.lower()
        if spec.label:
            kind += f" by `{spec.label}`: {', '.join(spec.values) or 'the name of an API key'}"
        lines.append(f"| `{spec.exported}` | {kind} | {spec.help} |")
    lines += [
        "",
        "## vLLM's names",
        "",
        "With `--metrics-compat vllm` the numbers below stand under vLLM's names as well, with the labels",
        '`model_name` and `engine="0"`, so that its Grafana dashboards, KEDA recipes and the Kubernetes',
        "inference gateway's endpoint picker work unchanged. Our own names stay.",
        "",
        "| vLLM's name | from |",
        "|---|---|",
    ]
    for spec in TABLE:
        if spec.vllm:
            lines.append(f"| `{spec.exported_vllm}` | `{spec.exported}` |")
    lines += ["", "`finished_reason` sums our reasons:", ""]
    for reason in dict.fromkeys(VLLM_FINISHED_REASONS.values()):
        ours = (name for name, theirs in VLLM_FINISHED_REASONS.items() if theirs == reason)
        lines.append(f"- `{reason}`: {', '.join(ours)}")
    lines += ["", "## Buckets", ""]
    for spec in TABLE:
        if spec.buckets is TOKEN_BUCKETS:
            lines.append(f"- `{spec.exported}`: 1 2 5 10 20 50 … up to the longest context")
        elif spec.buckets:
            shown = " ".join(f"{bucket:g}" for bucket in spec.buckets)
            lines.append(f"- `{spec.exported}`: {shown}")
    return "\n".join(lines) + "\n"


def main() -> None:
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        sys.exit("docs/metrics.md is stale; run python tools/generate_metrics_doc.py")


if __name__ == "__main__":
    main()
