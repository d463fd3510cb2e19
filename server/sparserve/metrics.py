"""Every metric the server exports, in one table; `docs/metrics.md` is generated from it.

Names after the prefix and buckets are vLLM's (`vllm/v1/metrics/loggers.py`), so that dashboards and
alerts carry over; with `metrics_compat` the same numbers stand under vLLM's own names as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

PREFIX = "sparserve"

# When each series began, beside each: twice the samples, and no dashboard reads them.
disable_created_metrics()  # type: ignore[no-untyped-call]

# fmt: off
TTFT_BUCKETS = (
    .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
ITL_BUCKETS = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_BUCKETS = (
    .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
# fmt: on
STEP_TOKEN_BUCKETS = (1.0, *(2.0**i for i in range(3, 15)))
SHARE_BUCKETS = tuple(i / 20 for i in range(1, 21))
CHOICE_BUCKETS = (1, 2, 5, 10, 20)
# A server keeps those up to its longest context.
TOKEN_BUCKETS = tuple(float(digit * 10**power) for power in range(8) for digit in (1, 2, 5))

# Our reasons, each with the one that vLLM tells: where ours are finer, its count is their sum.
VLLM_FINISHED_REASONS = {
    "stop_eos": "stop",
    "stop_token": "stop",
    "stop_string": "stop",
    "length": "length",
    "context": "length",
    "cancelled": "abort",
    "deadline": "abort",
    "invalid": "abort",  # found only while it ran: a constraint that its other options exclude
    "error": "error",
}


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric: its exported name is `sparserve_<name>`, with `_total` for counters.

    `values` are those that `label` can have; all are shown from the start, so that rates begin at zero. None: it
    has the names of API keys, see `Metrics.set_keys`.
    """

    attribute: str
    kind: type[Counter] | type[Gauge] | type[Histogram]
    name: str
    help: str
    label: str = ""
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    vllm: str = ""  # vLLM's name for it, without prefix and `_total`

    @property
    def suffix(self) -> str:
        return "_total" if self.kind is Counter else ""

    @property
    def exported(self) -> str:
        return f"{PREFIX}_{self.name}{self.suffix}"

    @property
    def exported_vllm(self) -> str:
        return f"vllm:{self.vllm}{self.suffix}" if self.vllm else ""


TABLE = (
    Spec("running", Gauge, "num_requests_running", "Requests that hold KV blocks and are in the batch.",
         vllm="num_requests_running"),
    Spec("waiting", Gauge, "num_requests_waiting", "Requests that wait for a seat, new or preempted.",
         vllm="num_requests_waiting"),
    Spec("kv_usage", Gauge, "kv_cache_usage_perc", "Share of the KV cache blocks in use; 1 is all of them.",
         vllm="kv_cache_usage_perc"),
    Spec("kv_blocks_used", Gauge, "kv_blocks_used", "KV cache blocks in use."),
    Spec("kv_blocks_total", Gauge, "kv_blocks", "KV cache blocks in all."),
    Spec("preemptions", Counter, "num_preemptions", "Times that a request lost its KV blocks to an earlier one.",
         vllm="num_preemptions"),
    Spec("prompt_tokens", Counter, "prompt_tokens", "Prompt tokens of accepted requests.", vllm="prompt_tokens"),
    Spec("prompt_tokens_cached", Counter, "prompt_tokens_cached",
         "Prompt tokens whose KV was there already, once a request.", vllm="prompt_tokens_cached"),
    Spec("generation_tokens", Counter, "generation_tokens", "Tokens generated.", vllm="generation_tokens"),
    Spec("requests_finished", Counter, "requests_finished", "Choices of requests that ended, by reason.",
         label="reason", values=tuple(VLLM_FINISHED_REASONS), vllm="request_success"),
    Spec("requests_rejected", Counter, "requests_rejected", "Requests refused before they ran, by reason.",
         label="reason", values=("invalid", "queue_full", "unavailable")),
    Spec("prefix_cache_queries", Counter, "prefix_cache_queries",
         "Prompt tokens looked for in the prefix cache, in whole blocks.", vllm="prefix_cache_queries"),
    Spec("prefix_cache_hits", Counter, "prefix_cache_hits", "Prompt tokens found there.", vllm="prefix_cache_hits"),
    Spec("step_failures", Counter, "engine_step_failures", "Engine steps that failed."),
    Spec("slow_readers", Counter, "slow_readers_ended", "Streams ended because their reader fell too far behind."),
    Spec("ttft", Histogram, "time_to_first_token_seconds", "Arrival to first token (TTFT).", buckets=TTFT_BUCKETS,
         vllm="time_to_first_token_seconds"),
    Spec("itl", Histogram, "inter_token_latency_seconds", "Between two tokens of a choice (ITL).",
         buckets=ITL_BUCKETS, vllm="inter_token_latency_seconds"),
    Spec("tpot", Histogram, "request_time_per_output_token_seconds",
         "First to last token of a choice, per token after the first (TPOT).", buckets=ITL_BUCKETS,
         vllm="request_time_per_output_token_seconds"),
    Spec("e2e_latency", Histogram, "e2e_request_latency_seconds", "Arrival to the end of a choice.",
         buckets=REQUEST_BUCKETS, vllm="e2e_request_latency_seconds"),
    Spec("queue_time", Histogram, "request_queue_time_seconds", "Arrival to first scheduled, once a request.",
         buckets=REQUEST_BUCKETS, vllm="request_queue_time_seconds"),
    Spec("inference_time", Histogram, "request_inference_time_seconds", "First scheduled to last token of a choice.",
         buckets=REQUEST_BUCKETS, vllm="request_inference_time_seconds"),
    Spec("prefill_time", Histogram, "request_prefill_time_seconds", "First scheduled to first token of a choice.",
         buckets=REQUEST_BUCKETS, vllm="request_prefill_time_seconds"),
    Spec("decode_time", Histogram, "request_decode_time_seconds", "First to last token of a choice.",
         buckets=REQUEST_BUCKETS, vllm="request_decode_time_seconds"),
    Spec("step_time", Histogram, "engine_step_seconds", "One engine step: schedule, forward, sample.",
         buckets=ITL_BUCKETS),
    Spec("step_tokens", Histogram, "iteration_tokens_total", "Tokens in one engine step.",
         buckets=STEP_TOKEN_BUCKETS, vllm="iteration_tokens_total"),
    Spec("params_n", Histogram, "request_params_n", "Choices asked for, once a request.", buckets=CHOICE_BUCKETS,
         vllm="request_params_n"),
    Spec("params_max_tokens", Histogram, "request_params_max_tokens",
         "New tokens allowed, asked for or by default, once a request.", buckets=TOKEN_BUCKETS,
         vllm="request_params_max_tokens"),
    Spec("request_prompt_tokens", Histogram, "request_prompt_tokens", "Prompt tokens, once a request.",
         buckets=TOKEN_BUCKETS, vllm="request_prompt_tokens"),
    Spec("request_generation_tokens", Histogram, "request_generation_tokens", "Tokens generated in a choice.",
         buckets=TOKEN_BUCKETS, vllm="request_generation_tokens"),
    Spec("request_longest", Histogram, "request_max_num_generation_tokens",
         "Tokens generated in a request's longest choice.", buckets=TOKEN_BUCKETS,
         vllm="request_max_num_generation_tokens"),
    Spec("request_prefill_computed", Histogram, "request_prefill_kv_computed_tokens",
         "Prompt tokens whose KV was computed, not found in the prefix cache, once a request.",
         buckets=TOKEN_BUCKETS, vllm="request_prefill_kv_computed_tokens"),
    Spec("constraint_compilation", Histogram, "constraint_compilation_seconds",
         "Compiling a constraint of structured output, by kind; those found compiled are not counted.",
         label="kind", values=("json_schema", "regex", "grammar", "choice", "json_object"), buckets=TTFT_BUCKETS),
    Spec("policies", Counter, "requests_by_policy", "Choices of requests that ended, by the policy that served them.",
         label="policy", values=("dense", "core", "token", "exact")),
    Spec("density", Histogram, "decode_density",
         "Share of the feed-forward layers' bytes read per decoded token, over a choice whose policy is not dense.",
         buckets=SHARE_BUCKETS),
    Spec("coverage", Histogram, "core_coverage",
         "Share of a prompt's score that its core holds, once a choice with a core.", buckets=SHARE_BUCKETS),
    Spec("union_share", Histogram, "decode_union",
         "Share of the neurons that a decode step's sequences use together, where one of them chooses.",
         buckets=SHARE_BUCKETS),
    Spec("refreshes", Counter, "refreshes", "Dense passes over tokens decoded before."),
    Spec("drafted_tokens", Counter, "spec_decode_num_draft_tokens", "Tokens drafted and verified, policy exact.",
         vllm="spec_decode_num_draft_tokens"),
    Spec("accepted_tokens", Counter, "spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.",
         vllm="spec_decode_num_accepted_tokens"),
    Spec("fallbacks", Counter, "sparsity_fallbacks",
         "Choices that drifted away from their core and went on densely."),
    Spec("head_rows", Counter, "lm_head_rows",
         "With lm_head_dtype int4+exact, tokens chosen, by how the LM head was computed: scan, only what mattered; "
         "widened, all of it after a scan; whole, all of it because a request of the step needs it, or all of them too many tokens.",
         label="kind", values=("scan", "widened", "whole")),
    Spec("head_rescored", Counter, "lm_head_rescored",
         "With lm_head_dtype int4+exact, logits computed from the exact LM head for tokens of kind scan."),
    Spec("tls_expiry", Gauge, "tls_certificate_expiry_timestamp_seconds",
         "When the TLS certificate in use expires, in seconds since 1970; 0 without TLS."),
    Spec("tls_reloads", Counter, "tls_certificate_reloads",
         "Changes of the TLS files, by outcome: ok, in use; failed, the former certificate stays.",
         label="outcome", values=("ok", "failed")),
    Spec("key_reloads", Counter, "api_key_reloads",
         "Changes of the file of API keys, by outcome: ok, in use; failed, the former keys stay.",
         label="outcome", values=("ok", "failed")),
    Spec("auth_refusals", Counter, "auth_refusals",
         "Calls refused: key, without a key that is known; permission, with one that is not for the call.",
         label="reason", values=("key", "permission")),
    Spec("api_key_calls", Counter, "api_key_calls", "Calls made with each API key.", label="key"),
    Spec("api_key_limited", Counter, "api_key_limited", "Calls refused by a limit of their API key.", label="key"),
    Spec("api_key_tokens", Counter, "api_key_tokens", "Prompt and new tokens of each API key.", label="key"),
)  # fmt: skip


class Metrics:
    """The metrics of one server, one attribute per row of TABLE, and what to tell them when.

    They live in `registry` without the labels that are the same for all; `exposition` adds those.
    """

    running: Gauge
    waiting: Gauge
    kv_usage: Gauge
    kv_blocks_used: Gauge
    kv_blocks_total: Gauge
    preemptions: Counter
    prompt_tokens: Counter
    prompt_tokens_cached: Counter
    generation_tokens: Counter
    requests_finished: Counter
    requests_rejected: Counter
    prefix_cache_queries: Counter
    prefix_cache_hits: Counter
    step_failures: Counter
    slow_readers: Counter
    ttft: Histogram
    itl: Histogram
    tpot: Histogram
    e2e_latency: Histogram
    queue_time: Histogram
    inference_time: Histogram
    prefill_time: Histogram
    decode_time: Histogram
    step_time: Histogram
    step_tokens: Histogram
    params_n: Histogram
    params_max_tokens: Histogram
    request_prompt_tokens: Histogram
    request_generation_tokens: Histogram
    request_longest: Histogram
    request_prefill_computed: Histogram
    constraint_compilation: Histogram
    policies: Counter
    density: Histogram
    coverage: Histogram
    union_share: Histogram
    refreshes: Counter
    drafted_tokens: Counter
    accepted_tokens: Counter
    fallbacks: Counter
    head_rows: Counter
    head_rescored: Counter
    tls_expiry: Gauge
    tls_reloads: Counter
    key_reloads: Counter
    auth_refusals: Counter
    api_key_calls: Counter
    api_key_limited: Counter
    api_key_tokens: Counter

    def __init__(self, model_name: str, max_context: int) -> None:
        self.model_name = model_name
        self.registry = CollectorRegistry()
        self._keys: frozenset[str] = frozenset()
        for spec in TABLE:
            setattr(self, spec.attribute, _create(spec, self.registry, max_context))

    def exposition(self, *, vllm: bool = False) -> CollectorRegistry:
        """What a scrape gets: every metric under `model_name`, with `vllm` under vLLM's names too."""
        registry = CollectorRegistry(auto_describe=True)  # so that ?name[]= selects
        registry.register(_Exposition(self, vllm))
        return registry

    def watch_engine(
        self,
        *,
        num_blocks: int,
        num_running: Callable[[], int],
        num_waiting: Callable[[], int],
        used_blocks: Callable[[], int],
    ) -> None:
        """The gauges ask at every scrape, on its thread. Blocks kept only for the prefix cache are free."""
        self.kv_blocks_total.set(num_blocks)
        self.kv_blocks_used.set_function(used_blocks)
        self.kv_usage.set_function(lambda: used_blocks() / num_blocks)
        self.running.set_function(num_running)
        self.waiting.set_function(num_waiting)

    def set_keys(self, names: Iterable[str]) -> None:
        """The API keys that have series: those of the server's file, so never more than it may hold."""
        names = frozenset(names)
        for metric in (self.api_key_calls, self.api_key_limited, self.api_key_tokens):
            for name in self._keys - names:
                metric.remove(name)
            for name in names:
                metric.labels(key=name)
        self._keys = names

    def observe_scheduled(self, *, queue_seconds: float, cached_tokens: int) -> None:
        """Once a request, when it is scheduled for the first time; `cached_tokens` of its prompt had KV."""
        self.queue_time.observe(queue_seconds)
        self.prompt_tokens_cached.inc(cached_tokens)

    def observe_first_token(self, seconds: float) -> None:
        """A choice's first token, so long after the request's arrival."""
        self.generation_tokens.inc()
        self.ttft.observe(seconds)

    def observe_next_token(self, seconds: float) -> None:
        """Any later token, so long after the one before it in its choice."""
        self.generation_tokens.inc()
        self.itl.observe(seconds)

    def observe_finish(
        self,
        reason: str,
        *,
        e2e_seconds: float,
        prefill_seconds: float,
        decode_seconds: float,
        completion_tokens: int,
    ) -> None:
        """The end of a choice. Its phases count only where it got a token, so was through with prefill."""
        self.requests_finished.labels(reason=reason).inc()
        self.e2e_latency.observe(e2e_seconds)
        self.request_generation_tokens.observe(completion_tokens)
        if completion_tokens:
            self.prefill_time.observe(prefill_seconds)
            self.decode_time.observe(decode_seconds)
            self.inference_time.observe(prefill_seconds + decode_seconds)
        if completion_tokens > 1:
            self.tpot.observe(decode_seconds / (completion_tokens - 1))

    def observe_request(
        self, *, n: int, max_tokens: int, prompt_tokens: int, cached_tokens: int, longest: int
    ) -> None:
        """The end of a request, with its last choice; `longest` is the most tokens in one choice."""
        self.params_n.observe(n)
        self.params_max_tokens.observe(max_tokens)
        self.request_prompt_tokens.observe(prompt_tokens)
        self.request_longest.observe(longest)
        if longest:
            self.request_prefill_computed.observe(prompt_tokens - cached_tokens)

    def observe_sparsity(
        self,
        policy: str,
        *,
        density: float | None,
        coverage: float | None,
        refreshes: int,
        drafted: int,
        accepted: int,
        fallbacks: int,
    ) -> None:
        """The end of a choice; `density` None: it decoded nothing, `coverage` None: it had no core."""
        self.policies.labels(policy=policy).inc()
        if policy != "dense" and density is not None:
            self.density.observe(density)
        if coverage is not None:
            self.coverage.observe(coverage)
        self.refreshes.inc(refreshes)
        self.drafted_tokens.inc(drafted)
        self.accepted_tokens.inc(accepted)
        self.fallbacks.inc(fallbacks)

    def observe_head(self, *, scanned: int, widened: int, whole: int, rescored: int) -> None:
        """One forward of an LM head with a scan: tokens by how they were computed, and `rescored` logits."""
        for kind, tokens in (("scan", scanned), ("widened", widened), ("whole", whole)):
            self.head_rows.labels(kind=kind).inc(tokens)
        self.head_rescored.inc(rescored)

    def observe_step(
        self,
        *,
        seconds: float,
        tokens: int,
        preempted: int,
        prefix_queries: int,
        prefix_hits: int,
    ) -> None:
        """One engine step, in which tokens of prompts were looked for in the prefix cache and found.

        One that ran no tokens only waited: its time says nothing.
        """
        if preempted:
            self.preemptions.inc(preempted)
        if prefix_queries:
            self.prefix_cache_queries.inc(prefix_queries)
            self.prefix_cache_hits.inc(prefix_hits)
        if tokens:
            self.step_time.observe(seconds)
            self.step_tokens.observe(tokens)


class _Exposition(Collector):
    def __init__(self, metrics: Metrics, vllm: bool) -> None:
        self._metrics = metrics
        self._vllm = vllm
        self._specs = {f"{PREFIX}_{spec.name}": spec for spec in TABLE}

    def collect(self) -> Iterator[Metric]:
        model = {"model_name": self._metrics.model_name}
        for metric in self._metrics.registry.collect():
            yield _renamed(metric, metric.name, lambda labels: {**model, **labels})
            spec = self._specs[metric.name]
            if self._vllm and spec.vllm:
                yield _renamed(
                    metric,
                    f"vllm:{spec.vllm}",
                    lambda labels: {**model, "engine": "0", **_vllm_labels(labels)},
                )


def _vllm_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    if "reason" not in labels:
        return labels
    return {"finished_reason": VLLM_FINISHED_REASONS[labels["reason"]]}


def _renamed(
    metric: Metric, name: str, relabel: Callable[[Mapping[str, str]], dict[str, str]]
) -> Metric:
    """The metric's numbers under another name; samples that end up with equal labels are summed."""
    samples: dict[tuple[str, ...], Sample] = {}
    for sample in metric.samples:
        labels = relabel(sample.labels)
        key = (sample.name, *labels.values())
        before = samples[key].value if key in samples else 0
        exported = name + sample.name.removeprefix(metric.name)
        samples[key] = Sample(exported, labels, before + sample.value)
    renamed = Metric(name, metric.documentation, metric.type)
    renamed.samples = list(samples.values())
    return renamed


def _create(
    spec: Spec, registry: CollectorRegistry, max_context: int
) -> Counter | Gauge | Histogram:
    name, labels = f"{PREFIX}_{spec.name}", (spec.label,) if spec.label else ()
    metric: Counter | Gauge | Histogram
    if spec.kind is Histogram:
        buckets = spec.buckets
        if buckets is TOKEN_BUCKETS:
            buckets = tuple(bucket for bucket in buckets if bucket <= max_context)
        metric = Histogram(name, spec.help, labels, registry=registry, buckets=buckets)
    else:
        metric = spec.kind(name, spec.help, labels, registry=registry)
    for value in spec.values:
        metric.labels(value)
    return metric
