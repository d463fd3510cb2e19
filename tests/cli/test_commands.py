"""The other commands: generate, models, demo, and the command itself."""

import asyncio
import io
import re
import subprocess
import sys
from functools import partial

import pytest
from rich.control import strip_control_codes

import sparserve
from sparserve.cli.demo import first_difference
from sparserve.client import AsyncClient, Choice, Generation, Result, make_request
from sparserve.model.catalog import CATALOG

TINY = ("--threads", "1", "--kv-cache-gib", "0.01")


def test_version_is_printed(run_main):
    assert run_main("--version") == (0, f"{sparserve.__version__}\n", "")


def test_without_a_command_help_is_shown(run_main):
    _, out, err = run_main()
    assert all(command in out + err for command in ("serve", "demo", "chat", "generate", "models"))


# What a command may load only when it runs a model here.
HEAVY = ("torch", "transformers", "xgrammar", "tokenizers", "numpy")
LIGHT = [
    ["--version"], ["--help"], ["models"], ["models", "--help"],
    *([name, "--help"] for name in ("demo", "serve", "chat", "generate", "bench", "eval", "calibrate", "compress", "report")),
    *(["bench", name, "--help"] for name in ("decode", "prefill", "engine")),
    ["compress", "--show-recipe", "fast"],
    ["generate", "hello", "--server", "127.0.0.1:1"], ["chat", "--server", "127.0.0.1:1"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_what_runs_no_model_here_starts_without_torch(arguments):
    code = (
        "import atexit, sys; from sparserve.cli import main\n"
        f"atexit.register(lambda: print('loaded', [m for m in {HEAVY} if m in sys.modules]))\n"
        f"sys.argv[1:] = {arguments}; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="hello\n", capture_output=True, text=True, timeout=60
    )
    assert done.stdout.endswith("loaded []\n")
    assert done.returncode == (1 if "--server" in arguments else 0)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["serve"], ["chat"], ["generate"], ["bench"], ["bench", "decode"], ["models"], ["models", "list"]]
)  # fmt: skip
def test_help_shows_a_value_only_where_one_is_taken(run_main, command):
    status, out, _ = run_main(*command, "--help")
    assert (status, "<bool>" in out) == (0, False)
    assert "--help" in out


@pytest.mark.parametrize("arguments", [["nope"], ["serve", "--nope"], ["generate"]])
def test_wrong_usage_is_exit_status_2(run_main, arguments):
    status, _, err = run_main(*arguments)
    assert status == 2
    assert "Usage" in err


def test_generate_prints_the_text_and_a_summary_beside_it(run_main, tiny_folder):
    fields = ["--max-tokens", "12", "--temperature", "1", "--seed", "4"]
    status, out, err = run_main("generate", "hello", "--model", tiny_folder, *TINY, *fields)
    assert status == 0
    assert len(out) > 5
    assert "length: 5 prompt + 12 new tokens" in err
    assert run_main("generate", "hello", "--model", tiny_folder, *TINY, *fields)[1] == out


def test_generate_can_use_the_chat_template_and_report_neurons(run_main, tiny_folder):
    status, _, err = run_main(
        "generate", "hello", "--model", tiny_folder, *TINY, "--max-tokens", "2", "--chat",
        "--report-neurons",
    )  # fmt: skip
    assert status == 0
    assert f"{len('<user>hello' + chr(10) + '<assistant>')} prompt + 2 new" in err
    assert "% of the neurons" in err


def test_a_prompt_too_short_to_report_neurons_is_told(run_main, tiny_folder):
    status, _, err = run_main(
        "generate", "h", "--model", tiny_folder, *TINY, "--max-tokens", "2", "--report-neurons"
    )
    assert status == 0
    assert "--report-neurons needs a prompt of 2 tokens or more" in err


async def test_generate_asks_a_server_and_prints_the_same(run_main, serving, tiny_folder):
    fields = ["--max-tokens", "12", "--temperature", "1", "--seed", "4"]
    async with serving() as server:
        target = f"127.0.0.1:{server.port}"
        there = await asyncio.to_thread(run_main, "generate", "hello", "--server", target, *fields)
        async with AsyncClient(target) as client:
            answer = await client.generate("hello", max_tokens=12, temperature=1, seed=4)
        here = await asyncio.to_thread(
            run_main, "generate", "hello", "--model", tiny_folder, *TINY, *fields
        )
        refused = await asyncio.to_thread(
            run_main, "generate", "hello", "--server", target, "--temperature", "3"
        )
    assert there[0] == 0
    assert there[1] == here[1] == answer.text + "\n"
    assert refused[0] == 1
    assert refused[2].startswith("error: INVALID_ARGUMENT: sampling.temperature is 3")


async def test_generate_asks_a_server_through_its_chat_template(run_main, serving):
    fields = ["--max-tokens", "6", "--seed", "4", "--temperature", "1"]
    async with serving() as server:
        target = f"127.0.0.1:{server.port}"
        status, out, err = await asyncio.to_thread(
            run_main, "generate", "hello", "--server", target, "--chat", *fields
        )
        async with AsyncClient(target) as client:
            message = {"role": "user", "content": "hello"}
            answer = await client.chat([message], max_tokens=6, temperature=1, seed=4)
    assert status == 0
    assert out == strip_control_codes(answer.text) + "\n"
    assert f"{answer.result.prompt_tokens} prompt + 6 new" in err


@pytest.fixture
def sent(monkeypatch):
    """The requests that `sparserve generate` sends, each answered with nothing."""
    requests = []

    async def stream(self, prompt, **fields):
        requests.append(make_request(prompt, **fields))
        for _ in ():
            yield

    async def generate(self, prompt, **fields):
        requests.append(make_request(prompt, **fields))
        result = Result("LENGTH", 1, 2, 0, 0, 0, "dense", 1.0)
        choices = tuple(Choice(i, f"text {i}", "LENGTH") for i in range(fields["n"]))
        return Generation("id", choices, result)

    monkeypatch.setattr(AsyncClient, "stream", stream)
    monkeypatch.setattr(AsyncClient, "generate", generate)
    return requests


def test_generate_sends_what_its_flags_say(run_main, sent, tmp_path):
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.gbnf"
    schema.write_text('{"type": "object"}')
    grammar.write_text('root ::= "ja"')
    flags = {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_k": 3, "top_p": 0.5,
        "min_p": 0.25, "typical_p": 0.75, "repetition_penalty": 1.5, "presence_penalty": 0.5,
        "frequency_penalty": -0.5, "seed": 7,
    }  # fmt: skip
    given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    server = ("generate", "hello", "--server", "127.0.0.1:1")
    assert run_main(*server, *given, "--stop", "a", "--stop", "b")[0] == 0
    assert sent[-1] == make_request("hello", **flags, n=1, stop=["a", "b"])
    assert run_main(*server)[0] == 0
    assert sent[-1] == make_request("hello", temperature=0, n=1)  # the rest is the server's
    more = [
        "--stop-token-id",
        "3",
        "--stop-token-id",
        "4",
        "--logit-bias",
        "5=-1.5",
        "--logit-bias=6=2",
    ]
    assert run_main(*server, *more, "--logprobs", "--report-neurons")[0] == 0
    assert sent[-1] == make_request(
        "hello", temperature=0, n=1, stop_token_ids=[3, 4], logit_bias={5: -1.5, 6: 2}, logprobs=True,
        report_neurons=True,
    )  # fmt: skip
    for flag, value, field in (
        ("--json-schema", schema, {"json_schema": '{"type": "object"}'}),
        ("--grammar", grammar, {"grammar": 'root ::= "ja"'}),
        ("--regex", "a+", {"regex": "a+"}),
        ("--choice", "ja", {"choice": ["ja"]}),
        ("--json-object", "--seed=1", {"json_object": True}),
    ):
        assert run_main(*server, flag, value)[0] == 0
        assert sent[-1].constraint == make_request("hello", **field).constraint


SPARSITY = {
    "policy": "exact", "density": 0.5, "target_kl": 0.25, "choose_by": "gate", "core_density": 0.75,
    "predictor": "stability", "score": "norm", "refresh_interval": 8, "draft": "token", "draft_tokens": 3,
}  # fmt: skip


def test_generate_sends_the_policy_that_its_flags_say(run_main, sent):
    given = [f"--{name.replace('_', '-')}={value}" for name, value in SPARSITY.items()]
    assert run_main("generate", "hello", "--server", "127.0.0.1:1", *given)[0] == 0
    assert sent[-1] == make_request("hello", temperature=0, n=1, **SPARSITY)


async def test_generate_tells_what_a_policy_read_and_dense_tells_nothing(run_main, serving):
    async with serving() as server:
        run = partial(
            asyncio.to_thread, run_main, "generate", "hello there", "--max-tokens", "9", "--server",
            f"127.0.0.1:{server.port}",
        )  # fmt: skip
        _, _, dense = await run()
        _, _, core = await run("--policy", "core", "--density", "0.5", "--refresh-interval", "4")
        status, _, err = await run("--policy", "token")
    assert "policy" not in dense
    # 6 of 8 steps read half, 2 all
    assert "policy core: 62.5% of the feed-forward bytes" in core
    assert "2 refreshes" in core
    assert "of the prompt's score, not settled" in core
    assert status == 1
    assert "sparserve calibrate" in err


async def test_a_chat_has_a_policy(run_main, serving, monkeypatch):
    async with serving() as server:
        monkeypatch.setattr(
            "sys.stdin", io.StringIO("hello\n/set policy dense\n/set density none\nbye\n")
        )
        status, _, err = await asyncio.to_thread(
            run_main, "chat", "--server", f"127.0.0.1:{server.port}", "--policy", "core", "--density",
            "0.5", "--max-tokens", "4",
        )  # fmt: skip
    assert status == 0
    assert err.count("policy core: 50.0%") == 1
    assert err.count("length:") == 2


async def test_generate_lists_tokens_with_their_log_probabilities(run_main, serving):
    fields = ["--max-tokens", "3", "--temperature", "1", "--seed", "4", "--logprobs"]
    async with serving() as server:
        target = f"127.0.0.1:{server.port}"
        _, out, err = await asyncio.to_thread(
            run_main, "generate", "hi", "--server", target, *fields
        )
        two = await asyncio.to_thread(
            run_main, "generate", "hi", "--server", target, *fields, "--n", "2"
        )
        async with AsyncClient(target) as client:
            answer = await client.generate(
                "hi", max_tokens=3, temperature=1, seed=4, logprobs=True, n=2
            )
    assert out == strip_control_codes(answer.text) + "\n"
    for table, tokens in (
        (err, answer.choices[0].tokens),
        (two[2], [token for choice in answer.choices for token in choice.tokens]),
    ):
        rows = [line.split("│") for line in table.splitlines() if line.startswith("│")]
        assert [int(row[2]) for row in rows] == [token.id for token in tokens]
        assert [float(row[3]) for row in rows] == pytest.approx(
            [token.logprob for token in tokens], abs=1e-4
        )


async def test_generate_puts_a_system_message_before_its_chat(run_main, serving):
    flags = ["--chat", "--system", "Be kind.", "--max-tokens", "4"]
    async with serving() as server:
        target = f"127.0.0.1:{server.port}"
        _, out, _ = await asyncio.to_thread(run_main, "generate", "hi", "--server", target, *flags)
        async with AsyncClient(target) as client:
            messages = [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "hi"},
            ]
            answer = await client.chat(messages, max_tokens=4, temperature=0)
    assert out == strip_control_codes(answer.text) + "\n"


def test_generate_prints_each_of_several_texts(run_main, sent):
    status, out, err = run_main("generate", "hello", "--server", "127.0.0.1:1", "--n", "2")
    assert (status, out) == (0, "text 0\ntext 1\n")
    assert "1 of 2, length:" in err
    assert "2 of 2, length:" in err


def test_generate_tells_of_a_file_that_cannot_be_read(run_main, tmp_path):
    status, _, err = run_main(
        "generate", "hello", "--server", "127.0.0.1:1", "--json-schema", tmp_path / "none"
    )
    assert status == 1
    assert str(tmp_path / "none") in err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--temperature", "3"], "sampling.temperature is 3"),
        (["--logit-bias", "5"], "--logit-bias 5: each must be a token id and a number"),
        (["--logit-bias", "a=1"], "--logit-bias a=1: each must be"),
        (["--system", "Be kind."], "--system is for a chat; give --chat too"),
        (["--n", "0"], "sampling.n is 0"),
        (["--regex", "a", "--choice", "b"], "choice is a second constraint"),
        (["--max-tokens", "0"], "stopping.max_tokens is 0"),
        (["--model", "/nowhere"], "no model at '/nowhere'"),
        (["--server", "127.0.0.1:1"], "--model"),  # it has a model of its own
    ],
)
def test_generate_tells_what_is_wrong_in_one_line(run_main, tiny_folder, flags, told):
    status, _, err = run_main("generate", "hello", "--model", tiny_folder, *TINY, *flags)
    assert status == 1
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert told in line


def test_generate_tells_of_a_server_that_is_not_there(run_main, monkeypatch):
    monkeypatch.setenv("SPARSERVE_THREADS", "2")  # for other commands, and no contradiction here
    status, _, err = run_main("generate", "hello", "--server", "127.0.0.1:1")
    assert status == 1
    (line,) = err.splitlines()
    assert line.startswith("error: UNAVAILABLE: ")


def test_models_are_listed_and_an_unknown_one_cannot_be_fetched(run_main):
    for arguments in (["models"], ["models", "list"]):
        status, out, _ = run_main(*arguments)
        assert status == 0
        assert "smollm2" in out
        assert "Apache" in out
        assert all(name in out for name in CATALOG)  # not cut at 80 columns
    status, _, err = run_main("models", "fetch", "nope")
    assert status == 1
    assert err.startswith("error: no model is named 'nope'; there are: smollm2-135m-instruct")


def test_the_demo_answers_dense_beside_sparse_and_shows_speeds_and_metrics(run_main, monkeypatch):
    monkeypatch.setenv("SPARSERVE_MAX_CONTEXT", "256")
    monkeypatch.setenv("SPARSERVE_KV_CACHE_GIB", "0.05")
    question = "What is the capital of France?"
    status, out, err = run_main("demo", "--question", question, "--max-tokens", "8")
    assert status == 0
    assert "Paris" in out.split(question)[1]
    assert re.search(r"dense .* core ", out)
    assert re.search(r"\d tokens/s, TTFT \d+ ms .* \d+ tokens/s, TTFT \d+ ms", out)
    assert re.search(r"100 % of MLP bytes .* 80 % of MLP bytes", out)
    assert out.count("▶") in (0, 2)
    assert "sparserve_generation_tokens_total 16.0" in out
    assert "backend cpu (" in err


def test_the_demo_shows_the_token_policy_of_an_index(run_main, tiny_folder, tmp_path, monkeypatch):
    for name, value in (
        ("MODEL", str(tiny_folder)),
        ("BACKEND", "reference"),
        ("THREADS", "1"),
        ("KV_CACHE_GIB", "0.01"),
    ):
        monkeypatch.setenv(f"SPARSERVE_{name}", value)
    text, index = tmp_path / "text", tmp_path / "index"
    text.write_text("rivers and stones and birds that sing over green hills. " * 60)
    sizes = ["--windows", "4", "--prompt-tokens", "40", "--decode-tokens", "8", "--quick"]
    status, _, err = run_main("calibrate", tiny_folder, "--text", text, "--out", index, *sizes)
    assert status == 0, err
    status, out, err = run_main("demo", "--index", index, "--question", "hi", "--max-tokens", "6")
    assert status == 0, err
    assert re.search(r"dense .* token ", out)
    share = re.search(r"100 % of MLP bytes .* (\d+) % of MLP bytes, predicted KL 0\.0", out)
    assert share is not None
    assert int(share[1]) < 100


def test_the_demo_tells_of_an_index_that_is_none(run_main, tmp_path):
    status, _, err = run_main("demo", "--index", tmp_path / "none")
    assert status == 1
    assert "none" in err


@pytest.mark.parametrize(
    ("one", "other", "word"),
    [
        ("a b c", "a b c", None),
        ("a b c", "a x c", 1),
        ("a b", "a b c", 2),
        ("a b c", "a b", 2),
        ("x", "y", 0),
        ("", "y", 0),
        ("a  b", "a b", 1),
    ],
)
def test_where_two_answers_part(one, other, word):
    assert first_difference(one, other) == word
