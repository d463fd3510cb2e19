"""`sparserve bench serve`: a server of its own, a running one, a rival; what it refuses."""

import json

import pytest

from sparserve.bench.serve.targets import Wish
from sparserve.cli.connection import Connection
from sparserve.cli.serve_load import make_targets

TINY = ("--threads", "1", "--kv-cache-gib", "0.01")
SHORT = ("--input-len", "20", "--output-len", "6", "--warmup", "1")


@pytest.fixture
def bench(run_main, tmp_path):
    """`bench("--num-prompts", "3", …)` -> (stdout, stderr, the JSON report)."""

    def run(*flags, expect=0):
        file = tmp_path / "report.json"
        status, out, err = run_main("bench", "serve", "--json", file, *flags)
        assert status == expect, err
        return out, err, json.loads(file.read_text()) if file.exists() else None

    return run


def test_a_server_of_its_own_is_loaded(bench, tiny_folder, tmp_path, run_main):
    picture = tmp_path / "serve.png"
    out, err, report = bench(
        "--model", tiny_folder, *TINY, *SHORT, "--num-prompts", "6", "--sweep", "1,3",
        "--goodput", "ttft:5000", "--png", str(picture),
    )  # fmt: skip
    assert [row["label"] for row in report["rows"]] == ["1 at once", "3 at once"]
    for row in report["rows"]:
        assert (row["summary"]["completed"], row["summary"]["failed"]) == (6, 0)
        assert row["summary"]["output_tokens"] == 36
        assert row["summary"]["server_rss_mib"][0] > 50
    # Of both, for the system counts CPU time in ticks, and one row may take less than one.
    assert sum(row["summary"]["server_cpu_seconds"] for row in report["rows"]) > 0
    for line in ("sparserve, 1 at once: ", "sparserve, 3 at once: ", "ms, 6 answered"):
        assert line in err
    for word in ("ms: median, p99", "TTFT", "3 at once", "good"):
        assert word in out
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    again = tmp_path / "again.png"
    status, _, err = run_main("bench", "plot-serve", tmp_path / "report.json", "--png", again)
    assert status == 0, err
    assert again.stat().st_size > 10_000


async def test_a_running_server_is_loaded(spawn, tiny_folder, tmp_path):
    server = await spawn(
        "serve", "--model", tiny_folder, *TINY, "--port", "0", "--metrics-port", "0",
        "--default-policy", "dense",
    )  # fmt: skip
    await server.ready()
    file = tmp_path / "report.json"
    bench = await spawn(
        "bench", "serve", "--server", f"127.0.0.1:{server.port}", "--server-pid",
        str(server.process.pid), *SHORT, "--request-rate", "30", "--burstiness", "0.5",
        "--duration", "1", "--json", file,
    )  # fmt: skip
    status = await bench.ended()
    assert status == 0, bench.lines
    row = json.loads(file.read_text())["rows"][0]
    assert row["label"] == "30/s"
    assert row["summary"]["completed"] > 5
    assert row["summary"]["server_cpu_seconds"] > 0


def test_rivals_have_names_and_processes():
    found = make_targets(
        None,
        Connection("h:1, h:2", {}),
        [7],
        "a=http://h:3/v1,http://h:4/?x=y",
        None,
        [8, 9],
        Wish(),
    )
    assert [(target.name, target.address, list(target.pids)) for target in found] == [
        ("sparserve", "h:1,h:2", [7]),
        ("a", "http://h:3", [8]),
        ("http://h:4/?x=y", "http://h:4/?x=y", [9]),
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset", "sonnet"], "--dataset is 'sonnet'"),
        (["--dataset", "text"], "needs --dataset-path"),
        (["--dataset-path", "x"], "takes no --dataset-path"),
        (["--duration", "3"], "without end"),
        (["--sweep", "1,0"], "--sweep is '1,0'"),
        (["--sweep", "1", "--sweep-of", "users"], "--sweep-of is 'users'"),
        (["--percentiles", "100"], "--percentiles is '100'"),
        (["--goodput", "ttft"], "--goodput has 'ttft'"),
        (["--ramp-up", "linear"], "--ramp-up is 'linear'"),
        (["--server", "127.0.0.1:1", "--threads", "1"], "--threads: for a model that runs here"),
        (["--server", "127.0.0.1:1"], "UNAVAILABLE"),
        (["--server", ","], "it must be host:port"),
        (["--openai", "http://127.0.0.1:1", "--openai-model", "m"], "give --tokenizer"),
        (["--openai", "a=http://h:1,a=http://h:2"], "names a server twice"),
        (["--openai", "h"], "is no address"),
        (["--openai", "http://h", "--openai-pid", "1", "--openai-pid", "2"], "2 processes for 1"),
        (["--json", "/none/x.json"], "the folder of --json"),
        (["--model", "/none"], "/none"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(run_main, flags, words):
    status, _, err = run_main("bench", "serve", *flags)
    assert status == 1
    assert words in err
