"""The engine over the real reference backend: what a request gets never depends on the others."""

import random
import time
from collections.abc import Sequence as Listing
from dataclasses import replace

import pytest
import torch

from sparse_kernels._abi import sk_status
from sparse_kernels.native import DeviceLost, NativeCallError
from sparserve.engine.engine import MAX_CONSECUTIVE_FAILURES, Engine
from sparserve.engine.request import (
    Finish,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    StoppingParams,
    Update,
)
from sparserve.engine.sequence import Sequence
from sparserve.errors import (
    ConfigError,
    DeviceFailure,
    EngineFailure,
    InvalidRequest,
    PromptTooLong,
)

GREEDY = SamplingParams(temperature=0)


def request(
    request_id: str, prompt: Listing[int], sampling: SamplingParams = GREEDY, **stopping: object
) -> GenerationRequest:
    return GenerationRequest(request_id, tuple(prompt), sampling, StoppingParams(**stopping))


def run(
    engine: Engine, requests: Listing[GenerationRequest], stagger: int = 0
) -> dict[str, Update]:
    """All requests to their ends, one more added every `stagger` steps (0: all at once)."""
    pending, steps = list(requests), 0
    results: dict[str, Update] = {r.request_id: Update(r.request_id) for r in requests}
    while pending or engine.has_work:
        while pending and (stagger == 0 or steps % stagger == 0):
            engine.validate(pending[0])
            engine.add(pending.pop(0))
            if stagger:
                break
        for update in engine.step():
            results[update.request_id] += update
            assert update.finish is None or update.finish.error is None
        steps += 1
    assert engine.used_blocks == 0
    return results


def finish_of(update: Update) -> Finish:
    assert update.finish is not None
    return update.finish


def ids_of(update: Update) -> list[int]:
    return [token.id for token in update.tokens]


def mixed_requests(count: int, seed: int) -> list[GenerationRequest]:
    source = random.Random(seed)
    requests = []
    for index in range(count):
        prompt = [source.randrange(256) for _ in range(source.randint(1, 150))]
        sampling = source.choice(
            [
                GREEDY,
                SamplingParams(seed=index),
                SamplingParams(temperature=1.4, top_k=20, seed=index),
                SamplingParams(temperature=0.7, top_p=0.8, seed=index),
            ]
        )
        requests.append(request(str(index), prompt, sampling, max_tokens=source.randint(1, 60)))
    return requests


@pytest.mark.parametrize(
    ("settings", "stagger"),
    [
        pytest.param({"max_running": 8}, 0, id="batched"),
        pytest.param({"max_running": 8, "max_batched_tokens": 24}, 0, id="chunked"),
        pytest.param({"max_running": 6, "max_batched_tokens": 48}, 3, id="arriving"),
        pytest.param({"max_running": 8, "kv_blocks": 32}, 0, id="preempted"),
        pytest.param(
            {"max_running": 8, "kv_blocks": 33, "max_batched_tokens": 24}, 2, id="all of it"
        ),
    ],
)
def test_output_equals_that_of_the_request_alone(tiny_engine, tiny_model, settings, stagger):
    settings = dict(settings)
    if blocks := settings.pop("kv_blocks", None):
        # One context of 512 tokens is 32 blocks: eight requests of some 8 blocks must give way.
        from sparserve.model.kv_cache import bytes_per_block

        settings["kv_cache_gib"] = (
            blocks * bytes_per_block(tiny_model.config, tiny_model.weights.dtype) / 2**30
        )
    requests = mixed_requests(14, seed=5)
    alone = {}
    for one in requests:
        alone |= run(tiny_engine(max_running=1), [one])
    engine = tiny_engine(**settings)
    together = run(engine, requests, stagger)
    for key, update in alone.items():
        assert together[key].tokens == update.tokens, (
            f"request {key}"
        )  # ids and logprobs, to the bit
        assert together[key].text == update.text
        assert finish_of(together[key]).reason is finish_of(update).reason
    preemptions = engine.metrics.preemptions._value.get()
    assert (preemptions > 0) == bool(blocks)


def test_statistics_do_not_depend_on_chunks_or_mates(tiny_engine, monkeypatch):
    prompt = [random.Random(1).randrange(256) for _ in range(150)]
    seen, real = [], Sequence.finish

    def finish(self, *args, **kwargs):
        seen.append(self.statistics)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Sequence, "finish", finish)
    for budget in (512, 16, 37):
        one = GenerationRequest(
            "a", tuple(prompt), GREEDY, StoppingParams(max_tokens=2), report_statistics=True
        )
        engine = tiny_engine(max_running=2, max_batched_tokens=budget)
        results = run(engine, [one, request("b", prompt[:40], max_tokens=30)])
        assert 0 < finish_of(results["a"]).core_share < 1
        assert finish_of(results["b"]).core_share is None
    collected = [statistics.total() for statistics in seen if statistics is not None]
    assert len(collected) == 3
    assert all(statistics.tokens == 149 for statistics in collected)  # all but the first
    assert all(torch.equal(statistics.sums, collected[0].sums) for statistics in collected)


def test_max_tokens_ends_with_length(tiny_engine):
    update = run(tiny_engine(), [request("a", [1, 2, 3], max_tokens=7)])["a"]
    assert len(update.tokens) == 7
    assert finish_of(update).reason is FinishReason.LENGTH
    assert finish_of(update).completion_tokens == 7


def test_a_full_context_ends_with_context(tiny_engine):
    update = run(
        tiny_engine(max_context=40), [request("a", range(30), max_tokens=100, ignore_eos=True)]
    )["a"]
    assert finish_of(update).reason is FinishReason.CONTEXT
    assert len(update.tokens) == 10
    longest = run(tiny_engine(max_context=40), [request("a", range(39), max_tokens=100)])["a"]
    assert len(longest.tokens) == 1


def eos_seed(engine: Engine) -> int:
    """A seed whose request ends by itself."""
    for seed in range(400):
        sampling = SamplingParams(temperature=2.0, seed=seed)
        update = run(engine, [request("a", [5, 6], sampling, max_tokens=40)])["a"]
        if finish_of(update).reason is FinishReason.STOP_EOS:
            return seed
    raise AssertionError("no seed ends with EOS")


def test_eos_ends_unless_ignored(tiny_engine):
    engine = tiny_engine()
    sampling = SamplingParams(temperature=2.0, seed=eos_seed(engine))
    ended = run(engine, [request("a", [5, 6], sampling, max_tokens=40)])["a"]
    assert ids_of(ended)[-1] == 257
    assert finish_of(ended).stop_token_id == 257
    ignored = run(engine, [request("a", [5, 6], sampling, max_tokens=40, ignore_eos=True)])["a"]
    assert len(ignored.tokens) == 40
    assert ids_of(ignored)[: len(ended.tokens)] == ids_of(ended)


def test_a_stop_string_ends_the_text_before_it(tiny_engine):
    engine = tiny_engine()
    sampling = SamplingParams(seed=3)
    whole = run(engine, [request("a", [70, 71], sampling, max_tokens=60)])["a"].text
    printable = [c for c in whole[5:] if c.isascii()]
    stop = printable[0]
    update = run(engine, [request("a", [70, 71], sampling, max_tokens=60, stop=(stop,))])["a"]
    assert update.text == whole[: whole.index(stop)]
    assert finish_of(update).reason is FinishReason.STOP_STRING
    assert finish_of(update).stop_string == stop


def test_abort_frees_the_blocks_at_once(tiny_engine):
    engine = tiny_engine()
    engine.add(request("a", range(100), max_tokens=100))
    for _ in range(4):
        engine.step()
    assert engine.used_blocks > 0
    (update,) = engine.abort("a")
    assert finish_of(update).reason is FinishReason.CANCELLED
    assert engine.used_blocks == 0
    assert not engine.has_work
    assert engine.abort("a") == []


def test_a_deadline_ends_waiting_and_running_requests(tiny_engine):
    engine = tiny_engine(max_running=1)
    for key in ("running", "waiting"):
        engine.add(
            GenerationRequest(
                key,
                (1, 2),
                GREEDY,
                StoppingParams(max_tokens=400),
                deadline=time.monotonic() + 0.05,
            )
        )
    results = {}
    while engine.has_work:
        results |= {u.request_id: u for u in engine.step() if u.finish}
    assert {key: finish_of(u).reason for key, u in results.items()} == {
        "running": FinishReason.DEADLINE,
        "waiting": FinishReason.DEADLINE,
    }
    assert engine.used_blocks == 0


def test_a_failed_step_ends_only_its_own_requests(tiny_engine, monkeypatch, caplog):
    engine = tiny_engine(max_running=1)
    engine.add(request("unlucky", [1, 2], max_tokens=5))
    engine.add(request("waiting", [3, 4], max_tokens=5))
    forward = engine.backend.forward
    monkeypatch.setattr(engine.backend, "forward", lambda batch: 1 / 0)
    (failed,) = engine.step()
    monkeypatch.setattr(engine.backend, "forward", forward)
    error = finish_of(failed).error
    assert failed.request_id == "unlucky"
    assert isinstance(error, EngineFailure)
    assert error.error_id in caplog.text
    updates = []
    while engine.has_work:
        updates += engine.step()
    assert finish_of(updates[-1]).reason is FinishReason.LENGTH
    assert engine.used_blocks == 0
    assert engine.broken is None


def test_tokens_made_before_a_failure_in_the_same_step_are_not_lost(tiny_engine, monkeypatch):
    import sparserve.engine.engine as module

    engine, real, calls = tiny_engine(), module.draw, []

    def second_fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("planted")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "draw", second_fails)
    engine.add(request("a", [1, 2], max_tokens=1))
    engine.add(request("b", [3, 4], max_tokens=1))
    finishes = {u.request_id: finish_of(u).reason for u in engine.step() if u.finish}
    assert finishes == {"a": FinishReason.LENGTH, "b": FinishReason.ERROR}


def test_not_finite_logits_fail_only_their_request(tiny_engine, monkeypatch):
    engine = tiny_engine()
    embedding = engine.backend._weights.embedding.clone()
    embedding[200] = float("nan")
    monkeypatch.setattr(
        engine.backend, "_weights", replace(engine.backend._weights, embedding=embedding)
    )
    for key, prompt in (("good", [1, 2]), ("bad", [3, 200])):
        engine.add(request(key, prompt, max_tokens=3))
    finishes = {}
    while engine.has_work:
        finishes |= {u.request_id: finish_of(u) for u in engine.step() if u.finish}
    assert isinstance(finishes["bad"].error, EngineFailure)
    assert finishes["good"].reason is FinishReason.LENGTH
    assert run(engine, [request("next", [1, 2], max_tokens=3)])["next"].tokens
    assert engine.broken is None


def test_a_temperature_near_zero_is_greedy(tiny_engine):
    engine = tiny_engine()
    greedy = run(engine, [request("a", [9, 8, 7], max_tokens=12)])["a"]
    for temperature in (1e-4, 1e-20, 1e-44):
        sampling = SamplingParams(temperature=temperature, seed=1)
        assert (
            run(engine, [request("a", [9, 8, 7], sampling, max_tokens=12)])["a"].tokens
            == greedy.tokens
        )


def test_gauges_are_true_after_an_abort(tiny_engine):
    engine = tiny_engine()
    engine.add(request("a", range(100), max_tokens=100))
    engine.step()
    registry = engine.metrics.registry
    assert registry.get_sample_value("sparserve_num_requests_running") == 1
    assert registry.get_sample_value("sparserve_kv_blocks_used") > 0
    engine.abort("a")
    assert registry.get_sample_value("sparserve_num_requests_running") == 0
    assert registry.get_sample_value("sparserve_kv_blocks_used") == 0


def test_repeated_failures_break_the_engine(tiny_engine, monkeypatch):
    engine = tiny_engine()
    monkeypatch.setattr(engine.backend, "forward", lambda batch: 1 / 0)
    for attempt in range(MAX_CONSECUTIVE_FAILURES):
        assert engine.broken is None
        engine.add(request(str(attempt), [1], max_tokens=2))
        engine.step()
    assert engine.broken is not None
    assert not engine.has_work


@pytest.mark.parametrize(
    ("prompt", "error", "told"),
    [([], InvalidRequest, "empty"), (range(512), PromptTooLong, "512 tokens, the limit is 511")],
)
def test_a_prompt_that_cannot_be_served_is_refused(tiny_engine, prompt, error, told):
    with pytest.raises(error, match=told):
        tiny_engine().validate(request("a", [i % 256 for i in prompt]))


@pytest.mark.parametrize(
    ("kind", "values", "told"),
    [
        (SamplingParams, {"temperature": float("nan")}, "temperature is nan"),
        (SamplingParams, {"temperature": -0.1}, r"in \[0, 2\]"),
        (SamplingParams, {"temperature": float("inf")}, "inf"),
        (SamplingParams, {"top_p": 0.0}, r"top_p is 0; it must be in \(0, 1\]"),
        (SamplingParams, {"top_p": float("nan")}, "nan"),
        (SamplingParams, {"top_k": -1}, "top_k is -1"),
        (SamplingParams, {"seed": 2**64}, "seed"),
        (StoppingParams, {"max_tokens": 0}, "max_tokens is 0"),
        (StoppingParams, {"stop": ("",)}, "0 characters"),
        (StoppingParams, {"stop": ("x" * 257,)}, "257 characters"),
        (StoppingParams, {"stop": ("x",) * 17}, "17 stop strings"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_limit(kind, values, told):
    with pytest.raises(InvalidRequest, match=told):
        kind(**values)


def test_a_pool_below_one_context_is_refused_with_the_way_out(tiny_engine):
    with pytest.raises(ConfigError, match="raise --kv-cache-gib or lower --max-context"):
        tiny_engine(kv_cache_gib=0.0001, max_context=512)


def test_a_context_nobody_asked_for_is_cut_to_what_fits(tiny_engine, caplog):
    engine = tiny_engine(kv_cache_gib=0.0001)
    assert engine.limits.max_context == 16 * engine.backend.num_blocks < 512
    assert "serving a context of" in caplog.text


def test_a_library_that_refuses_the_first_forward_is_told_in_one_line(native_engine, monkeypatch):
    engine = native_engine()
    refusal = NativeCallError(sk_status.SK_STATUS_INTERNAL, "launch of embed, 0 x 1 x 1 blocks")

    def refuse(batch):
        raise refusal

    monkeypatch.setattr(engine.backend, "forward", refuse)
    with pytest.raises(
        ConfigError, match=r"backend cpu \(.*\) cannot compute on 1 threads: launch of embed"
    ):
        engine.warm_up()


def test_a_lost_gpu_ends_everything_at_once_and_for_good(tiny_engine, monkeypatch):
    engine = tiny_engine(max_running=1)
    for key in ("a", "b"):
        engine.add(request(key, [1, 2, 3], max_tokens=5))

    def lose(batch):
        raise DeviceLost(sk_status.SK_STATUS_DEVICE, "GPU 0 failed")

    monkeypatch.setattr(engine.backend, "forward", lose)
    updates = engine.step()
    assert {update.request_id for update in updates} == {"a", "b"}
    assert isinstance(engine.broken, DeviceFailure)
    assert all(finish_of(update).error is engine.broken for update in updates)
    assert not engine.has_work
    assert engine.used_blocks == 0
