"""Every metric the server exports, in one table; `docs/metrics.md` is generated from it.

Buckets are vLLM's, so that dashboards and alerts carry over.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PREFIX = "sparserve"

# fmt: off
TTFT_BUCKETS = (
    .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
ITL_BUCKETS = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_BUCKETS = (
    .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
# fmt: on
STEP_TOKEN_BUCKETS = tuple(2.0**i for i in range(15))


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric: its exported name is `sparserve_<name>`, with `_total` for counters."""

    attribute: str
    kind: type[Counter] | type[Gauge] | type[Histogram]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        return f"{PREFIX}_{self.name}" + ("_total" if self.kind is Counter else "")


TABLE = (
    Spec("prompt_tokens", Counter, "prompt_tokens", "Prompt tokens of accepted requests."),
    Spec("generation_tokens", Counter, "generation_tokens", "Tokens generated."),
    Spec("requests_finished", Counter, "requests_finished",
         "Requests that ended, by reason: stop_eos, stop_string, length, context, cancelled, deadline, error.",
         labels=("reason",)),
    Spec("requests_rejected", Counter, "requests_rejected",
         "Requests refused before they ran, by reason: invalid, queue_full, unavailable.", labels=("reason",)),
    Spec("running", Gauge, "num_requests_running", "Requests that hold KV blocks and are in the batch."),
    Spec("waiting", Gauge, "num_requests_waiting", "Requests that wait for a seat, new or preempted."),
    Spec("kv_blocks_used", Gauge, "kv_blocks_used", "KV cache blocks in use."),
    Spec("kv_blocks_total", Gauge, "kv_blocks", "KV cache blocks in all; usage is used / all."),
    Spec("preemptions", Counter, "num_preemptions", "Times that a request lost its KV blocks to an earlier one."),
    Spec("prefix_cache_queries", Counter, "prefix_cache_queries",
         "Prompt tokens looked for in the prefix cache, in whole blocks."),
    Spec("prefix_cache_hits", Counter, "prefix_cache_hits", "Prompt tokens found there."),
    Spec("step_failures", Counter, "engine_step_failures", "Engine steps that failed."),
    Spec("ttft", Histogram, "time_to_first_token_seconds", "Arrival to first token (TTFT).", buckets=TTFT_BUCKETS),
    Spec("itl", Histogram, "inter_token_latency_seconds", "Between two tokens of a request (ITL).",
         buckets=ITL_BUCKETS),
    Spec("e2e_latency", Histogram, "e2e_request_latency_seconds", "Arrival to the end of a request.",
         buckets=REQUEST_BUCKETS),
    Spec("queue_time", Histogram, "request_queue_time_seconds", "Arrival to first scheduled.",
         buckets=REQUEST_BUCKETS),
    Spec("step_time", Histogram, "engine_step_seconds", "One engine step: schedule, forward, sample.",
         buckets=ITL_BUCKETS),
    Spec("step_tokens", Histogram, "iteration_tokens", "Tokens in one engine step.", buckets=STEP_TOKEN_BUCKETS),
)  # fmt: skip


class Metrics:
    """The metrics of one server, in a registry of their own; one attribute per row of TABLE."""

    prompt_tokens: Counter
    generation_tokens: Counter
    requests_finished: Counter
    requests_rejected: Counter
    running: Gauge
    waiting: Gauge
    kv_blocks_used: Gauge
    kv_blocks_total: Gauge
    preemptions: Counter
    prefix_cache_queries: Counter
    prefix_cache_hits: Counter
    step_failures: Counter
    ttft: Histogram
    itl: Histogram
    e2e_latency: Histogram
    queue_time: Histogram
    step_time: Histogram
    step_tokens: Histogram

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for spec in TABLE:
            setattr(self, spec.attribute, _create(spec, self.registry))


def _create(spec: Spec, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    name = f"{PREFIX}_{spec.name}"
    if spec.kind is Histogram:
        return Histogram(name, spec.help, spec.labels, registry=registry, buckets=spec.buckets)
    return spec.kind(name, spec.help, spec.labels, registry=registry)
