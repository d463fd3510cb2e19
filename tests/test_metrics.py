"""What a scrape shows of the numbers told, under our names and under vLLM's."""

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sparserve.engine.constraint import ConstraintKind
from sparserve.engine.request import FinishReason
from sparserve.metrics import PREFIX, TABLE, Metrics

MAX_CONTEXT = 2048

LATENCY = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]  # fmt: skip
PER_TOKEN = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]  # fmt: skip
TOKENS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]
# vLLM 0.21, vllm/v1/metrics/loggers.py: what it exports that has a meaning here.
VLLM_GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}
VLLM_COUNTERS = {
    "num_preemptions", "prompt_tokens", "prompt_tokens_cached", "generation_tokens",
    "request_success", "prefix_cache_queries", "prefix_cache_hits", "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
}  # fmt: skip
VLLM_HISTOGRAMS = {
    "time_to_first_token_seconds": [
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
        160, 640, 2560,
    ],
    "inter_token_latency_seconds": PER_TOKEN,
    "request_time_per_output_token_seconds": PER_TOKEN,
    "e2e_request_latency_seconds": LATENCY,
    "request_queue_time_seconds": LATENCY,
    "request_inference_time_seconds": LATENCY,
    "request_prefill_time_seconds": LATENCY,
    "request_decode_time_seconds": LATENCY,
    "iteration_tokens_total": [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384],
    "request_params_n": [1, 2, 5, 10, 20],
    "request_params_max_tokens": TOKENS,
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "request_max_num_generation_tokens": TOKENS,
    "request_prefill_kv_computed_tokens": TOKENS,
}  # fmt: skip


@pytest.fixture
def metrics():
    return Metrics("some/model", MAX_CONTEXT)


def scrape(metrics, **options):
    """-> families by name."""
    text = generate_latest(metrics.exposition(**options)).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(metrics, **options):
    """-> value of every sample by its name and, after a slash, the labels that differ."""
    return {
        "/".join(
            [s.name, *(v for k, v in s.labels.items() if k not in ("model_name", "engine"))]
        ): s.value
        for family in scrape(metrics, **options).values()
        for s in family.samples
        if s.value
    }


def test_every_vllm_metric_is_there_under_its_name_type_labels_and_buckets(metrics):
    families = {
        name.removeprefix("vllm:"): family
        for name, family in scrape(metrics, vllm=True).items()
        if name.startswith("vllm:")
    }
    kinds = {name: family.type for name, family in families.items()}
    assert kinds == {
        **dict.fromkeys(VLLM_GAUGES, "gauge"),
        **dict.fromkeys(VLLM_COUNTERS, "counter"),
        **dict.fromkeys(VLLM_HISTOGRAMS, "histogram"),
    }
    own = {"finished_reason", "le"}
    for family in families.values():
        for sample in family.samples:
            shared = {k: v for k, v in sample.labels.items() if k not in own}
            assert shared == {"model_name": "some/model", "engine": "0"}
    for name, buckets in VLLM_HISTOGRAMS.items():
        ends = [s.labels["le"] for s in families[name].samples if s.name.endswith("_bucket")]
        assert [float(end) for end in ends] == [*buckets, float("inf")]
    for name in VLLM_COUNTERS:
        assert {s.name for s in families[name].samples} == {f"vllm:{name}_total"}
    reasons = [s.labels["finished_reason"] for s in families["request_success"].samples]
    assert sorted(reasons) == ["abort", "error", "length", "stop"]


def test_our_names_stay_beside_vllms_and_stand_alone_without(metrics):
    ours = {f"{PREFIX}_{spec.name}" for spec in TABLE}
    assert set(scrape(metrics)) == ours
    both = scrape(metrics, vllm=True)
    assert {name for name in both if not name.startswith("vllm:")} == ours
    for name in ours:
        for sample in both[name].samples:
            assert sample.labels["model_name"] == "some/model"
            assert not sample.name.endswith("_created")


def test_vllms_numbers_are_ours(metrics):
    metrics.watch_engine(
        num_blocks=8, num_running=lambda: 3, num_waiting=lambda: 2, used_blocks=lambda: 6
    )
    metrics.prompt_tokens.inc(40)
    metrics.observe_scheduled(queue_seconds=0.4, cached_tokens=16)
    metrics.observe_first_token(0.7)
    metrics.observe_next_token(0.3)
    metrics.observe_next_token(0.03)
    metrics.observe_step(seconds=0.1, tokens=24, preempted=2, prefix_queries=32, prefix_hits=17)
    metrics.observe_finish(
        "length", e2e_seconds=1.1, prefill_seconds=0.3, decode_seconds=0.33, completion_tokens=3
    )
    metrics.observe_request(n=2, max_tokens=3, prompt_tokens=40, cached_tokens=16, longest=3)
    metrics.observe_sparsity(
        "exact", density=1.2, coverage=None, refreshes=0, drafted=7, accepted=5, fallbacks=0
    )
    seen = values(metrics, vllm=True)
    sums = {
        "time_to_first_token_seconds": 0.7, "inter_token_latency_seconds": 0.33,
        "request_time_per_output_token_seconds": 0.165, "e2e_request_latency_seconds": 1.1,
        "request_queue_time_seconds": 0.4, "request_inference_time_seconds": 0.63,
        "request_prefill_time_seconds": 0.3, "request_decode_time_seconds": 0.33,
        "iteration_tokens_total": 24, "request_params_n": 2, "request_params_max_tokens": 3,
        "request_prompt_tokens": 40, "request_generation_tokens": 3,
        "request_max_num_generation_tokens": 3, "request_prefill_kv_computed_tokens": 24,
    }  # fmt: skip
    assert set(sums) == set(VLLM_HISTOGRAMS)
    expected = {
        **{f"{name}_sum": total for name, total in sums.items()},
        "num_requests_running": 3, "num_requests_waiting": 2, "kv_cache_usage_perc": 0.75,
        "num_preemptions_total": 2, "prompt_tokens_total": 40, "prompt_tokens_cached_total": 16,
        "generation_tokens_total": 3, "prefix_cache_queries_total": 32, "prefix_cache_hits_total": 17,
        "spec_decode_num_draft_tokens_total": 7, "spec_decode_num_accepted_tokens_total": 5,
    }  # fmt: skip
    for name, value in expected.items():
        assert seen[f"vllm:{name}"] == pytest.approx(value), name
        assert seen[f"sparserve_{name}"] == pytest.approx(value), name
    assert seen["vllm:request_success_total/length"] == 1
    assert seen["vllm:inter_token_latency_seconds_count"] == 2
    assert seen["vllm:inter_token_latency_seconds_bucket/0.05"] == 1
    assert seen["sparserve_kv_blocks"] == 8
    assert seen["sparserve_kv_blocks_used"] == 6


def test_each_of_our_reasons_counts_under_one_of_vllms(metrics):
    for count, reason in enumerate(FinishReason, 1):
        for _ in range(count):
            metrics.observe_finish(
                reason.value, e2e_seconds=1, prefill_seconds=0, decode_seconds=0, completion_tokens=0
            )  # fmt: skip
    seen = values(metrics, vllm=True)
    counts = {reason: count for count, reason in enumerate(FinishReason, 1)}
    for reason, count in counts.items():
        assert seen[f"sparserve_requests_finished_total/{reason.value}"] == count
    groups = {
        "stop": (FinishReason.STOP_EOS, FinishReason.STOP_TOKEN, FinishReason.STOP_STRING),
        "length": (FinishReason.LENGTH, FinishReason.CONTEXT),
        "abort": (FinishReason.CANCELLED, FinishReason.DEADLINE),
        "error": (FinishReason.ERROR,),
    }
    for theirs, ours in groups.items():
        assert seen[f"vllm:request_success_total/{theirs}"] == sum(counts[r] for r in ours)


def test_every_series_starts_at_zero_so_that_its_first_event_is_a_rate(metrics):
    families = scrape(metrics)

    def label_values(name, label):
        return {s.labels[label] for s in families[name].samples}

    finished = label_values("sparserve_requests_finished", "reason")
    assert finished == {*(reason.value for reason in FinishReason), "invalid"}
    kinds = label_values("sparserve_constraint_compilation_seconds", "kind")
    assert kinds == {kind.value for kind in ConstraintKind}
    assert all(sample.value == 0 for family in families.values() for sample in family.samples)


def test_policies_count_and_only_those_that_choose_have_a_density(metrics):
    for policy, density, coverage in (
        ("dense", 1.0, None), ("core", 0.5, 0.8), ("core", None, 0.7), ("token", 0.6, None),
    ):  # fmt: skip
        metrics.observe_sparsity(
            policy, density=density, coverage=coverage, refreshes=2, drafted=0, accepted=0, fallbacks=1
        )  # fmt: skip
    seen = values(metrics)
    assert seen["sparserve_requests_by_policy_total/core"] == 2
    assert seen["sparserve_requests_by_policy_total/token"] == 1
    assert seen["sparserve_decode_density_count"] == 2
    assert seen["sparserve_decode_density_sum"] == pytest.approx(1.1)
    assert seen["sparserve_core_coverage_sum"] == pytest.approx(1.5)
    assert seen["sparserve_refreshes_total"] == 8
    assert seen["sparserve_sparsity_fallbacks_total"] == 4


def test_a_request_that_never_ran_counts_in_no_phase(metrics):
    metrics.observe_finish(
        "cancelled", e2e_seconds=2, prefill_seconds=0, decode_seconds=0, completion_tokens=0
    )
    metrics.observe_request(n=1, max_tokens=9, prompt_tokens=5, cached_tokens=0, longest=0)
    seen = values(metrics)
    phases = ("inference_time_seconds", "prefill_time_seconds", "decode_time_seconds",
              "time_per_output_token_seconds", "prefill_kv_computed_tokens")  # fmt: skip
    for phase in phases:
        assert f"sparserve_request_{phase}_count" not in seen
    assert seen["sparserve_e2e_request_latency_seconds_sum"] == 2
    assert seen["sparserve_request_prompt_tokens_sum"] == 5


def test_a_single_token_has_no_time_between_tokens(metrics):
    metrics.observe_finish(
        "length", e2e_seconds=2, prefill_seconds=1, decode_seconds=0, completion_tokens=1
    )
    seen = values(metrics)
    assert seen["sparserve_request_prefill_time_seconds_count"] == 1
    assert "sparserve_request_time_per_output_token_seconds_count" not in seen


def test_a_step_that_ran_nothing_is_no_iteration(metrics):
    metrics.observe_step(seconds=0.1, tokens=0, preempted=1, prefix_queries=0, prefix_hits=0)
    assert values(metrics) == {"sparserve_num_preemptions_total": 1}
