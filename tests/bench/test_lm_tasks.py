"""lm-eval's requests on the engine against plain transformers, and a local task file to its end."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from sparserve.bench.lm_eval_model import EngineModel
from sparserve.cli import app
from sparserve.config import EngineSettings
from sparserve.engine.factory import assemble_engine
from sparserve.errors import ConfigError
from sparserve.model.backend import Phase

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of lm-eval's own imports
CONTEXT = 96


@pytest.fixture
def engine(tiny_model):
    settings = EngineSettings(
        threads=1, kv_cache_gib=0.01, max_context=CONTEXT, max_running=4, max_batched_tokens=16,
        prefix_cache=False,
    )  # fmt: skip
    return assemble_engine(tiny_model, settings).engine


@pytest.fixture
def model(engine) -> EngineModel:
    return EngineModel(engine, lambda *_: None)


@pytest.fixture(scope="module")
def theirs(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


def instances(kind: str, *arguments) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def plain_score(theirs, before: list[int], scored: list[int]) -> tuple[float, bool]:
    with torch.inference_mode():
        logits = theirs(torch.tensor([before + scored])).logits[0, len(before) - 1 : -1]
    logprobs = logits.double().log_softmax(dim=-1)
    targets = torch.tensor(scored)
    total = float(logprobs.gather(1, targets[:, None]).sum())
    return total, bool((logits.argmax(dim=-1) == targets).all())


PAIRS = [
    ("The sky is", " blue"),
    ("The sky is", " a wide field of grey and of other colours"),
    ("", "no context"),
    ("x" * 90, " and more than fits"),
    ("ends in a space ", "so"),
    ("one", "!"),
]


def test_likelihoods_are_those_of_transformers(model, theirs, tiny_model):
    scores = model.loglikelihood(instances("loglikelihood", *PAIRS))
    assert len({greedy for _, greedy in scores}) == 1  # random weights guess nothing
    for (context, continuation), (total, greedy) in zip(PAIRS, scores, strict=True):
        before = tiny_model.tokenizer.encode(context).ids or [256]  # <bos>
        scored = tiny_model.tokenizer.encode(continuation).ids
        if context.endswith(" "):
            before, scored = before[:-1], before[-1:] + scored
        whole = before[-(CONTEXT + 1 - len(scored)) :]
        expected, expected_greedy = plain_score(theirs, whole, scored)
        assert total == pytest.approx(expected, abs=1e-3)
        assert greedy == expected_greedy


def greedy_tokens(theirs, before: list[int], count: int) -> list[int]:
    ids = list(before)
    for _ in range(count):
        with torch.inference_mode():
            ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(before) :]


def test_what_the_model_says_itself_is_greedy(model, theirs):
    before = [72, 101, 108, 108]
    own = greedy_tokens(theirs, before, 6)
    other = [*own[:-1], (own[-1] + 1) % 256]
    requests = [(("", ""), before, scored) for scored in (own, other)]
    (same, greedy), (less, not_greedy) = model._loglikelihood_tokens(requests)
    assert (greedy, not_greedy) == (True, False)
    assert less < same


def test_scored_tokens_are_decoded_and_nothing_else(engine, model):
    seen = []
    forward = engine.backend.forward

    def watch(batch):
        seen.extend((s.phase, tuple(s.token_ids), s.start) for s in batch.sequences)
        return forward(batch)

    engine.backend.forward = watch
    model.loglikelihood(instances("loglikelihood", ("abc", "de")))
    prefilled = [(tokens, start) for phase, tokens, start in seen if phase is Phase.PREFILL]
    decoded = [(tokens, start) for phase, tokens, start in seen if phase is Phase.DECODE]
    ids = engine.tokenizer.encode("abcde", 10)
    assert prefilled == [(ids[:2], 0)]
    assert decoded == [(ids[2:4], 2)]


def test_rolling_likelihoods_score_each_token_once(model, theirs, tiny_model):
    texts = ["short", "A text that is longer than the context of ninety-six tokens. " * 4, ""]
    found = model.loglikelihood_rolling(instances("loglikelihood_rolling", *((t,) for t in texts)))
    for text, total in zip(texts, found, strict=True):
        ids, expected = tiny_model.tokenizer.encode(text).ids, 0.0
        for first in range(0, len(ids), CONTEXT):
            # The first window begins with <bos>; later ones see all the context that there is room for.
            part = ids[first : first + CONTEXT]
            stop = first + len(part)
            before = [256] if first == 0 else ids[max(0, stop - CONTEXT - 1) : first]
            expected += plain_score(theirs, before, part)[0]
        assert total == pytest.approx(expected, abs=5e-3)


def test_texts_are_generated_greedily_until_a_stop(model, theirs, tiny_model):
    encode, decode = tiny_model.tokenizer.encode, tiny_model.tokenizer.decode

    def plain(prompt: str, count: int) -> str:
        return decode(greedy_tokens(theirs, encode(prompt).ids, count))

    prompts = ["Once", "Twice upon a time", "x" * 200]
    options = {"until": [], "max_gen_toks": 12, "do_sample": False}
    found = model.generate_until(instances("generate_until", *((p, options) for p in prompts)))
    expected = [plain(prompt[-(CONTEXT - 12) :], 12) for prompt in prompts]
    # A stream tells bytes that are no characters at other places than a whole text does.
    assert [t.replace("�", "") for t in found] == [t.replace("�", "") for t in expected]
    stop = found[0][4:6]
    (cut,) = model.generate_until(instances("generate_until", ("Once", {**options, "until": stop})))
    assert cut == found[0][: found[0].index(stop)]


def test_tasks_that_sample_are_refused(model):
    options = {"do_sample": True, "temperature": 0.7}
    with pytest.raises(ConfigError, match="do_sample: false"):
        model.generate_until(instances("generate_until", ("Once", options)))


def test_a_continuation_longer_than_the_context_is_refused(model):
    with pytest.raises(
        ConfigError, match="continuation of 97 tokens does not fit the context of 96"
    ):
        model.loglikelihood(instances("loglikelihood", ("a", "b" * 97)))


@pytest.fixture
def task_folder(tmp_path):
    rows = [
        {"query": "The sky is", "choices": [" blue", " a stone"], "gold": 0},
        {"query": "Grass is", "choices": [" loud", " green", " seven"], "gold": 1},
        {"query": "Two and two make", "choices": [" four", " five"], "gold": 0},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "colours.yaml").write_text(
        f"""
task: local_colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
    )
    return folder, rows


@pytest.fixture
def asked(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    sizes = ["--threads", "1", "--kv-cache-gib", "0.01", "--max-context", str(CONTEXT)]
    return ["eval", "--model", str(tiny_folder), *sizes]


def test_a_local_task_runs_to_its_row(asked, task_folder, theirs, tiny_model, tmp_path):
    folder, rows = task_folder
    flags = [
        "--tasks",
        "local_colours",
        "--task-folder",
        str(folder),
        "--json",
        str(tmp_path / "r.json"),
    ]
    result = CliRunner().invoke(app, [*asked, *flags, "--formats", "float32,bfloat16"])
    assert result.exit_code == 0, result.output
    encode = tiny_model.tokenizer.encode
    right = 0
    for row in rows:
        scores = [
            plain_score(theirs, encode(row["query"]).ids, encode(choice).ids)[0]
            for choice in row["choices"]
        ]
        right += scores.index(max(scores)) == row["gold"]
    report = json.loads((tmp_path / "r.json").read_text())
    assert [row["format"] for row in report] == ["float32", "bfloat16"]
    assert report[0] == {
        "system": "sparserve", "format": "float32", "policy": "dense", "density": 1.0, "refresh": 0,
        "task": "local_colours", "metric": "acc", "value": pytest.approx(right / 3),
        "stderr": report[0]["stderr"], "samples": 3,
    }  # fmt: skip
    assert report[0]["stderr"] > 0 or right in (0, 3)
    assert "local_colours" in result.output


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--tasks", "local_colour"], "no task 'local_colour', nor has --task-folder; near it: local_colours"),
        (["--tasks", "x", "--task-folder", "/no/such/folder"], "/no/such/folder does not exist"),
        (["--tasks", "local_colours", "text"], "a text or --tasks, not both"),
        (["--tasks", "local_colours", "--peers", "llama.cpp:Q8_0"], "--peers, --policies and --original are for a text"),
        (["text"], "--task-folder and --limit are for --tasks"),
        ([], "a text or --tasks"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_told(asked, task_folder, flags, told):
    folder, _ = task_folder
    result = CliRunner().invoke(app, [*asked, "--task-folder", str(folder), *flags])
    assert isinstance(result.exception, ConfigError)
    assert told in str(result.exception)


def test_a_task_whose_data_is_missing_is_told(asked, task_folder, tmp_path):
    (tmp_path / "rows.jsonl").unlink()
    result = CliRunner().invoke(
        app, [*asked, "--task-folder", str(task_folder[0]), "--tasks", "local_colours"]
    )
    assert isinstance(result.exception, ConfigError)
    assert "rows.jsonl" in str(result.exception)
