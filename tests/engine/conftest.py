"""Running requests on an engine to their ends."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from sparse_kernels._abi import sk_status
from sparse_kernels.device import Device
from sparse_kernels.native import NativeCallError
from sparserve.engine import backends
from sparserve.engine.engine import Engine
from sparserve.engine.request import GenerationRequest, Update
from sparserve.model.backend import BLOCK_SIZE

# (request id, choice) -> all its updates as one
Results = dict[tuple[str, int], Update]


def run_to_end(engine: Engine, requests: Sequence[GenerationRequest], stagger: int = 0) -> Results:
    """One more request every `stagger` steps (0: all at once)."""
    pending, steps = list(requests), 0
    results = {
        (r.request_id, i): Update(r.request_id, i) for r in requests for i in range(r.sampling.n)
    }
    while pending or engine.has_work:
        while pending and (stagger == 0 or steps % stagger == 0):
            engine.validate(pending[0])
            engine.add(pending.pop(0))
            if stagger:
                break
        for update in engine.step():
            known = results[update.request_id, update.index]
            assert known.finish is None, "an update after the end"
            results[update.request_id, update.index] = known + update
            assert update.finish is None or update.finish.error is None, update.finish
        steps += 1
    assert engine.used_blocks == engine.num_running == engine.num_waiting == 0
    assert all(update.finish is not None for update in results.values())
    return results


@pytest.fixture(scope="session")
def finish_all() -> Callable[..., Results]:
    """`run_to_end` itself: test modules cannot import this one."""
    return run_to_end


@pytest.fixture(params=["reference", "cpu", "cpu, int8 KV"])
def any_engine(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """`any_engine(max_running=…)`: over the tiny model with an index, on each backend in turn."""
    index_file: Callable[..., Path] = request.getfixturevalue("index_file")
    if request.param == "reference":
        return partial(request.getfixturevalue("tiny_engine"), index=str(index_file("float32")))
    native = partial(request.getfixturevalue("native_engine"), index=str(index_file("bfloat16")))
    return partial(native, kv_dtype="int8") if "int8" in request.param else native


@pytest.fixture
def small_pool(any_engine: Callable[..., Engine]) -> Callable[[int, int, int], Engine]:
    """`small_pool(blocks, max_running, max_batched_tokens)`: a context of 128, so of 8 blocks."""
    block_bytes = any_engine().backend.info.kv_bytes_per_token * BLOCK_SIZE

    def build(blocks: int, max_running: int, max_batched_tokens: int) -> Engine:
        made = any_engine(
            kv_cache_gib=(blocks + 0.5) * block_bytes / 2**30,
            max_running=max_running,
            max_batched_tokens=max_batched_tokens,
            max_context=128,
        )
        assert made.backend.num_blocks == blocks
        return made

    return build


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Auto is the CPU, on a machine with a GPU too."""

    def usable(place: str) -> Device:
        raise NativeCallError(sk_status.SK_STATUS_UNSUPPORTED, f"there is no {place}: no driver")

    monkeypatch.setattr(backends, "usable", usable)
