"""The reference backend against transformers, which reads the same files on its own."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GgufConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparserve.model import catalog
from sparserve.model.backend import (
    BLOCK_SIZE,
    Backend,
    ForwardBatch,
    ForwardOutput,
    Phase,
    SequenceInput,
)
from sparserve.model.loader import LoadedModel, load_model
from sparserve.model.weights import HF_NAMES, layer_shapes
from sparserve.sparsity.statistics import NeuronStatistics

TOLERANCE = 1e-4  # largest difference of a logit
# Frequencies of a head of 16 at theta 10000 have wavelengths 6 … 19869: of an original context of 64
# some are kept, one or two interpolated, the rest divided.
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# A head of 16 at theta 10000 and an original context of 64: ramps from pair 0 to pair 3.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
FAMILIES = {
    "llama with biases": {"attention_bias": True},
    "mistral": {**MISTRAL, "sliding_window": 20},
    "mistral, a window beyond a tile": {**MISTRAL, "sliding_window": 100},
    "mistral without a window": {**MISTRAL, "sliding_window": None},
    "mistral, the default window": MISTRAL,
    "qwen2": QWEN2,
    "qwen2, the last layer with a window": {
        **QWEN2,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
    },
    "qwen2, a window by layer types": {
        **QWEN2,
        "use_sliding_window": True,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3": {**QWEN3, "head_dim": 24},
    "qwen3, head_dim not named": {**QWEN3, "num_attention_heads": 2},
    "qwen3 with biases": {**QWEN3, "head_dim": 16, "attention_bias": True},
    "qwen3 with a window": {
        **QWEN3,
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 33,
        "max_window_layers": 0,
    },
}
CHECKPOINTS = {
    **FAMILIES,
    "qwen2, tied": {**QWEN2, "tie_word_embeddings": True},
    "untied embeddings": {},
    "tied embeddings": {"tie_word_embeddings": True},
    "one KV head": {"num_key_value_heads": 1},
    "as many KV heads as heads": {"num_key_value_heads": 4},
    "KV heads not named": {"num_key_value_heads": None},
    "head_dim above hidden / heads": {"head_dim": 24},
    "head_dim below hidden / heads": {"head_dim": 10},
    "odd widths": {"intermediate_size": 101, "hidden_size": 68, "head_dim": 34},
    "large epsilon": {"rms_norm_eps": 0.5},
    "rope theta in rope_parameters": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "old rope theta": {"rope_theta": 500.0},
    "old linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "new linear rope": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    },
    "old llama3 rope": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "new llama3 rope": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0, **LLAMA3},
    },
    "llama3 rope of an original context not named": {
        "max_position_embeddings": 256,
        "rope_scaling": {
            key: value for key, value in LLAMA3.items() if not key.startswith("original")
        }
        | {"rope_type": "llama3"},
    },
    "yarn": {"rope_scaling": YARN, "max_position_embeddings": 256},
    "yarn, nothing rounded, other bounds": {
        "rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 2.5, "truncate": False}
    },
    "yarn, attention factor": {"rope_scaling": {**YARN, "attention_factor": 0.7}},
    "yarn, mscale": {"rope_scaling": {**YARN, "mscale": 1.3, "mscale_all_dim": 0.4}},
    "yarn of an original context not named": {
        "max_position_embeddings": 100,
        "rope_scaling": {"type": "yarn", "factor": 2.0},
    },
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 160},
}
NUM_TOKENS = 150
PREFILLED = 130  # the other tokens are decoded


@pytest.fixture
def tokens() -> list[int]:
    return torch.randint(0, 259, (NUM_TOKENS,), generator=torch.Generator().manual_seed(7)).tolist()


def their_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()


def read_by_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = json.loads((folder / "config.json").read_text())
    return (
        getattr(transformers, config["architectures"][0])
        .from_pretrained(folder, dtype=dtype, attn_implementation="eager", local_files_only=True)
        .eval()
    )


@pytest.fixture
def write_checkpoint(write_tiny_checkpoint, tmp_path) -> Callable[..., Path]:
    """`write_checkpoint(…)`: a tiny model's folder; what is None is left out of config.json, but
    for the window, where null means none and absence the default."""

    def write(**overrides: object) -> Path:
        folder = write_tiny_checkpoint(tmp_path, **overrides)
        config = json.loads((folder / "config.json").read_text())
        kept = {k: v for k, v in config.items() if v is not None or k == "sliding_window"}
        (folder / "config.json").write_text(json.dumps(kept))
        return folder

    return write


@dataclass
class Ours:
    """A model run on a fresh backend: prompt in two chunks, then several decoded tokens at once."""

    make_backend: Callable[[LoadedModel], Backend]
    all_logits: Callable[[ForwardOutput], torch.Tensor]

    def __call__(self, model: LoadedModel, tokens: list[int]) -> torch.Tensor:
        backend = self.make_backend(model)
        table = list(range(len(tokens) // BLOCK_SIZE + 1))
        rows = []
        for first, last, phase in [
            (0, 70, Phase.PREFILL),
            (70, PREFILLED, Phase.PREFILL),
            (PREFILLED, len(tokens), Phase.DECODE),
        ]:
            offsets = tuple(range(last - first))
            part = SequenceInput(tokens[first:last], first, table, phase, output_offsets=offsets)
            rows.append(self.all_logits(backend.forward(ForwardBatch([part]))))
        return torch.cat(rows)


@pytest.fixture
def our_logits(make_backend, all_logits) -> Ours:
    return Ours(make_backend, all_logits)


@pytest.mark.parametrize("overrides", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_logits_equal_those_of_transformers(overrides, write_checkpoint, tokens, our_logits):
    folder = write_checkpoint(**overrides)
    expected = their_logits(read_by_transformers(folder), tokens)
    actual = our_logits(load_model(str(folder)), tokens)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


GENERATED = {
    **FAMILIES,
    "yarn": CHECKPOINTS["yarn"],
    # The prompt fits the original context, the text outgrows it.
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 40},
    "dynamic, sooner": {
        "rope_scaling": {"type": "dynamic", "factor": 2.5},
        "max_position_embeddings": 38,
        "head_dim": 24,
    },
}


@pytest.mark.parametrize("overrides", GENERATED.values(), ids=GENERATED.keys())
def test_64_greedy_tokens_equal_those_that_transformers_generates(
    overrides, write_checkpoint, tokens, make_backend
):
    folder, prompt = write_checkpoint(**overrides), tokens[:38]
    backend = make_backend(load_model(str(folder)), num_blocks=8)
    ((text, _),) = greedy(backend, [prompt])
    theirs = read_by_transformers(folder).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=GREEDY_TOKENS,
        do_sample=False,
        eos_token_id=[],
        pad_token_id=258,
    )
    assert text == theirs[0].tolist()
    assert len(set(text[len(prompt) :])) > 10, "not one token over and over"


def shard(folder: Path, parts: int) -> None:
    """Cut the weights of a folder into shards with an index, as large checkpoints come."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in range(parts):
        name = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        names = sorted(tensors)[part::parts]
        save_file({n: tensors[n] for n in names}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_sharded_weights_give_the_logits_of_transformers(
    write_tiny_checkpoint, tmp_path, tokens, our_logits
):
    folder = write_tiny_checkpoint(tmp_path)
    whole = our_logits(load_model(str(folder)), tokens)
    shard(folder, 3)
    sharded = our_logits(load_model(str(folder)), tokens)
    assert torch.equal(sharded, whole)
    expected = their_logits(read_by_transformers(folder), tokens)
    torch.testing.assert_close(sharded, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_no_further_from_the_exact_logits_than_transformers(
    dtype, write_tiny_checkpoint, tmp_path, tokens, our_logits
):
    folder = write_tiny_checkpoint(tmp_path, dtype=dtype)
    exact = their_logits(read_by_transformers(folder), tokens)  # same weights, float32 arithmetic
    theirs = their_logits(read_by_transformers(folder, dtype), tokens)
    ours = our_logits(load_model(str(folder)), tokens)
    assert (ours - exact).abs().max() > 0, "16-bit arithmetic was asked for"
    assert (ours - exact).norm() < (theirs - exact).norm()
    assert (ours - exact).abs().max() < {torch.bfloat16: 0.5, torch.float16: 0.05}[dtype]


@pytest.mark.parametrize("overrides", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_native_logits_of_bfloat16_weights_are_near_the_exact_ones(
    overrides, write_checkpoint, tokens, make_backend, all_logits
):
    """Only the KV cache is rounded: transformers in bfloat16 is 10 times further off."""
    folder = write_checkpoint(**overrides, dtype=torch.bfloat16)
    exact = their_logits(read_by_transformers(folder), tokens)  # same weights, float32 arithmetic
    run = Ours(partial(make_backend, kind="cpu"), all_logits)
    ours = run(load_model(str(folder), layers_at_use=True), tokens)
    assert (ours - exact).abs().max() < 0.1
    assert (ours - exact).square().mean().sqrt() < 2e-3 * exact.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_computed_in_float32_give_the_logits_of_transformers(
    dtype, write_tiny_checkpoint, tmp_path, tokens, our_logits
):
    folder = write_tiny_checkpoint(tmp_path, dtype=dtype)
    ours = our_logits(load_model(str(folder), dtype="float32"), tokens)
    expected = their_logits(read_by_transformers(folder), tokens)
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [("reference", torch.float32, 1e-4), ("cpu", torch.bfloat16, 1e-2)],
    ids=["reference", "cpu"],
)
def test_statistics_are_griffins_norm_of_the_activations_that_transformers_computes(
    write_tiny_checkpoint, tmp_path, tokens, make_backend, kind, dtype, tolerance
):
    folder = write_tiny_checkpoint(tmp_path, dtype=dtype)
    theirs, seen = read_by_transformers(folder), []
    for layer in theirs.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    their_logits(theirs, tokens)
    activations = torch.stack(seen).double()[:, 1:]  # without the attention sink
    expected = (activations / activations.norm(dim=2, keepdim=True)).square().sum(dim=1)

    backend = make_backend(load_model(str(folder)), kind=kind)
    prompt = SequenceInput(tokens, 0, list(range(10)), Phase.PREFILL, collect_statistics=True)
    (blocks,) = backend.forward(ForwardBatch([prompt])).statistics
    statistics = NeuronStatistics.zeros(*expected.shape)
    for block in blocks:
        statistics += block
    assert statistics.tokens == NUM_TOKENS - 1
    torch.testing.assert_close(statistics.scores(), expected, atol=tolerance, rtol=tolerance)


# --- the demo model ---

# Published as HuggingFaceTB/SmolLM2-135M-Instruct, config.json
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius, that is, at",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "The three laws of thermodynamics are",
    "SELECT name, COUNT(*) FROM",
    "In 1969, the first human beings",
    "Der schnelle braune Fuchs springt über",
    "To make a good omelette, first",
    "Q: What is photosynthesis?\nA:",
    '{"name": "Ada", "born": 1815, "field": "',
    "The rain in Spain stays mainly",
    "A list of the planets, from the Sun outwards:\n1.",
    "import numpy as np\n\nx = np.",
    "No man is an island, entire of itself;",
    "She opened the letter slowly. It said:",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nName three rivers in Africa.<|im_end|>\n<|im_start|>assistant\n",
]
GREEDY_TOKENS = 64


@pytest.fixture(scope="module")
def their_demo_model(demo_model: LoadedModel) -> LlamaForCausalLM:
    # demo_model is asked for because it fetches the file
    path = catalog.CATALOG[catalog.DEMO_MODEL].path
    return LlamaForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=LlamaConfig(**SMOLLM2_135M),
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()


def test_demo_weights_equal_those_that_transformers_reads(demo_model, their_demo_model):
    theirs = dict(their_demo_model.named_parameters())
    weights = demo_model.weights
    assert torch.equal(weights.embedding, theirs["model.embed_tokens.weight"])
    assert weights.lm_head is weights.embedding
    assert torch.equal(weights.norm, theirs["model.norm.weight"])
    for i, layer in enumerate(weights.layers):
        for field in layer_shapes(demo_model.config, 0):
            name = HF_NAMES.layer[field].format(i=i)
            assert torch.equal(getattr(layer, field), theirs[name]), name


def test_demo_logits_equal_those_of_transformers_in_float64(
    demo_model, their_demo_model, our_logits
):
    text = " ".join(PROMPTS[:14])
    tokens = demo_model.tokenizer.encode(text).ids[: PREFILLED + 10]
    assert len(tokens) == PREFILLED + 10
    try:
        expected = their_logits(their_demo_model.double(), tokens)
    finally:
        their_demo_model.float()  # exact: the weights were float32
    torch.testing.assert_close(our_logits(demo_model, tokens), expected, atol=TOLERANCE, rtol=0)


def greedy(backend: Backend, prompts: list[list[int]]) -> list[tuple[list[int], torch.Tensor]]:
    """GREEDY_TOKENS tokens after each prompt, decoded together -> (prompt and text, logits)."""
    blocks = backend.num_blocks // len(prompts)
    texts, rows = [list(prompt) for prompt in prompts], [[] for _ in prompts]
    for step in range(GREEDY_TOKENS):
        spans = []
        for i, text in enumerate(texts):
            start, phase = (0, Phase.PREFILL) if step == 0 else (len(text) - 1, Phase.DECODE)
            table = range(i * blocks, (i + 1) * blocks)
            last = len(text) - start - 1
            spans.append(SequenceInput(text[start:], start, table, phase, output_offsets=(last,)))
        candidates = backend.forward(ForwardBatch(spans)).candidates
        for i, text in enumerate(texts):
            text.append(int(candidates.token_ids[i, 0]))
            rows[i].append(candidates.full_logits(i).clone())
    return [(text, torch.stack(logits)) for text, logits in zip(texts, rows, strict=True)]


def test_demo_model_gives_64_greedy_tokens_and_logits_of_transformers_on_20_prompts(
    demo_model, their_demo_model, make_backend
):
    prompts = [demo_model.tokenizer.encode(prompt).ids for prompt in PROMPTS]
    backends = [make_backend(demo_model, num_blocks=10 * 8) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:  # half of the prompts on each core
        halves = pool.map(greedy, backends, (prompts[::2], prompts[1::2]))
        ours = [result for pair in zip(*halves, strict=True) for result in pair]
        texts = [text[:-1] for text, _ in ours]
        theirs = list(pool.map(their_logits, [their_demo_model] * len(texts), texts))

    # This is also transformers' greedy text, by induction: each token is the likeliest one after the
    # text before it. In float32 its logits are themselves up to 1.1e-4 from those in float64.
    for prompt, (text, logits), their_rows in zip(prompts, ours, theirs, strict=True):
        expected = their_rows[len(prompt) - 1 :]
        assert text[: len(prompt)] == prompt
        assert text[len(prompt) :] == expected.argmax(dim=-1).tolist()
        torch.testing.assert_close(logits, expected, atol=2 * TOLERANCE, rtol=0)
