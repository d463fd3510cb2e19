"""What config.json and GGUF metadata may say, and what is refused by name."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserve.errors import CorruptCheckpoint, ModelError, UnsupportedModel
from sparserve.model.config import FAMILIES, ModelConfig
from sparserve.model.rope import RopeConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 4096,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
MISTRAL = {"architectures": ["MistralForCausalLM"]}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"]}
WINDOW = {**QWEN2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5e5,
    "tokenizer.ggml.tokens": ["a"] * 300,
    "tokenizer.ggml.eos_token_id": 2,
}


def from_hf(generation: dict | None = None, **changes: object) -> ModelConfig:
    return ModelConfig.from_hf({**LLAMA, **changes}, generation or {})


def from_gguf(**changes: object) -> ModelConfig:
    fields = {**GGUF, **{key.replace("__", "."): value for key, value in changes.items()}}
    fields = {key: value for key, value in fields.items() if value is not None}
    return ModelConfig.from_gguf(fields, frozenset())


def test_what_config_json_leaves_out_takes_transformers_defaults():
    config = ModelConfig.from_hf(
        {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "rms_norm_eps")}, {}
    )
    assert config.num_kv_heads == 4
    assert config.head_dim == 16
    assert config.rms_norm_eps == 1e-6
    assert config.max_position_embeddings == 2048
    assert config.rope == RopeConfig(theta=10000.0)
    assert not config.tie_word_embeddings
    assert config.eos_token_ids == ()
    assert config.bos_token_id is None


def test_null_counts_as_left_out():
    config = from_hf(head_dim=None, num_key_value_heads=None, rope_scaling=None, bos_token_id=None)
    assert (config.head_dim, config.num_kv_heads, config.rope.kind) == (16, 4, "default")


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (2, {}, (2,)),
        ([2, 5], {}, (2, 5)),
        (2, {"eos_token_id": 7}, (7,)),
        (2, {"eos_token_id": [7, 8]}, (7, 8)),
        (2, {"eos_token_id": None}, ()),
        (None, {}, ()),
    ],
)
def test_eos_ids_come_from_generation_config_before_config(in_config, in_generation, expected):
    assert from_hf(in_generation, eos_token_id=in_config).eos_token_ids == expected


def test_old_and_new_forms_of_rope_mean_the_same():
    old = from_hf(rope_theta=5e5, rope_scaling=LLAMA3)
    new = from_hf(rope_parameters={"rope_theta": 5e5, **LLAMA3})
    assert old.rope == new.rope == RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 4096)
    typed = from_hf(rope_scaling={"type": "linear", "factor": 2})
    assert typed.rope == RopeConfig(kind="linear", factor=2.0)


def test_yarn_takes_transformers_defaults_and_the_extended_context():
    config = from_hf(max_position_embeddings=512, rope_scaling=YARN)
    assert config.rope.attention_factor == pytest.approx(1 + 0.1 * math.log(4))
    assert (config.rope.beta_fast, config.rope.beta_slow, config.rope.truncate) == (32, 1, True)
    assert config.max_position_embeddings == 2048
    assert from_hf(max_position_embeddings=4096, rope_scaling=YARN).max_position_embeddings == 4096
    dynamic = from_hf(max_position_embeddings=512, rope_scaling={"type": "dynamic", "factor": 2.5})
    assert dynamic.rope.original_max_position_embeddings == 512
    assert dynamic.max_position_embeddings == 1280


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"sliding_window": 8}, [0, 0]),
        ({**MISTRAL, "sliding_window": 8}, [8, 8]),
        ({**MISTRAL, "sliding_window": None}, [0, 0]),
        (MISTRAL, [4096, 4096]),
        (WINDOW, [0, 8]),
        ({**WINDOW, "max_window_layers": 5}, [0, 0]),
        ({**WINDOW, "max_window_layers": None}, [8, 8]),
        ({**WINDOW, "use_sliding_window": False}, [0, 0]),
        ({**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}, [8, 0]),
    ],
    ids=str,
)
def test_windows_are_those_of_each_familys_own_keys(changes, windows):
    config = from_hf(**changes)
    assert [config.window(layer) for layer in range(2)] == windows


def test_biases_and_norms_of_heads_come_from_family_and_config():
    assert not from_hf().qkv_bias
    llama = from_hf(attention_bias=True)
    assert (llama.qkv_bias, llama.output_bias, llama.qk_norm) == (True, True, False)
    qwen2 = from_hf(**QWEN2)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = from_hf(architectures=["Qwen3ForCausalLM"])
    assert (qwen3.qkv_bias, qwen3.output_bias, qwen3.qk_norm) == (False, False, True)
    assert qwen3.head_dim == 128


def test_num_parameters_counts_every_weight_once():
    tied, untied = from_hf(tie_word_embeddings=True), from_hf()
    layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert tied.num_parameters == 1000 * 64 + 2 * layer + 64
    assert untied.num_parameters == tied.num_parameters + 1000 * 64
    assert from_hf(**QWEN2).num_parameters == untied.num_parameters + 2 * (64 + 2 * 32)
    qwen3 = from_hf(architectures=["Qwen3ForCausalLM"], head_dim=16, attention_bias=True)
    biases, norms = 64 + 2 * 32 + 64, 2 * 16
    assert qwen3.num_parameters == untied.num_parameters + 2 * (biases + norms)
    added = replace(untied, output_bias=True, down_bias=True)
    assert added.num_parameters == untied.num_parameters + 2 * (64 + 64)


NUMBERS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
]
NAMES = {  # as errors call them once read
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
}


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [0, -1, 2**31, 2**40, 10**30])
def test_sizes_out_of_range_are_refused_by_name_and_value(key, value):
    with pytest.raises(CorruptCheckpoint, match=f"{NAMES.get(key, key)} is {value};"):
        from_hf(**{key: value})


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", ["64", 2.5, True, [64], {}, float("nan"), float("inf")], ids=repr)
def test_sizes_that_are_no_integers_are_refused_by_name_and_value(key, value):
    with pytest.raises(CorruptCheckpoint) as refused:
        from_hf(**{key: value})
    assert str(refused.value) == f"{key} is {value!r}, expected an integer"


@pytest.mark.parametrize("key", [k for k in NUMBERS if k in LLAMA and k != "num_key_value_heads"])
def test_a_size_that_is_missing_is_named(key):
    with pytest.raises(CorruptCheckpoint, match=f"{key} is missing"):
        ModelConfig.from_hf({k: v for k, v in LLAMA.items() if k != key}, {})


def test_a_whole_number_written_as_a_float_is_an_integer():
    assert from_hf(max_position_embeddings=4096.0).max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rope_theta": -1.0}, "theta is -1.0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"rope_theta": [1]}, r"rope_theta is \[1\]"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"hidden_size": 60}, "head_dim 15 is odd"),
        ({"eos_token_id": 1000}, "id 1000 is outside the vocabulary of 1000"),
        ({"eos_token_id": [2, -1]}, "id -1 is outside the vocabulary"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
        ({"eos_token_id": [2.5]}, r"eos_token_id is \[2.5\]"),
        ({"bos_token_id": 5000}, "id 5000 is outside the vocabulary"),
        ({"bos_token_id": 1.5}, "bos_token_id is 1.5"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'"),
        ({**MISTRAL, "sliding_window": 0}, "sliding_window is 0"),
        ({**MISTRAL, "sliding_window": "4096"}, "sliding_window is '4096'"),
        ({**MISTRAL, "sliding_window": 2**31}, "sliding_window is 2147483648"),
        ({**WINDOW, "use_sliding_window": 1}, "use_sliding_window is 1"),
        ({**WINDOW, "max_window_layers": 0.5}, "max_window_layers is 0.5"),
        ({**WINDOW, "layer_types": "full_attention"}, "layer_types is 'full_attention'"),
        ({**WINDOW, "layer_types": ["full_attention"]}, "layer_types names 1 layers of 2"),
        (
            {**QWEN2, "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types names sliding_attention, but no window",
        ),
        ({"rope_scaling": {"type": "dynamic"}}, "factor is missing"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "factor is 0.5; dynamic"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}, "head_dim": 2},
            "head_dim 2 is too small",
        ),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "factor is 0.5; yarn"),
        ({"rope_scaling": {**YARN, "factor": "4"}}, "factor is '4'"),
        ({"rope_scaling": {**YARN, "beta_fast": -1.0}}, "beta_fast is -1.0"),
        ({"rope_scaling": {**YARN, "beta_slow": float("nan")}}, "beta_slow is nan"),
        ({"rope_scaling": {**YARN, "attention_factor": 0}}, "attention_factor is 0"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "truncate is 1"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "theta is 1.0; yarn"),
        (
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 0}},
            "original_max_position_embeddings is 0",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "factor is missing"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor is missing"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": None}}, "high_freq_factor is missing"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor 1.0 must exceed"),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": -4}},
            "original_max_position_embeddings is -4",
        ),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 10**400}},
            "original_max_position_embeddings is 1000",
        ),
    ],
    ids=lambda value: str(value)[:80],
)
def test_values_that_cannot_be_are_refused_by_name_and_value(changes, named):
    with pytest.raises(CorruptCheckpoint, match=named):
        from_hf(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM"),
        ({"architectures": []}, "none named"),
        ({"architectures": None}, "none named"),
        ({"architectures": 5}, "5"),
        ({"architectures": [["LlamaForCausalLM"], {}]}, "LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_act": None}, "hidden_act None"),
        ({"mlp_bias": True}, "mlp_bias"),
        (
            {"rope_scaling": {"type": "longrope"}},
            "'longrope'.*default, linear, dynamic, llama3, yarn",
        ),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "linear"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_unsupported_and_named(changes, named):
    with pytest.raises(UnsupportedModel, match=named):
        from_hf(**changes)


def test_gguf_metadata_is_read_under_its_own_names():
    config = from_gguf(
        llama__attention__key_length=24,
        llama__rope__dimension_count=24,
        llama__rope__scaling__type="linear",
        llama__rope__scaling__factor=2.0,
    )
    assert config == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope=RopeConfig(5e5, "linear", 2.0),
        tie_word_embeddings=True,
        eos_token_ids=(2,),
        bos_token_id=None,
    )
    assert from_gguf(llama__attention__head_count_kv=None).num_kv_heads == 4
    assert from_gguf(llama__rope__freq_base=None).rope.theta == 10000.0


@pytest.mark.parametrize(
    ("key", "value", "error", "named"),
    [
        ("general__architecture", "gpt2", UnsupportedModel, "'gpt2'.*supported: llama"),
        ("general__architecture", None, UnsupportedModel, "None"),
        ("llama__rope__scaling__type", "longrope", UnsupportedModel, "'longrope'"),
        ("llama__rope__dimension_count", 8, UnsupportedModel, "dimension_count is 8.* 16 "),
        ("llama__block_count", None, CorruptCheckpoint, "llama.block_count is missing"),
        ("llama__block_count", 0, CorruptCheckpoint, "num_layers is 0"),
        ("llama__embedding_length", 2**40, CorruptCheckpoint, "hidden_size is 1099511627776"),
        ("llama__attention__head_count", [4, 4], CorruptCheckpoint, r"head_count is \[4, 4\]"),
        ("llama__context_length", float("inf"), CorruptCheckpoint, "context_length is inf"),
        ("llama__feed_forward_length", "x", CorruptCheckpoint, "feed_forward_length is 'x'"),
        ("llama__rope__freq_base", float("nan"), CorruptCheckpoint, "freq_base is nan"),
        ("tokenizer__ggml__tokens", 5, CorruptCheckpoint, "tokens is 5"),
        ("tokenizer__ggml__tokens", None, CorruptCheckpoint, "tokens is missing"),
        ("tokenizer__ggml__eos_token_id", 300, CorruptCheckpoint, "id 300 is outside"),
        ("tokenizer__ggml__eos_token_id", "a", CorruptCheckpoint, "eos_token_id is 'a'"),
    ],
)
def test_gguf_metadata_that_cannot_be_is_refused_by_name_and_value(key, value, error, named):
    with pytest.raises(error, match=named):
        from_gguf(**{key: value})


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["default", "linear", "dynamic", "yarn", "llama3", "silu"])
    | st.sampled_from(["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
    | st.sampled_from(["full_attention", "sliding_attention"])
    | st.sampled_from([10**999, -(10**999), "long" * 999, ["long"] * 999]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["rope_type", "type", "factor", "rope_theta", "truncate", "mscale", *LLAMA3]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)


@given(
    changes=st.dictionaries(
        st.sampled_from(
            [
                *LLAMA,
                "rope_parameters",
                "rope_scaling",
                "rope_theta",
                "head_dim",
                "eos_token_id",
                "bos_token_id",
                "tie_word_embeddings",
                "hidden_act",
                "attention_bias",
                "sliding_window",
                "use_sliding_window",
                "max_window_layers",
                "layer_types",
            ]
        ),
        JSON_VALUES,
        min_size=1,
        max_size=3,
    ),
    family=st.sampled_from(list(FAMILIES)),
    generation=st.dictionaries(st.just("eos_token_id"), JSON_VALUES, max_size=1),
)
@settings(max_examples=200, deadline=None)
def test_any_json_gives_a_config_or_a_model_error_of_bounded_length(changes, family, generation):
    raw = json.loads(json.dumps({**LLAMA, "architectures": [family], **changes}))
    try:
        config = ModelConfig.from_hf(raw, generation)
    except ModelError as error:
        assert len(str(error)) < 500, "names the value, however long it is"  # noqa: PT017
    else:
        assert config.num_parameters > 0


SIZES = st.integers(1, 64)
SCALES = st.floats(1.0, 1e6)
TOKEN_IDS = st.integers(0, 299)
LLAMA3_ROPE = st.fixed_dictionaries(
    {
        "rope_type": st.just("llama3"),
        "factor": SCALES,
        "low_freq_factor": st.floats(0.5, 2.0),
        "high_freq_factor": st.floats(2.5, 8.0),
        "original_max_position_embeddings": SIZES,
    }
)
YARN_ROPE = st.fixed_dictionaries(
    {"rope_type": st.just("yarn"), "factor": SCALES},
    optional={
        "original_max_position_embeddings": SIZES,
        "beta_fast": SCALES,
        "beta_slow": SCALES,
        "attention_factor": SCALES,
        "mscale": SCALES,
        "mscale_all_dim": SCALES,
        "truncate": st.booleans(),
    },
)
OTHER_ROPE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "dynamic"]), "factor": SCALES}
)
HF_CONFIGS = st.fixed_dictionaries(
    {
        "architectures": st.sampled_from(list(FAMILIES)).map(lambda name: [name]),
        "vocab_size": st.just(300),
        "hidden_size": SIZES,
        "intermediate_size": SIZES,
        "num_hidden_layers": st.just(3),
        "num_attention_heads": st.sampled_from([4, 8]),
        "num_key_value_heads": st.sampled_from([1, 4]),
        "head_dim": SIZES.map(lambda half: 2 * half + 2),
        "rms_norm_eps": st.floats(1e-12, 1e-2),
    },
    optional={
        "max_position_embeddings": SIZES,
        "rope_theta": st.floats(2.0, 1e9),
        "rope_scaling": st.one_of(LLAMA3_ROPE, YARN_ROPE, OTHER_ROPE),
        "tie_word_embeddings": st.booleans(),
        "attention_bias": st.booleans(),
        "bos_token_id": TOKEN_IDS,
        "eos_token_id": st.one_of(TOKEN_IDS, st.lists(TOKEN_IDS, max_size=3)),
        "use_sliding_window": st.booleans(),
        "sliding_window": st.one_of(st.none(), SIZES),
        "max_window_layers": st.integers(0, 4),
        "layer_types": st.lists(
            st.sampled_from(["sliding_attention", "full_attention"]), min_size=3, max_size=3
        ),
    },
)


@given(raw=HF_CONFIGS)
@settings(max_examples=300, deadline=None)
def test_a_config_is_written_as_it_was_read(raw):
    try:
        config = ModelConfig.from_hf(raw, {})
    except CorruptCheckpoint as error:
        assert "no window is in use" in str(error)  # noqa: PT017
        return
    written = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(written, {}) == config


@given(
    architecture=st.sampled_from(sorted({family.gguf for family in FAMILIES.values()})),
    kind=st.sampled_from(["none", "linear", "yarn"]),
    numbers=st.fixed_dictionaries(
        {
            "context_length": SIZES,
            "attention.layer_norm_rms_epsilon": st.floats(2.0**-40, 2.0**-7, width=32),
            "rope.freq_base": st.floats(2.0, 1e9, width=32),
            "rope.scaling.factor": st.floats(1.0, 2.0**20, width=32),
        },
        optional={
            "attention.key_length": SIZES.map(lambda half: 2 * half),
            "rope.scaling.original_context_length": SIZES,
            "rope.scaling.yarn_attn_factor": st.floats(0.5, 8.0, width=32),
            "rope.scaling.yarn_beta_fast": st.floats(1.0, 64.0, width=32),
        },
    ),
    ids=st.dictionaries(st.sampled_from(["bos", "eos", "eot", "eom"]), TOKEN_IDS),
    tied=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_a_gguf_config_is_written_in_the_terms_of_hugging_face(
    architecture, kind, numbers, ids, tied
):
    fields = {
        key.replace("llama.", f"{architecture}."): value
        for key, value in GGUF.items()
        if not key.endswith("_token_id")
    }
    fields |= {"general.architecture": architecture, f"{architecture}.rope.scaling.type": kind}
    fields |= {f"{architecture}.{key}": value for key, value in numbers.items()}
    fields |= {f"tokenizer.ggml.{name}_token_id": own for name, own in ids.items()}
    config = ModelConfig.from_gguf(fields, frozenset() if tied else frozenset(["output.weight"]))
    written = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(written, {}) == config


def test_traits_that_no_architecture_has_together_cannot_be_written():
    bias = frozenset(["blk.0.attn_q.bias"])
    config = ModelConfig.from_gguf(GGUF, bias)
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM has no words for qkv_bias True$"):
        config.to_hf()
    assert ModelConfig.from_gguf(GGUF, bias | {"blk.0.attn_output.bias"}).to_hf()["attention_bias"]
    config = ModelConfig.from_gguf(GGUF, frozenset(["blk.0.ffn_down.bias"]))
    assert config.down_bias
    with pytest.raises(
        UnsupportedModel, match=r"LlamaForCausalLM has no words for down_bias True$"
    ):
        config.to_hf()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_transformers_reads_what_is_written(architecture, tmp_path):
    from transformers import AutoConfig

    config = from_hf(architectures=[architecture], rope_scaling=YARN, eos_token_id=[2, 5])
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.__class__.__name__ == architecture.replace("ForCausalLM", "Config")
    assert theirs.head_dim == config.head_dim
    assert theirs.max_position_embeddings == config.max_position_embeddings
    assert theirs.rope_parameters["attention_factor"] == config.rope.attention_factor
    assert theirs.eos_token_id == [2, 5]
