"""OpenVINO GenAI's `LLMPipeline` on the same weights, which it reads from a GGUF file.

Its settings are the pipeline's defaults (paged attention, its own scheduler); only the threads and the
precisions of arithmetic and KV cache are told, so that a row says what it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sparserve.bench.peers.packages import require
from sparserve.bench.systems import Prompts, Run
from sparserve.errors import ConfigError, UnsupportedModel


class OpenVino:
    name = "openvino"
    policy = "dense"

    def __init__(
        self,
        file: Path,
        format: str,
        threads: int,
        *,
        weight_bytes: int,
        kv_bytes_per_token: int,
        arithmetic: str,
        kv_cache: str,
    ) -> None:
        """`arithmetic` and `kv_cache` are names of OpenVINO's element types.

        Raises ConfigError where the package is missing and of a single thread, UnsupportedModel where it
        refuses the file or an element type.
        """
        check_threads(threads)
        self._openvino, self._genai = require("openvino"), require("openvino_genai")
        self.format = format
        self.weight_bytes = weight_bytes
        self.kv_bytes_per_token = kv_bytes_per_token
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": arithmetic,
            "KV_CACHE_PRECISION": kv_cache,
        }
        try:
            self._pipeline = self._genai.LLMPipeline(str(file), "CPU", **settings)
        except RuntimeError as error:  # an element type that this CPU lacks, an architecture
            raise UnsupportedModel(f"OpenVINO cannot run {format} here: {error}") from error

    def run(self, prompts: Prompts, new_tokens: int) -> Run:
        """Times are those that the pipeline itself reports for each step."""
        ids = np.array(prompts, np.int64)
        tensors = (self._openvino.Tensor(ids), self._openvino.Tensor(np.ones_like(ids)))
        options = self._genai.GenerationConfig(
            max_new_tokens=new_tokens, ignore_eos=True, do_sample=False
        )
        results = self._pipeline.generate(self._genai.TokenizedInputs(*tensors), options)
        counts = {len(tokens) for tokens in results.tokens}
        assert counts == {new_tokens}, f"openvino made {counts} tokens, not {new_tokens}"
        ttft, total, at_ttft = _times(results.perf_metrics.raw_metrics, len(prompts))
        return Run(ttft, total, new_tokens * len(prompts), at_ttft)


def _times(metrics: Any, batch: int) -> tuple[float, float, int]:
    """-> (seconds until every prompt had its first token, of the whole run, tokens there by the first).

    One entry a step: the scheduler may begin with fewer sequences than it was given.
    """
    sizes, at = list(metrics.m_batch_sizes), list(metrics.m_new_token_times)  # at: milliseconds
    started = sizes.index(batch)
    first = metrics.m_times_to_first_token[0] / 1e6  # microseconds
    ttft = first + (at[started] - at[0]) / 1e3
    return ttft, metrics.generate_durations[0] / 1e6, sum(sizes[: started + 1])


def check_threads(threads: int) -> None:
    """Raises ConfigError of a single thread."""
    if threads < 2:  # 2026.4 ends the whole process by a division by zero
        raise ConfigError(
            f"openvino cannot run on {threads} thread: give --threads 2, or leave it out of --peers"
        )
