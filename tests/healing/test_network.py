"""The network that learns, against the reference backend, and what is written of it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sparse_kernels.choice import ChoiceKind
from sparse_kernels.formats import DecoderFormats
from sparse_kernels.weights import QuantizedMatrix
from sparserve.compression.recipe import parse_recipe
from sparserve.engine.formats import weight_formats
from sparserve.errors import ConfigError
from sparserve.healing.divergence import divergence
from sparserve.healing.network import Neurons
from sparserve.healing.policies import parse_through
from sparserve.healing.stored import healed_ends, healed_tensors, layer_as_stored, network_of
from sparserve.healing.through import Core
from sparserve.model.backend import ForwardBatch, Phase, SequenceInput, mean_neuron_bytes
from sparserve.model.compress_folder import compress_folder
from sparserve.model.effective import effective
from sparserve.model.loader import load_model
from sparserve.model.reference import ReferenceBackend
from sparserve.model.weight_bytes import layer_neuron_bytes

RECIPE = """
name: tested
compensate: lorc
quantizer: rtn
act_order: false
attention: {bits: 4, group_size: 32, rank: 32}
gate_up: {bits: 8, group_size: 32, rank: 32}
down: {bits: 4, group_size: 32, rank: 32}
lm_head: {bits: 16}
"""


def reference_logits(config, weights, tokens: list[int]) -> torch.Tensor:
    """Of all positions, computed in float32."""
    float32 = replace(
        weights,
        embedding=weights.embedding.float(),
        lm_head=weights.lm_head.float(),
        layers=[_float(layer) for layer in weights.layers],
    )
    backend = ReferenceBackend(config, float32, num_blocks=8, threads=1)
    own = SequenceInput(tokens, 0, list(range(4)), Phase.PREFILL, output_offsets=range(len(tokens)))
    candidates = backend.forward(ForwardBatch([own])).candidates
    return torch.stack([candidates.full_logits(row).clone() for row in range(len(tokens))])


def _float(layer):
    names = layer.__dataclass_fields__
    own = {name: getattr(layer, name) for name in names}
    return replace(layer, **{name: t.float() for name, t in own.items() if t is not None})


def learned(network, scale: float = 0.05) -> None:
    """As if something had been learned: every parameter is moved."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for own in network.parameters():
            own += scale * torch.randn(own.shape, generator=generator)


def kl(found: torch.Tensor, expected: torch.Tensor) -> float:
    exact = expected.log_softmax(dim=1)
    return float((exact.exp() * (exact - found.log_softmax(dim=1))).sum(dim=1).mean())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architectures": ["Qwen2ForCausalLM"]},
        {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 8},
        {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_the_network_is_the_model(write_tiny_checkpoint, tmp_path, changes):
    folder = write_tiny_checkpoint(tmp_path / "own", dtype=torch.bfloat16, **changes)
    model = load_model(str(folder), dtype="bfloat16", layers_at_use=True)
    tokens = torch.randint(0, 256, (48,), generator=torch.Generator().manual_seed(1))
    network = network_of(model)
    with torch.no_grad():
        found = network(tokens[None])[0] @ network.head.float().T
    expected = reference_logits(model.config, model.weights, tokens.tolist())
    assert kl(found, expected) < 2e-4


def test_what_is_learned_is_merged_into_16_bits(model):
    network = network_of(model, rank=4)
    learned(network)
    tokens = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = network(tokens[None])[0] @ network.head.float().T
    layers = [
        effective(healed_tensors(layer_as_stored(model, index), layer))
        for index, layer in enumerate(network.layers)
    ]
    ends = healed_ends(model, network)
    weights = replace(model.weights, layers=layers, norm=ends.norm)
    config = replace(model.config, down_bias=True)
    expected = reference_logits(config, weights, tokens.tolist())
    before = reference_logits(model.config, model.weights, tokens.tolist())
    assert kl(found, before) > 20 * kl(found, expected)
    assert kl(found, expected) < 2e-3


def test_integers_stay_and_their_terms_learn(folder, tmp_path):
    compress_folder(str(folder), parse_recipe(RECIPE, "tested"), [], tmp_path / "small")
    model = load_model(str(tmp_path / "small"), dtype="bfloat16", layers_at_use=True)
    network = network_of(model)
    assert {own.rank for own in (network.layers[0].qkv, network.layers[0].gate_up)} == {32}
    learned(network, 0.01)
    tokens = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = network(tokens[None])[0] @ network.head.float().T
    made = [
        healed_tensors(layer_as_stored(model, index), layer)
        for index, layer in enumerate(network.layers)
    ]
    for index, layer in enumerate(made):
        before = layer_as_stored(model, index)
        for name in ("q", "k", "v", "output", "gate", "up", "down"):
            own = getattr(layer, name)
            assert isinstance(own, QuantizedMatrix)
            assert torch.equal(own.codes, getattr(before, name).codes)
    weights = replace(
        model.weights,
        layers=[effective(own) for own in made],
        norm=healed_ends(model, network).norm,
    )
    expected = reference_logits(replace(model.config, down_bias=True), weights, tokens.tolist())
    before = reference_logits(model.config, model.weights, tokens.tolist())
    assert kl(found, before) > 10 * kl(found, expected)
    assert kl(found, expected) < 1e-2


def test_the_divergence_and_its_gradient_are_those_of_autograd(monkeypatch):
    monkeypatch.setattr("sparserve.healing.divergence.BLOCK_ELEMENTS", 700)  # of several blocks
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(33, 24, generator=generator) for _ in range(2))
    heads = [torch.randn(99, 24, generator=generator).bfloat16() for _ in range(2)]
    own, same = (student.clone().requires_grad_() for _ in range(2))
    found = divergence(own, heads[0], teacher, heads[1])
    exact = (teacher.double() @ heads[1].double().T).log_softmax(dim=1)
    logits = (same.double() @ heads[0].double().T).log_softmax(dim=1)
    expected = F.kl_div(logits, exact, log_target=True, reduction="batchmean")
    found.backward()
    expected.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=0.02)
    assert F.cosine_similarity(own.grad.flatten(), same.grad.flatten(), dim=0) > 0.999
    assert float(own.grad.norm()) == pytest.approx(float(same.grad.norm()), rel=0.02)


def test_a_core_is_the_prompts_and_holds_after_it():
    activations = torch.rand(2, 12, 8, generator=torch.Generator().manual_seed(0))
    activations[0, 1:6, [1, 5]] += 5
    activations[1, 1:6, [0, 7]] += 5
    activations[:, 0] = 100 * torch.arange(8)  # a sink, which counts nowhere
    through = Core([2])
    through.begin(6, watch=False)
    used = through(0, Neurons(torch.empty(0), torch.empty(0), activations))
    assert torch.equal(used[:, :6], activations[:, :6])
    assert used[0, 6:].nonzero()[:, 1].unique().tolist() == [1, 5]
    assert used[1, 6:].nonzero()[:, 1].unique().tolist() == [0, 7]
    assert torch.equal(used[0, 6:, [1, 5]], activations[0, 6:, [1, 5]])


@pytest.mark.parametrize("density", [0.5, 0.8])
def test_tokens_that_choose_by_planes_read_their_share(model, settings, density):
    served = settings.model_copy(update={"dtype": "int8", "weight_planes": "4+4"})
    through = parse_through(f"token:{density}", model, weight_formats(served))
    network = network_of(model)
    through.attach(network)
    through.begin(1, watch=False)
    shares = []

    def used(layer: int, neurons: Neurons) -> torch.Tensor:
        made, activations = through(layer, neurons), neurons.activations
        assert torch.equal(made[:, 0], activations[:, 0])  # the prompt
        after = made[:, 1:] != 0
        whole = after & (made[:, 1:] == activations[:, 1:])
        shares.append([float(own.float().mean()) for own in (after, whole)])
        close = (made - activations)[:, 1:][after].norm() / activations[:, 1:][after].norm()
        assert close < 0.2
        return made

    network(torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(1)), used)
    looked, down, low, _ = mean_neuron_bytes(
        layer_neuron_bytes(model.config, weight_formats(served))[ChoiceKind.PLANES]
    )
    read = [(looked + a * down + b * low) / (looked + down + low) for a, b in shares]
    assert sum(read) / len(read) == pytest.approx(density, abs=0.04)


@pytest.mark.parametrize("density", [0.5, 0.8])
def test_tokens_that_choose_by_gate_read_their_share(model, density):
    formats = DecoderFormats()
    through = parse_through(f"token:{density}/gate", model, formats)
    network = network_of(model)
    through.attach(network)
    through.begin(1, watch=False)
    used_shares, losses = [], []

    def used(layer: int, neurons: Neurons) -> torch.Tensor:
        made, activations = through(layer, neurons), neurons.activations
        assert torch.equal(made[:, 0], activations[:, 0])  # the prompt
        keeps = made[:, 1:] != 0
        assert torch.equal(made[:, 1:][keeps], activations[:, 1:][keeps])
        used_shares.append(float(keeps.float().mean()))
        # What is left out matters least: by chance it would lose its share of the squares.
        left = activations[:, 1:].detach().float().square()
        losses.append(float(left[~keeps].sum() / left.sum()) / (1 - used_shares[-1]))
        return made

    network(torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(1)), used)
    looked, *rest = mean_neuron_bytes(layer_neuron_bytes(model.config, formats)[ChoiceKind.GATE])
    read = [(looked + share * sum(rest)) / (looked + sum(rest)) for share in used_shares]
    assert sum(read) / len(read) == pytest.approx(density, abs=0.02)
    assert max(losses) < 0.5


def test_policies_that_cannot_be_learned_through_are_refused(model):
    formats = DecoderFormats()
    with pytest.raises(ConfigError, match=r"through is 'exact', and healing goes through dense"):
        parse_through("exact", model, formats)
    with pytest.raises(ConfigError, match="begins with 'nonsense'"):
        parse_through("nonsense", model, formats)


@pytest.mark.parametrize(
    "words",
    ["core:0.5/count", "core:0.5/layers=1-1", "core:0.5/refresh=8", "core:0.5/similarity",
     "core:0.5/signed_count/alpha=0.4", "token:0.8/gate/refresh=8", "core:0.7+token:0.5/gate"],
)  # fmt: skip
def test_options_that_would_not_be_followed_are_refused(model, words):
    with pytest.raises(
        ConfigError, match=r"core:D, token:D/planes or token:D/gate, without"
    ) as told:
        parse_through(words, model, DecoderFormats())
    assert repr(words) in str(told.value)


@pytest.mark.parametrize("words", ["core:0.5/norm", "core:0.5/stability", "core:0.5/auto"])
def test_what_a_core_is_learned_by_may_be_said(model, words):
    assert isinstance(parse_through(words, model, DecoderFormats()), Core)
