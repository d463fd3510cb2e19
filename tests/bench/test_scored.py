"""Policies under the scorer: each window as its own steps would decode it, and bytes counted by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sparse_kernels.choice import ALL_NEURONS, ChoiceKind
from sparse_kernels.formats import DecoderFormats, MatrixFormat
from sparserve.bench.policies import PolicySpec
from sparserve.bench.quality import Window, cut_windows, measure
from sparserve.bench.scored import Driver, ServedModel
from sparserve.cli import app
from sparserve.engine.request import GenerationRequest, SamplingParams, StoppingParams
from sparserve.errors import ConfigError, SparserveError
from sparserve.model.backend import BLOCK_SIZE, ForwardBatch, Phase, SequenceInput
from sparserve.model.identity import index_key
from sparserve.model.loader import load_model
from sparserve.model.text import text_hash
from sparserve.sparsity.chooser import Chooser
from sparserve.sparsity.index import NeuronIndex, Setting, write_index
from sparserve.sparsity.policy import PolicyKind
from sparserve.sparsity.statistics import PromptStatistics

PROMPT, DECODE, COUNT = 37, 21, 3
HALF = "core:0.5/stability"


@pytest.fixture
def windows():
    ids = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(8)).tolist()
    return cut_windows(ids, COUNT, PROMPT, DECODE)


@pytest.fixture(params=["tiny_engine", "native_engine"])
def engine(request):
    make = request.getfixturevalue(request.param)
    return make(max_running=4, max_context=PROMPT + DECODE, max_batched_tokens=16)


@pytest.fixture
def backend(engine):
    return engine.backend


@pytest.fixture
def served(engine, windows):
    """`served("core:0.5")`: all share one driver, as a format's policies do."""
    driver = Driver(engine)
    dense = ServedModel(driver, windows)

    def make(words: str) -> ServedModel:
        spec = PolicySpec.parse(words)
        return ServedModel(driver, windows, spec, engine.policies.plan(spec.policy), dense)

    return make


def plain(backend, window, words):
    """Its logits, one token a step, and what the tokens used: [layers, neurons] bool, one choice for each."""
    policy = PolicySpec.parse(words).policy
    plan = Chooser(backend.config, backend.info).plan(policy)
    table = range(-(-(PROMPT + DECODE) // BLOCK_SIZE))

    def forward(tokens, start, phase, choice=ALL_NEURONS, **more):
        part = SequenceInput(tokens, start, table, phase, choice, **more)
        return backend.forward(ForwardBatch([part]))

    statistics = PromptStatistics(BLOCK_SIZE)
    wanted = {"collect_statistics": True, "score": plan.score, "score_share": plan.score_share}
    found = forward(window.prompt, 0, Phase.PREFILL, **wanted).statistics[0]
    statistics.extend(0, found)
    choice, rows, choices = plan.choose(statistics).choice, [], []
    refresh, neurons = policy.refresh_interval, backend.config.intermediate_size
    for step, token in enumerate(window.fed):
        if refresh and (step + 1) % refresh == 0:
            start = step + 1 - refresh
            again = window.fed[start : step + 1]
            output = forward(
                again, PROMPT + start, Phase.DECODE, output_offsets=(refresh - 1,), **wanted
            )
            statistics.extend(PROMPT + start, output.statistics[0])
            choice = plan.choose(statistics).choice
            choices.append(torch.ones(1, neurons))
        else:
            output = forward((token,), PROMPT + step, Phase.DECODE, choice, output_offsets=(0,))
            choices.append(choice.members(neurons))
        rows.append(output.candidates.full_logits(0).numpy().copy())
    return np.stack(rows), choices


@pytest.mark.parametrize(
    "words",
    [
        HALF,
        "core:0.8/layers=1-1",
        "core:0.4/signed_count/alpha=0.4",
        HALF + "/refresh=19",
        HALF + "/refresh=22",
    ],
)
def test_windows_get_the_logits_of_their_own_single_steps(backend, served, windows, words):
    system = served(words)
    expected = [plain(backend, window, words) for window in windows]
    for _ in range(2):  # prompts are read the first time only
        for logits, (rows, _) in zip(system.logits(windows), expected, strict=True):
            np.testing.assert_array_equal(logits, rows)
    used = np.mean([members.float().mean() for _, choices in expected for members in choices])
    info = backend.info
    assert system.density == pytest.approx(used, rel=1e-4)
    assert system.mlp_bytes == pytest.approx(info.mlp_bytes * used, rel=1e-4)
    dense = info.weight_bytes + info.kv_bytes_per_token * (PROMPT + DECODE // 2)
    assert system.bytes_per_token == pytest.approx(dense - info.mlp_bytes * (1 - used), rel=1e-4)


@pytest.mark.parametrize(
    "words", [HALF, HALF + "/refresh=5", "core:0.7/refresh=1", "core:0.3/refresh=2"]
)
def test_tokens_of_the_engine_are_the_likeliest_of_its_windows(engine, served, windows, words):
    """Also where tokens drift away from the prompt, and more is read, or all."""
    policy = PolicySpec.parse(words).policy
    made = []
    for number, window in enumerate(windows):
        sampling, stopping = SamplingParams(temperature=0), StoppingParams(DECODE, ignore_eos=True)
        engine.add(GenerationRequest(str(number), window.prompt, sampling, stopping, policy=policy))
        tokens = []
        while engine.has_work:
            for update in engine.step():
                tokens += [token.id for token in update.tokens]
        made.append(Window(window.prompt, tuple(tokens[:-1]), tuple(tokens[1:])))
    system = served(words)
    for window, logits in zip(made, system.logits(made), strict=True):
        assert tuple(logits.argmax(axis=1)) == window.targets


def test_a_prompt_is_read_once_for_all_policies_of_the_same_statistics(backend, served, windows):
    forward, prefills = backend.forward, []

    def watch(batch):
        prefills.extend(s.score for s in batch.sequences if s.phase is Phase.PREFILL)
        return forward(batch)

    backend.forward = watch
    chunks = COUNT * -(-PROMPT // 16)
    for words, reads in (
        (HALF, 1), ("core:0.7", 0), ("dense", 0), ("core:0.5/count", 1), ("core:0.6/count", 0),
        ("core:0.6/count/alpha=0.2", 1), (HALF, 1),
    ):  # fmt: skip
        del prefills[:]
        list(served(words).logits(windows))
        assert len(prefills) == reads * chunks, words
    assert len(list(served(HALF).logits(windows[:2]))) == 2
    assert len(prefills) == chunks * 5 // 3


def test_dense_reads_the_prompts_for_the_policies_after_it(engine, windows):
    plan = engine.policies.plan(PolicySpec.parse(HALF).policy)
    driver, forward, prefills = Driver(engine, plan), engine.backend.forward, []

    def watch(batch):
        prefills.extend(s for s in batch.sequences if s.phase is Phase.PREFILL)
        return forward(batch)

    engine.backend.forward = watch
    list(driver.rows(windows))
    read = len(prefills)
    list(driver.rows(windows, plan))
    assert read == len(prefills) == COUNT * -(-PROMPT // 16)


def test_all_neurons_are_dense_and_fewer_are_not(engine, served, windows):
    rows = measure(
        ServedModel(Driver(engine), windows).logits,
        [served(words) for words in ("core:1", "core:0.7", "core:0.4", "core:0.4/stability")],
        windows,
        lambda *_: None,
        2,
    )
    assert (rows[0].kl_dense, rows[0].top1_dense, rows[0].density) == (0, 1, 1)
    assert 0 < rows[1].kl_dense < rows[2].kl_dense
    assert rows[2].kl_dense == rows[2].kl  # the original here is dense itself
    assert rows[3].kl == rows[2].kl  # without an index there is only the prompt's own score
    assert [row.policy for row in rows] == [
        "core:1.0",
        "core:0.7",
        "core:0.4",
        "core:0.4/stability",
    ]


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text"
    file.write_text("A text that is long enough for a few windows of it. " * 8)
    return file


@pytest.fixture
def run_eval(tiny_folder, tmp_path, text):
    """`run_eval("--policies", …)` -> (what it printed, its rows)."""
    report = tmp_path / "rows.json"
    asked = ["eval", str(text), "--model", str(tiny_folder), "--threads", "1", "--windows", "4"]
    asked += ["--prompt-tokens", "40", "--decode-tokens", "16", "--json", str(report)]

    def run(*flags: str):
        result = CliRunner().invoke(app, [*asked, *flags])
        if result.exception is not None:
            raise result.exception
        return result.output, json.loads(report.read_text())

    return run


def test_the_command_writes_a_row_for_each_policy(run_eval):
    words = "dense,core:0.5,core:1,core:0.6/refresh=8"
    out, rows = run_eval(
        "--formats", "float32,bfloat16", "--backend", "reference", "--policies", words
    )
    expected = ["dense", "core:0.5", "core:1.0", "core:0.6/refresh=8"]
    assert [(row["format"], row["policy"]) for row in rows] == [
        (format, policy) for format in ("float32", "bfloat16") for policy in expected
    ]
    for dense, half, whole, refreshed in (rows[:4], rows[4:]):
        assert dense["kl_dense"] is None
        assert (whole["kl_dense"], whole["top1_dense"], whole["density"]) == (0, 1, 1)
        assert (whole["kl"], whole["bytes_per_token"]) == (dense["kl"], dense["bytes_per_token"])
        assert half["kl_dense"] > 1e-4
        assert half["kl_dense_p95_window"] >= half["kl_dense"] >= half["kl_dense_low"]
        assert (half["density"], half["mlp_bytes"]) == (0.5, dense["mlp_bytes"] // 2)
        saved = dense["bytes_per_token"] - half["bytes_per_token"]
        assert saved == dense["mlp_bytes"] // 2
        neurons = round(0.6 * 96) / 96
        assert refreshed["density"] == pytest.approx((7 * neurons + 1) / 8, abs=1e-3)
        assert refreshed["refresh"] == 8
    assert "against the same format dense" in out


@pytest.fixture
def index(tiny_folder, tmp_path):
    """`index(text)`: the file of an index as if calibrated on it, whose numbers are made up."""
    model = load_model(str(tiny_folder), dtype="float32")
    source = torch.Generator().manual_seed(4)
    settings = [
        Setting(PolicyKind.CORE, share, kl, 2 * kl, 0.8, shares=torch.full((2,), share))
        for share, kl in ((0.5, 0.9), (0.75, 0.2))
    ]
    settings += [
        Setting(
            PolicyKind.TOKEN, density, kl, 2 * kl, 0.9, ChoiceKind.GATE,
            thresholds=torch.full((2, 3), threshold), correction=1,
        )
        for density, kl, threshold in ((0.6, 0.1, 0.5), (0.8, 0.05, 0.2))
    ]  # fmt: skip

    def low_rank():
        return (0.01 * torch.randn(3, 64, generator=source)).bfloat16()

    def write(text: Path) -> Path:
        made = NeuronIndex(
            index_key(model, "float32"),
            prior=torch.rand(2, 96, generator=source),
            cluster_layer=1,
            centroids=torch.zeros(0, 96),
            clusters=torch.zeros(0, 2, 96, dtype=torch.float16),
            settings=settings,
            gate_factors=torch.ones(2, 96),
            corrections=[[(low_rank(), low_rank()) for _ in range(2)]],
            source={"texts": ["0" * 64, text_hash(text.read_bytes())]},
        )
        write_index(tmp_path / "index", made)
        return tmp_path / "index"

    return write


def test_an_index_predicts_and_its_correction_is_read(run_eval, index, tmp_path):
    other = tmp_path / "other"
    other.write_text("Words that are not those of the evaluation.")
    words = "dense,core:0.5,token:0.6,kl:0.15,token:1"
    flags = ["--dtype", "float32", "--index", str(index(other))]
    dense, core, token, auto, whole = run_eval(*flags, "--policies", words)[1]
    assert [row["predicted_kl"] for row in (dense, core, token)] == [None, 0.9, 0.1]
    assert [row["resolved"] for row in (dense, core, token)] == [None, None, None]
    assert auto["resolved"] == "token:0.6/gate"
    assert (auto["kl_dense"], auto["predicted_kl"]) == (token["kl_dense"], 0.1)
    assert token["kl_dense"] > 0
    gate, correction = 2 * 96 * 64 * 4, 2 * (2 * 3 * 64 * 2)  # bytes of both layers
    used = (token["mlp_bytes"] - gate - correction) / (2 * gate)
    assert 0.05 < used < 0.95
    assert whole["mlp_bytes"] == dense["mlp_bytes"] + correction
    assert whole["kl_dense"] > 0  # of what is added though nothing is left out
    assert core["mlp_bytes"] == dense["mlp_bytes"] // 2


def test_the_text_of_the_calibration_is_refused(run_eval, index, text):
    flags = ["--dtype", "float32", "--index", str(index(text)), "--policies"]
    with pytest.raises(ConfigError, match=f"the index was calibrated on {text}"):
        run_eval(*flags, "dense,token:0.6")
    assert len(run_eval(*flags, "dense")[1]) == 1  # which the index has nothing to do with


def test_a_compressed_model_is_measured_against_its_original(
    run_eval, write_compressed, tiny_folder, text, tmp_path
):
    int4 = MatrixFormat(4, 64, rank=32)
    formats = DecoderFormats(int4, int4, int4, MatrixFormat(8, 64))
    write_compressed(tiny_folder, formats, tmp_path / "out")
    own = ["--model", str(tmp_path / "out"), "--policies", "dense"]
    ((row,), (itself,)) = (
        run_eval(*own, *more)[1] for more in (["--original", str(tiny_folder)], [])
    )
    assert row["format"] == str(formats)
    assert itself["kl"] < row["kl"] / 50  # what the kernels' own rounding makes of it
    hashes = ("0" * 64, text_hash(text.read_bytes()))
    write_compressed(tiny_folder, formats, tmp_path / "seen", texts=hashes)
    with pytest.raises(ConfigError, match=f"the compressed model was calibrated on {text}"):
        run_eval("--model", str(tmp_path / "seen"), "--policies", "dense")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--policies", "core"], "policy 'core' begins with 'core'"),
        (["--policies", "exact"], "policy exact has the distributions of dense"),
        (["--policies", "core:0.5,token:0.5"], "needs a calibrated index"),
        (["--policies", "core:0.3/layers=1-1"], "take a higher density"),
    ],
)
def test_policies_that_cannot_be_scored_are_refused(run_eval, flags, told):
    with pytest.raises(SparserveError, match=told):
        run_eval(*flags)
