"""The words for policies: each means what is written beside it, and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_kernels.choice import ChoiceKind, Score
from sparserve.bench.policies import PolicySpec, parse_policies
from sparserve.errors import ConfigError
from sparserve.sparsity.policy import DraftKind, Policy, PolicyKind, PredictorKind

TABLE = {
    "dense": Policy(),
    "auto": Policy(PolicyKind.AUTO),
    "core:0.5": Policy(PolicyKind.CORE, 0.5),
    "core:1.0": Policy(PolicyKind.CORE, 1.0),
    "core:0.4/stability/signed_count/alpha=0.4/layers=6-26": Policy(
        PolicyKind.CORE,
        0.4,
        predictor=PredictorKind.STABILITY,
        score=Score.SIGNED_COUNT,
        alpha=0.4,
        first_layer=6,
        last_layer=27,  # the first that is dense again
    ),
    "token:0.6/planes": Policy(PolicyKind.TOKEN, 0.6, choice=ChoiceKind.PLANES),
    "token:0.55/gate/refresh=16": Policy(
        PolicyKind.TOKEN, 0.55, choice=ChoiceKind.GATE, refresh_interval=16
    ),
    "core:0.7+token:0.5": Policy(PolicyKind.TOKEN, 0.5, core_density=0.7),
    "kl:0.05": Policy(PolicyKind.AUTO, target_kl=0.05),
    "exact": Policy(PolicyKind.EXACT),
    "exact:0.5/draft=core/drafts=4": Policy(
        PolicyKind.EXACT, 0.5, draft=DraftKind.CORE, draft_tokens=4
    ),
}


@pytest.mark.parametrize(("words", "policy"), TABLE.items())
def test_words_and_their_policy(words, policy):
    assert PolicySpec.parse(words) == PolicySpec(policy)
    assert str(PolicySpec(policy)) == words


def test_other_ways_to_say_it():
    spec = PolicySpec.parse(" core:.50/alpha=4e-1/count ")
    assert str(spec) == "core:0.5/count/alpha=0.4"
    assert parse_policies("dense,core:0.5, core:.5,token:1") == [
        PolicySpec.parse(words) for words in ("dense", "core:0.5", "token:1")
    ]


shares = st.floats(0, 1, exclude_min=True)
core = st.fixed_dictionaries(
    {},
    optional={
        "predictor": st.sampled_from(PredictorKind),
        "score": st.sampled_from(Score),
        "alpha": shares,
        "refresh_interval": st.integers(1, 10**6),
    },
)
layers = st.tuples(st.integers(0, 500), st.integers(1, 500)).map(
    lambda pair: {"first_layer": pair[0], "last_layer": sum(pair)}
)
choice = st.fixed_dictionaries({}, optional={"choice": st.sampled_from(ChoiceKind)})
drafts = st.fixed_dictionaries(
    {}, optional={"draft": st.sampled_from(DraftKind), "draft_tokens": st.integers(1, 99)}
)


@given(
    st.one_of(
        st.builds(
            lambda own, d, at: Policy(PolicyKind.CORE, d, **own, **at),
            core,
            shares,
            st.just({}) | layers,
        ),
        st.builds(
            lambda own, d, c, k: Policy(PolicyKind.TOKEN, d, core_density=c, **own, **k),
            core,
            shares,
            shares,
            choice,
        ),
        st.builds(lambda kl: Policy(PolicyKind.AUTO, target_kl=kl), st.floats(1e-300, 1e300)),
        st.builds(
            lambda own, d, k: Policy(PolicyKind.EXACT, d, **own, **k),
            drafts,
            st.none() | shares,
            choice,
        ),
    )
)
def test_every_policy_comes_back_from_its_words(policy):
    assert PolicySpec.parse(str(PolicySpec(policy))).policy == policy


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "begins with ''; a policy is one of dense, auto, core:0.5"),
        ("sparse:0.5", "begins with 'sparse:0.5'; a policy is one of"),
        ("core", "begins with 'core'; a policy is one of dense, auto, core:0.5"),
        ("token:0.5+core:0.7", "'0.5+core:0.7' is not a density"),
        ("token:0.5+token:0.7", "begins with 'token:0.5+token:0.7'; a policy is one of"),
        ("core:0", "'0' is not a density, which is in"),
        ("core:1.01", "'1.01' is not a density"),
        ("token:nan", "'nan' is not a density"),
        ("kl:inf", "'inf' is not a KL, which is a number above 0"),
        ("core:0.5/plane", "no option 'plane'; there are planes, gate"),
        ("core:0.5/planes", "core:0.5 has no option 'planes'; it has alpha, layers"),
        ("dense/refresh=4", "dense has no option 'refresh=4'; it has none"),
        ("token:0.6/refresh=0", "'0' is no whole number from 1 on"),
        ("core:0.5/layers=9-6", "layers=9-6 is no range of layers, as in layers=6-26"),
        ("core:0.5/layers=9", "layers=9 is no range of layers"),
        ("core:0.5/norm/count", "says twice what its score is"),
        ("core:0.5/norm/norm", "says twice what its score is"),
        ("core:0.5/alpha=2", "'2' is not alpha, which is in"),
        ("exact/draft=model", "no option 'draft=model'"),
    ],
)
def test_what_is_wrong_is_told(words, told):
    with pytest.raises(ConfigError) as error:
        PolicySpec.parse(words)
    assert told in str(error.value)
