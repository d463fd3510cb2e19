"""The scorer against plain definitions, and against transformers on a tiny checkpoint."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sparserve.bench.original import Original, original_states
from sparserve.bench.quality import Window, bootstrap_interval, cut_windows, log_softmax, measure
from sparserve.bench.scored import Driver, ServedModel
from sparserve.cli import app
from sparserve.config import EngineSettings
from sparserve.engine.factory import assemble_engine
from sparserve.errors import ConfigError
from sparserve.model.backend import Phase
from sparserve.model.loader import load_model

PROMPT, DECODE, COUNT = 40, 12, 6


@pytest.fixture
def windows() -> list[Window]:
    ids = torch.randint(0, 256, (1000,), generator=torch.Generator().manual_seed(3)).tolist()
    return cut_windows(ids, COUNT, PROMPT, DECODE)


def test_windows_are_spread_and_do_not_overlap():
    windows = cut_windows(list(range(1000)), 7, 30, 9)
    starts = [window.prompt[0] for window in windows]
    assert starts == [40 * (i * 25 // 7) for i in range(7)]
    for window in windows:
        tokens = [*window.prompt, *window.fed, window.targets[-1]]
        assert tokens == list(range(window.prompt[0], window.prompt[0] + 40))
        assert window.targets == tuple(token + 1 for token in window.fed)


def test_a_text_too_short_for_its_windows_is_told_with_what_it_holds():
    with pytest.raises(ConfigError, match="99 tokens, enough for 2 windows of 40; 3 were asked"):
        cut_windows(list(range(99)), 3, 30, 9)


class Given:
    """A system with logits made up."""

    system, format, policy, density, refresh = "given", "f", "dense", 1.0, 0
    bytes_per_token, mlp_bytes = 10, 5
    predicted_kl = resolved = None

    def __init__(self, logits: np.ndarray, dense: "Given | None" = None) -> None:
        self._left, self.dense = list(logits), dense

    def logits(self, windows):
        for _ in windows:
            yield self._left.pop(0)


def test_the_figures_are_those_of_their_definitions(windows):
    source = np.random.default_rng(0)
    p_logits, q_logits = source.normal(0, 2, (2, COUNT, DECODE, 256)).astype(np.float32)
    q_logits = p_logits + 0.3 * q_logits
    (row,) = measure(Given(p_logits).logits, [Given(q_logits)], windows, lambda *_: None, 4)
    kl, agree, surprise = [], [], []
    for window, p_rows, q_rows in zip(windows, p_logits, q_logits, strict=True):
        for target, p_row, q_row in zip(window.targets, p_rows, q_rows, strict=True):
            p, q = (np.exp(x.astype(float)) / np.exp(x.astype(float)).sum() for x in (p_row, q_row))
            kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            agree.append(p.argmax() == q.argmax())
            surprise.append(-math.log(q[target]))
    assert row.kl == pytest.approx(np.mean(kl))
    assert row.kl_p95 == pytest.approx(np.quantile(kl, 0.95))
    assert row.kl_low < row.kl < row.kl_high
    assert row.top1 == pytest.approx(np.mean(agree))
    assert row.perplexity == pytest.approx(math.exp(np.mean(surprise)))
    means = np.array(kl).reshape(COUNT, DECODE).mean(axis=1)
    assert row.kl_p95_window == pytest.approx(np.quantile(means, 0.95))
    assert (row.windows, row.bytes_per_token, row.mlp_bytes) == (COUNT, 10, 5)
    assert row.kl_dense is row.kl_dense_p95_window is row.top1_dense is None


@pytest.mark.parametrize("dense_has_a_row", [True, False])
def test_a_policy_is_compared_with_its_dense_as_with_an_original(windows, dense_has_a_row):
    source = np.random.default_rng(2)
    p, q, r = source.normal(0, 2, (3, COUNT, DECODE, 256)).astype(np.float32)
    dense = Given(q)  # gives each window once: it is run once for itself and all its policies
    policies = [Given(r, dense), Given(q, dense)]
    own = [dense, *policies] if dense_has_a_row else policies
    rows = measure(Given(p).logits, own, windows, lambda *_: None, 4)[-2:]
    (to_p, to_q) = (
        measure(Given(base).logits, [Given(r)], windows, lambda *_: None, 4)[0] for base in (p, q)
    )
    assert (rows[0].kl, rows[0].top1) == (to_p.kl, to_p.top1)
    assert (rows[0].kl_dense, rows[0].kl_dense_low, rows[0].kl_dense_high) == (
        to_q.kl, to_q.kl_low, to_q.kl_high,
    )  # fmt: skip
    assert (rows[0].kl_dense_p95_window, rows[0].top1_dense) == (to_q.kl_p95_window, to_q.top1)
    assert (rows[1].kl_dense, rows[1].top1_dense) == (0, 1)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    source, covered = np.random.default_rng(1), 0
    for seed in range(200):
        low, high = bootstrap_interval(source.exponential(1.0, 60), seed)
        covered += low <= 1.0 <= high
    assert 175 <= covered <= 199


@pytest.fixture
def served(tiny_folder, windows):
    """`served(dtype, chunk=…)`: the tiny model as this project serves it."""

    def make(dtype: str, chunk: int = 512) -> ServedModel:
        model = load_model(str(tiny_folder), dtype=dtype)
        settings = EngineSettings(
            threads=1, kv_cache_gib=0.01, max_context=PROMPT + DECODE, max_running=4,
            max_batched_tokens=chunk,
        )  # fmt: skip
        return ServedModel(Driver(assemble_engine(model, settings).engine), windows)

    return make


@pytest.fixture
def original(tiny_model, windows) -> Original:
    states = original_states(tiny_model, windows, 1, None, lambda *_: None)
    return Original(tiny_model, windows, states)


def test_original_and_served_in_float32_are_transformers(served, original, windows, tiny_folder):
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    both = served("float32").logits(windows), original.logits(windows)
    for window, ours, whole in zip(windows, *both, strict=True):
        with torch.inference_mode():
            logits = theirs(torch.tensor([window.prompt + window.fed])).logits[0, PROMPT:]
        assert np.abs(ours - logits.numpy()).max() < 1e-4
        assert np.abs(whole - logits.numpy()).max() < 1e-4


def test_float32_is_the_original_and_bfloat16_near_it(served, original, windows):
    exact, coarse = served("float32", chunk=16), served("bfloat16")
    rows = measure(original.logits, [exact, coarse], windows, lambda *_: None, 4)
    assert rows[0].kl < 1e-9
    assert rows[0].top1 == 1.0
    assert 1e-6 < rows[1].kl < 0.05
    assert rows[1].bytes_per_token < 0.6 * rows[0].bytes_per_token


def test_bytes_are_those_of_the_weights_and_the_kv_of_a_window(served, tiny_model):
    float32 = served("float32")
    config, layers = tiny_model.config, tiny_model.config.num_layers
    d, i, v = config.hidden_size, config.intermediate_size, config.vocab_size
    attention = 2 * d * config.head_dim * (config.num_heads + config.num_kv_heads)
    weights = layers * (attention + 3 * d * i + 2 * d) + d + v * d
    kv = 2 * layers * config.num_kv_heads * config.head_dim * (PROMPT + DECODE // 2)
    assert float32.mlp_bytes == 4 * layers * 3 * d * i
    assert float32.bytes_per_token == pytest.approx(4 * (weights + kv), rel=0.001)


def test_log_softmax_holds_for_any_size():
    rows = np.array([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], np.float32)
    np.testing.assert_allclose(np.exp(log_softmax(rows)).sum(axis=1), 1)


def test_the_command_writes_a_row_for_each_format(tiny_folder, tmp_path):
    text, report = tmp_path / "text", tmp_path / "report.json"
    text.write_text("A text that is long enough for a few windows of it. " * 8)
    flags = ["--windows", "5", "--prompt-tokens", "40", "--decode-tokens", "12"]
    flags += ["--formats", "float32,bfloat16,int8,int4", "--group-size", "32"]
    asked = ["eval", str(text), "--model", str(tiny_folder), "--threads", "1"]
    result = CliRunner().invoke(app, [*asked, *flags, "--json", str(report)])
    assert result.exit_code == 0, result.output
    rows = json.loads(report.read_text())
    integers = ["int8-g32", "int4-g32 (LM head int8-g32)"]
    assert [row["format"] for row in rows] == ["float32", "bfloat16", *integers]
    assert set(rows[0]) == {
        "system", "format", "policy", "density", "refresh", "bytes_per_token", "mlp_bytes", "kl",
        "kl_low", "kl_high", "kl_p95", "kl_p95_window", "top1", "perplexity", "windows", "resolved",
        "predicted_kl", "kl_dense", "kl_dense_low", "kl_dense_high", "kl_dense_p95_window", "top1_dense",
    }  # fmt: skip
    assert rows[0]["kl"] < 1e-9 < rows[1]["kl"] < rows[2]["kl"] < rows[3]["kl"]
    sizes = [row["mlp_bytes"] for row in rows]
    assert sizes == [row_bytes * 2 * 3 * 96 for row_bytes in (256, 128, 64 + 6, 32 + 6)]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--formats", "int3"], "no format is named int3"),
        (["--windows", "9"], "enough for 8 windows"),
        (["--prompt-tokens", "600"], "windows of 612 tokens exceed the context"),
        (["--json", "/no/such/folder/x"], "the folder of --json"),
    ],
)
def test_the_command_refuses_what_cannot_be(tiny_folder, tmp_path, flags, told):
    text = tmp_path / "text"
    text.write_text("x" * 8 * 53)
    sizes = ["--prompt-tokens", "40", "--decode-tokens", "12"]
    asked = ["eval", str(text), "--model", str(tiny_folder), "--windows", "3", *sizes, *flags]
    result = CliRunner().invoke(app, asked)
    assert isinstance(result.exception, ConfigError)
    assert told in str(result.exception)


@pytest.mark.parametrize(
    ("vocabulary", "told"),
    [
        (300, "a vocabulary of 259 tokens, .* one of 300"),
        (259, "token 65 is '.' in .*, '<other>' in other"),
    ],
)
def test_another_vocabulary_cannot_be_compared(
    write_tiny_checkpoint, tiny_folder, tmp_path, vocabulary, told
):
    other = write_tiny_checkpoint(tmp_path / "other", vocab_size=vocabulary)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    (token,) = (token for token, i in tokenizer["model"]["vocab"].items() if i == 65)
    del tokenizer["model"]["vocab"][token]
    tokenizer["model"]["vocab"]["<other>"] = 65
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = tmp_path / "text"
    text.write_text("a" * 300)
    sizes = ["--windows", "2", "--prompt-tokens", "40", "--decode-tokens", "12"]
    asked = ["eval", str(text), "--model", str(tiny_folder), "--original", str(other), *sizes]
    result = CliRunner().invoke(app, [*asked, "--kv-cache-gib", "0.01"])
    assert isinstance(result.exception, ConfigError)
    assert re.search(told, str(result.exception))


def test_a_prompt_that_several_windows_share_is_prefilled_once(served, windows):
    system = served("float32")
    backend, prefills = system._driver.backend, []
    forward = backend.forward

    def watch(batch):
        prefills.extend(s.token_ids for s in batch.sequences if s.phase is Phase.PREFILL)
        return forward(batch)

    backend.forward = watch
    shared = [replace(w, prompt=windows[0].prompt) for w in windows[:3]]
    together = list(system.logits(shared))
    assert prefills == [windows[0].prompt]
    assert len(list(system.logits([replace(w, prompt=()) for w in windows[:2]]))) == 2
    for window, rows in zip(shared, together, strict=True):
        np.testing.assert_array_equal(rows, *system.logits([window]))


def test_windows_of_unequal_lengths_are_decoded_together(served, original, windows):
    """As their own whole windows are: prompts of any length, none included, continuations of any."""
    ragged = [
        Window(w.prompt[: 7 * i], (*w.prompt[7 * i :], *w.fed)[: 5 + 3 * i], ())
        for i, w in enumerate(windows)
    ]
    system = served("float32")
    for window, together in zip(ragged, system.logits(ragged), strict=True):
        (alone,) = system.logits([window])
        assert len(together) == len(window.fed)
        np.testing.assert_array_equal(together, alone)
