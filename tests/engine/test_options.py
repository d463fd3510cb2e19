"""What each option of a request does to its text, on the real reference backend."""

import pytest
import torch

from sparserve.engine.request import (
    FinishReason,
    GenerationRequest,
    OutputParams,
    SamplingParams,
    StoppingParams,
    Update,
)
from sparserve.errors import InvalidRequest, SparserveError
from sparserve.model.backend import ForwardBatch, Phase, SequenceInput

GREEDY = SamplingParams(temperature=0)
PROMPT = tuple(range(30, 80))
EOS = 257  # of the tiny model


@pytest.fixture
def generate(tiny_engine, finish_all):
    """The choices that one request alone gets."""

    def run(
        prompt=PROMPT, sampling=GREEDY, output=OutputParams(), engine=None, **stopping
    ) -> list[Update]:
        stopping = {"max_tokens": 12, "ignore_eos": True, **stopping}
        request = GenerationRequest(
            "a", tuple(prompt), sampling, StoppingParams(**stopping), output
        )
        return list(finish_all(engine or tiny_engine(), [request]).values())

    return run


def ids_of(update: Update) -> list[int]:
    return [token.id for token in update.tokens]


@pytest.fixture
def greedy_ids(generate) -> list[int]:
    return ids_of(generate()[0])


def test_allowed_tokens_are_the_only_ones(generate):
    sampling = SamplingParams(seed=1, allowed_token_ids=(65, 66, 70))
    (update,) = generate(sampling=sampling, max_tokens=60)
    assert set(ids_of(update)) == {65, 66, 70}


def test_a_bias_of_100_forces_a_token_and_of_minus_100_forbids_it(generate, greedy_ids):
    (forced,) = generate(sampling=SamplingParams(temperature=0, logit_bias=((65, 100.0),)))
    assert ids_of(forced) == [65] * 12
    banned = greedy_ids[0]
    (without,) = generate(sampling=SamplingParams(temperature=0, logit_bias=((banned, -100.0),)))
    assert banned not in ids_of(without)


def test_a_frequency_penalty_ends_a_loop(generate):
    """Forced to one token, a growing penalty at last exceeds the bias."""
    sampling = SamplingParams(temperature=0, logit_bias=((65, 30.0),), frequency_penalty=2.0)
    (update,) = generate(sampling=sampling, max_tokens=40)
    ids = ids_of(update)
    assert ids[:5] == [65] * 5
    assert 0 < ids.count(65) < 40


def test_a_repetition_penalty_counts_the_prompt_too(generate, greedy_ids):
    prompt = (*PROMPT, greedy_ids[0])
    plain, penalized = (
        ids_of(
            generate(prompt, SamplingParams(temperature=0, repetition_penalty=p), max_tokens=40)[0]
        )
        for p in (1.0, 5.0)
    )
    assert len(set(penalized)) > len(set(plain))
    assert not set(penalized[:10]) & set(prompt)


def test_min_tokens_holds_back_eos_stop_tokens_and_stop_strings(generate, greedy_ids):
    always_eos = SamplingParams(temperature=0, logit_bias=((EOS, 100.0),))
    (update,) = generate(sampling=always_eos, ignore_eos=False, min_tokens=7)
    assert len(update.tokens) == 8
    assert update.finish.reason is FinishReason.STOP_EOS
    (update,) = generate(ignore_eos=False, min_tokens=5, stop_token_ids=(greedy_ids[2],))
    assert greedy_ids[2] not in ids_of(update)[:5]
    always_a = SamplingParams(temperature=0, logit_bias=((32, 100.0),))  # "A"
    (update,) = generate(sampling=always_a, min_tokens=5, stop=("AA",))
    assert (update.text, len(update.tokens)) == ("AAA", 5)
    assert update.finish.reason is FinishReason.STOP_STRING


@pytest.mark.parametrize(("include", "text"), [(False, "AAA"), (True, "AAAB")])
def test_a_stop_token_ends_the_text(generate, include, text):
    # "A" until its penalty lets "B" through.
    sampling = SamplingParams(
        temperature=0, allowed_token_ids=(32, 33), logit_bias=((32, 50.0), (33, 44.0)), frequency_penalty=2.0
    )  # fmt: skip
    whole = generate(sampling=sampling)[0].text
    first_b = whole.index("B")
    (update,) = generate(sampling=sampling, stop_token_ids=(33,), include_stop=include)
    assert update.finish.reason is FinishReason.STOP_TOKEN
    assert update.finish.stop_token_id == 33
    assert update.text == whole[: first_b + include]
    assert set(whole[:first_b]) == {"A"}
    (update,) = generate(sampling=sampling, stop=("AB",), include_stop=include)
    assert update.finish.reason is FinishReason.STOP_STRING
    assert update.text == whole[: first_b - 1 + 2 * include]


def test_special_tokens_are_in_the_text_where_asked_for(generate):
    sampling = SamplingParams(temperature=0, logit_bias=((256, 100.0),))
    for skip, text in ((True, ""), (False, "<bos>" * 3)):
        output = OutputParams(skip_special_tokens=skip)
        assert generate(sampling=sampling, output=output, max_tokens=3)[0].text == text
    output, eos = (
        OutputParams(skip_special_tokens=False),
        SamplingParams(0, logit_bias=((EOS, 100.0),)),
    )
    (update,) = generate(sampling=eos, output=output, ignore_eos=False, include_stop=True)
    assert (update.text, update.finish.reason) == ("<eos>", FinishReason.STOP_EOS)


def whole_logits(engine, tokens) -> torch.Tensor:
    """[tokens, vocab]: what the model says after each token of one prefill."""
    blocks = tuple(range(len(tokens) // 16 + 1))
    offsets = tuple(range(len(tokens)))
    batch = ForwardBatch([SequenceInput(tokens, 0, blocks, Phase.PREFILL, output_offsets=offsets)])
    candidates = engine.backend.forward(batch).candidates
    return torch.stack([candidates.full_logits(row).clone() for row in offsets])


@pytest.mark.parametrize("budget", [512, 37])
@pytest.mark.parametrize("num_top", [0, 3])
def test_prompt_log_probabilities_are_those_of_the_model(tiny_engine, generate, budget, num_top):
    prompt = [(7 * i) % 256 for i in range(150)]
    engine = tiny_engine(max_batched_tokens=budget)
    expected = torch.log_softmax(whole_logits(engine, prompt).double(), dim=-1)
    for _ in range(2):  # the second could take the prompt from the cache
        (update,) = generate(prompt, output=OutputParams(prompt_logprobs=num_top), engine=engine)
        assert [token.id for token in update.prompt] == prompt
        assert update.prompt[0].logprob is None
        for position, token in enumerate(update.prompt[1:]):
            row = expected[position]
            assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
            top = row.topk(num_top)
            assert [t.id for t in token.top] == top.indices.tolist()
            assert [t.logprob for t in token.top] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert update.finish.cached_tokens == 0


def test_prompt_log_probabilities_do_not_depend_on_chunks_or_preemption(tiny_engine, finish_all):
    prompt = tuple((7 * i) % 256 for i in range(150))
    wanted = GenerationRequest(
        "a", prompt, GREEDY, StoppingParams(max_tokens=3), OutputParams(prompt_logprobs=2)
    )
    others = [
        GenerationRequest(
            str(i), prompt[i:], GREEDY, StoppingParams(max_tokens=60, ignore_eos=True)
        )
        for i in range(3)
    ]
    alone = finish_all(tiny_engine(), [wanted])["a", 0]
    for budget in (512, 16):
        crowd = finish_all(tiny_engine(max_batched_tokens=budget), [*others, wanted], stagger=2)
        assert crowd["a", 0].prompt == alone.prompt


def test_top_log_probabilities_come_with_each_token_of_the_unpenalized_model(generate, greedy_ids):
    (update,) = generate(output=OutputParams(top_logprobs=4))
    assert all(len(token.top) == 4 for token in update.tokens)
    assert [token.top[0].id for token in update.tokens] == greedy_ids
    assert all(token.top[0].logprob == token.logprob for token in update.tokens)
    biased = SamplingParams(temperature=0, logit_bias=((65, 100.0),))
    (update,) = generate(sampling=biased, output=OutputParams(top_logprobs=1), max_tokens=1)
    assert update.tokens[0].top[0].id == greedy_ids[0]
    assert update.tokens[0].logprob < update.tokens[0].top[0].logprob


def test_choices_differ_and_the_first_is_the_only_one_of_n_1(generate):
    alone = generate(sampling=SamplingParams(seed=9))
    choices = generate(sampling=SamplingParams(seed=9, n=5))
    assert choices[0].tokens == alone[0].tokens
    assert len({tuple(ids_of(choice)) for choice in choices}) == 5
    assert [choice.index for choice in choices] == list(range(5))
    assert choices == generate(sampling=SamplingParams(seed=9, n=5)) or [
        c.tokens for c in choices
    ] == [c.tokens for c in generate(sampling=SamplingParams(seed=9, n=5))]
    greedy = generate(sampling=SamplingParams(temperature=0, n=3))
    assert len({tuple(ids_of(choice)) for choice in greedy}) == 1


@pytest.mark.parametrize("cache", ["true", "false"])
def test_other_choices_share_the_first_ones_prompt(tiny_engine, generate, cache):
    engine = tiny_engine(prefix_cache=cache)
    choices = generate(sampling=SamplingParams(seed=9, n=4), engine=engine)
    assert [c.finish.cached_tokens for c in choices] == [0] + [48 if cache == "true" else 0] * 3
    assert engine.metrics.prompt_tokens._value.get() == len(PROMPT)


def test_abort_ends_every_choice_also_those_not_begun(tiny_engine):
    engine = tiny_engine()
    engine.add(GenerationRequest("a", PROMPT, SamplingParams(n=3)))
    updates = engine.abort("a")
    assert {u.index for u in updates} == {0, 1, 2}
    assert all(u.finish.reason is FinishReason.CANCELLED for u in updates)
    assert not engine.has_work
    assert engine.used_blocks == engine.num_waiting == 0


def refused(engine, **fields) -> SparserveError:
    request = GenerationRequest("a", fields.pop("prompt", PROMPT), **fields)
    with pytest.raises(InvalidRequest) as error:
        engine.validate(request)
    return error.value


@pytest.mark.parametrize(
    ("fields", "field", "named"),
    [
        ({"sampling": SamplingParams(n=17)}, "sampling.n", ["17", "16"]),
        ({"sampling": SamplingParams(logit_bias=((259, 1.0),))}, "sampling.logit_bias[0]", ["259"]),
        (
            {"sampling": SamplingParams(allowed_token_ids=(1, -1))},
            "sampling.allowed_token_ids[1]",
            ["-1", "259"],
        ),
        (
            {"stopping": StoppingParams(stop_token_ids=(300,))},
            "stopping.stop_token_ids[0]",
            ["300"],
        ),
        ({"stopping": StoppingParams(max_tokens=101)}, "stopping.max_tokens", ["101", "100"]),
        (
            {"stopping": StoppingParams(max_tokens=5, min_tokens=6)},
            "stopping.min_tokens",
            ["6", "5"],
        ),
        ({"stopping": StoppingParams(min_tokens=51)}, "stopping.min_tokens", ["51", "50"]),
    ],
)
def test_what_exceeds_the_limits_is_refused(tiny_engine, fields, field, named):
    engine = tiny_engine(max_new_tokens=100, default_max_tokens=50)
    error = refused(engine, **fields)
    assert error.field == field
    assert all(part in str(error) for part in named)


def test_options_that_leave_no_token_end_the_request_alone_with_a_clear_error(tiny_engine):
    engine = tiny_engine()
    impossible = GenerationRequest(
        "a", PROMPT, SamplingParams(allowed_token_ids=(EOS,)), StoppingParams(min_tokens=2)
    )
    engine.add(impossible)
    engine.add(
        GenerationRequest("b", PROMPT[:9], GREEDY, StoppingParams(max_tokens=4, ignore_eos=True))
    )
    finishes = {}
    while engine.has_work:
        finishes |= {u.request_id: u.finish for u in engine.step() if u.finish}
    assert isinstance(finishes["a"].error, InvalidRequest)
    assert "no token is left" in str(finishes["a"].error)
    assert finishes["b"].reason is FinishReason.LENGTH
    assert engine.broken is None


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.05)])
def test_a_draw_beyond_what_rounding_left_takes_a_token_that_can_come(monkeypatch, sampling):
    """The candidates hold all the probability, up to rounding; the draw falls into the rest."""
    from sparserve.engine import sampler

    class Late:
        def random(self) -> float:
            return 1 - 2**-53

    monkeypatch.setattr(sampler.np.random, "Generator", lambda _: Late())
    for seed in range(30):
        logits = torch.randn(1000, generator=torch.Generator().manual_seed(seed)).numpy() * 3
        allowed = [(seed + 7 * i) % 1000 for i in range(40)]
        masked = logits.copy()
        masked[:] = -float("inf")
        masked[allowed] = logits[allowed]
        row = sampler.adjusted_row(masked, sampling.softmax_temperature)
        assert sampler.sample(row, sampling, 0, 0, 0) in allowed


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=1e-46), SamplingParams(1e-30)])
def test_the_smallest_temperatures_are_as_good_as_greedy(generate, greedy_ids, sampling):
    assert ids_of(generate(sampling=sampling)[0]) == greedy_ids


def test_a_failed_first_choice_ends_those_that_wait_for_its_prompt(tiny_engine, monkeypatch):
    engine = tiny_engine()
    real = engine.backend.forward

    def poisoned(batch: ForwardBatch):
        if any(66 in sequence.token_ids for sequence in batch.sequences):
            raise RuntimeError("planted")
        return real(batch)

    monkeypatch.setattr(engine.backend, "forward", poisoned)
    for attempt in range(5):
        engine.add(GenerationRequest(f"bad {attempt}", (66,) * 40, SamplingParams(n=4)))
        updates = engine.step()
        assert [u.finish.reason for u in updates] == [FinishReason.ERROR] * 4
        assert not engine.has_work
    assert engine.broken is None, "one request, however often, does not end the server"
    assert engine.used_blocks == 0
