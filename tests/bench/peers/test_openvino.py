"""OpenVINO's own times, step by step, as a run."""

from types import SimpleNamespace

import pytest

from sparserve.bench.peers.gguf_files import gguf_file
from sparserve.bench.peers.openvino import OpenVino, _times
from sparserve.bench.peers.registry import open_peer
from sparserve.bench.rounds import wait_until_idle
from sparserve.errors import ConfigError, UnsupportedModel


def test_decode_is_timed_from_the_step_that_all_prompts_are_in():
    metrics = SimpleNamespace(
        m_batch_sizes=[1, 3, 3, 2],
        m_new_token_times=[5000.0, 5200.0, 5300.0, 5400.0],  # ms, of a clock
        m_times_to_first_token=[700_000.0],  # µs
        generate_durations=[1_100_000.0],
    )
    assert _times(metrics, 3) == (pytest.approx(0.9), 1.1, 4)


def test_it_runs_our_weights(peer_model):
    pytest.importorskip("openvino_genai")
    peer = open_peer("openvino", "bfloat16", lambda dtype: peer_model, 2)
    for count in (1, 3):
        run = peer.run([tuple(range(40 + i, 80 + i)) for i in range(count)], 6)
        assert run.new_tokens == 6 * count
        assert 0 < run.ttft < run.total
    wait_until_idle(patience=1)


def test_a_single_thread_which_would_end_the_process_is_refused(peer_model):
    with pytest.raises(ConfigError, match=r"on 1 thread: give --threads 2, or leave it out"):
        open_peer("openvino", "bfloat16", lambda dtype: peer_model, 1)


def test_what_it_refuses_is_told(peer_model):
    pytest.importorskip("openvino_genai")
    file = gguf_file(peer_model, "float16")
    lacking = {"arithmetic": "int3", "kv_cache": "f16", "weight_bytes": 1, "kv_bytes_per_token": 1}
    with pytest.raises(UnsupportedModel, match=r"OpenVINO cannot run float16 here: (.|\n)*int3"):
        OpenVino(file, "float16", 2, **lacking)
