"""Pruned models: the same as the whole one with what is removed set to zero, in memory and as a folder."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sparserve.compression.recipe import parse_recipe
from sparserve.compression.sections import Prune
from sparserve.config import ServerSettings
from sparserve.engine.factory import assemble_engine
from sparserve.errors import ConfigError, CorruptCheckpoint, UnsupportedModel
from sparserve.model.backend import BLOCK_SIZE, ForwardBatch, Phase, SequenceInput
from sparserve.model.compress_folder import compress_folder, require_text
from sparserve.model.config import LayerSize
from sparserve.model.loader import LoadedModel, load_model
from sparserve.model.pruning import PrunedLayers, prune, statistics_of
from sparserve.model.pruning_shares import check_shares
from sparserve.model.reference import ReferenceBackend
from sparserve.model.text import read_windows
from sparserve.model.walk import Walk, activations
from sparserve.sparsity.chooser import Chooser
from sparserve.sparsity.policy import Policy, PolicyKind
from sparserve.sparsity.statistics import PromptStatistics

BF16 = """
name: pruned
attention: {bits: 16}
gate_up: {bits: 16}
down: {bits: 16}
lm_head: {bits: 16}
calibration: {windows: 4, tokens: 64}
"""


@pytest.fixture(scope="module")
def token_ids() -> torch.Tensor:
    return torch.randint(0, 259, (8, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


def logits(backend, tokens: list[int]) -> torch.Tensor:
    """Of all positions, the prompt first and then one token after another."""
    table, half, rows = list(range(4)), len(tokens) // 2, []
    for start, stop, phase in [
        (0, half, Phase.PREFILL),
        *((i, i + 1, Phase.DECODE) for i in range(half, len(tokens))),
    ]:
        span = SequenceInput(
            tokens[start:stop], start, table, phase, output_offsets=[stop - start - 1]
        )
        candidates = backend.forward(ForwardBatch([span])).candidates
        rows.append(candidates.full_logits(0).clone())
    return torch.stack(rows)


def reference(model: LoadedModel) -> ReferenceBackend:
    return ReferenceBackend(model.config, model.weights, num_blocks=8, threads=1)


def masked(model: LoadedModel, layers: PrunedLayers) -> LoadedModel:
    """The whole model, but nothing goes through what is removed."""
    head_dim, whole = model.config.head_dim, []
    for layer, kept in zip(model.weights.layers, layers.kept, strict=True):
        heads = torch.zeros(layer.wo.shape[1] // head_dim)
        heads[kept.heads] = 1
        neurons = torch.zeros(layer.w_down.shape[1])
        neurons[kept.neurons] = 1
        whole.append(
            replace(
                layer,
                wo=layer.wo * heads.repeat_interleave(head_dim),
                w_down=layer.w_down * neurons,
            )
        )
    return replace(model, weights=replace(model.weights, layers=whole))


@pytest.mark.parametrize("head_unit", ["groups", "queries"])
@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_pruning_is_masking(tiny_model, token_ids, head_unit, allocation):
    how = Prune(heads=0.3, mlp=0.3, head_unit=head_unit, allocation=allocation, restore="none")
    made = prune(tiny_model, how, token_ids)
    config = made.model.config
    assert config.num_parameters + made.parameters == tiny_model.config.num_parameters
    sizes = list(config.layers)
    if head_unit == "groups":
        assert min(own.num_kv_heads for own in sizes) == 1
    else:
        assert {own.num_kv_heads for own in sizes} == {2}
    assert sum(own.intermediate_size for own in sizes) == pytest.approx(0.7 * 2 * 96, abs=1)
    tokens = token_ids[0].tolist()
    whole = masked(tiny_model, made.model.weights.layers)
    found, expected = logits(reference(made.model), tokens), logits(reference(whole), tokens)
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_share_of_all_parameters_is_met(tiny_model, token_ids):
    before = tiny_model.config.num_parameters
    whole = {own.num_kv_heads for own in tiny_model.config.layers}
    for kinds, takes_heads in (("neurons_first", False), ("together", True)):
        made = prune(tiny_model, Prune(ratio=0.25, kinds=kinds), token_ids)
        biases = 2 * 64 * len(made.added_biases)
        assert made.parameters + biases == pytest.approx(0.25 * before, abs=3 * 64)
        assert made.model.config.num_parameters == before - made.parameters
        heads = {own.num_kv_heads for own in made.model.config.layers}
        assert (heads != whole) is takes_heads


@pytest.mark.parametrize("restore", ["bias", "least_squares"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biases"])
def test_restoring_never_makes_held_out_errors_larger(
    tiny_model, with_biases, token_ids, restore, biased
):
    model = with_biases(tiny_model) if biased else tiny_model
    made = prune(model, Prune(mlp=0.5, heads=0.4, restore=restore), token_ids)
    plain = prune(model, Prune(mlp=0.5, heads=0.4, restore="none"), token_ids)
    assert plain.added_biases == ()
    refitted, config = [], made.model.config
    for index, layer in enumerate(made.layers):
        own, before = (of.model.weights.layers[index] for of in (made, plain))
        for matrix, bias, name, report in (
            ("wo", "bo", "output", layer.output),
            ("w_down", "bd", "down", layer.down),
        ):
            assert report is None or report.restored <= report.removed
            has_weight = report is not None and report.weight is not None
            has_bias = report is not None and report.bias is not None
            assert torch.equal(getattr(own, matrix), getattr(before, matrix)) != has_weight
            refitted.append(has_weight)
            there = getattr(own, bias)
            assert (there is not None) == getattr(config, f"{name}_bias")
            if there is not None:
                was = torch.zeros(64) if getattr(before, bias) is None else getattr(before, bias)
                assert torch.equal(there, was) != has_bias
            assert (name in made.added_biases) <= (not biased)
    assert made.added_biases or biased
    assert any(refitted) <= (restore == "least_squares")
    assert made.parameters == model.config.num_parameters - config.num_parameters


@pytest.mark.parametrize("restore", ["bias", "least_squares"])
def test_what_each_matrix_loses_is_what_is_told(tiny_model, token_ids, restore):
    """Errors on the held-out windows, of the pruned model as it is walked through."""
    made = prune(tiny_model, Prune(mlp=0.5, restore=restore), token_ids)
    walk = Walk(made.model, token_ids[3::4])
    for index, (report, kept) in enumerate(
        zip(made.layers, made.model.weights.layers.kept, strict=True)
    ):
        whole, own = tiny_model.weights.layers[index], made.model.weights.layers[index]
        assert report.output is None
        walk.add_attention(index, own)
        lost = []
        for x in walk.x:
            made_of_all = activations(whole, walk.norm(x, whole.mlp_norm))
            wanted = made_of_all @ whole.w_down.T
            found = F.linear(made_of_all[:, kept.neurons], own.w_down, own.bd)
            sizes = wanted.norm(dim=1)
            assert sizes.min() > 0.01 * sizes.mean()
            lost.append(((wanted - found).norm(dim=1) / sizes).square())
        assert report.down.restored == pytest.approx(float(torch.cat(lost).mean()), rel=1e-3)
        walk.add_feed_forward(own)


def test_what_other_neurons_know_is_fitted_again(tiny_model, token_ids):
    """Each neuron of the second half is one of the first, whose weights in down are larger, so that it stays."""
    layers = []
    for layer in tiny_model.weights.layers:
        twins = {name: getattr(layer, name)[:48].repeat(2, 1) for name in ("w_gate", "w_up")}
        larger = torch.cat((layer.w_down[:, :48] * 4, layer.w_down[:, 48:]), dim=1)
        layers.append(replace(layer, w_down=larger, **twins))
    model = replace(tiny_model, weights=replace(tiny_model.weights, layers=layers))
    made = prune(model, Prune(mlp=0.2), token_ids)
    for layer in made.layers:
        assert layer.down.weight is not None
        assert layer.down.restored < 0.3 * layer.down.removed


def test_the_same_text_removes_the_same(tiny_model, token_ids):
    how = Prune(ratio=0.2, criterion="random", seed=5)
    one, two = (prune(tiny_model, how, token_ids).model.weights.layers for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.w_down, b.w_down)
        assert torch.equal(a.wq, b.wq)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"ratio": 0.9}, r"prune\.ratio is 0\.9, and of this model at most 0\.\d+ can be removed"),
        ({"heads": 0.6}, r"prune\.heads is 0\.6, and of this model at most 0\.5"),
        ({"mlp": 0.9}, r"prune\.mlp is 0\.9, and of this model at most 0\.875"),
        (
            {"heads": 0.05, "mlp": 0.3},
            r"prune\.heads is 0\.05, and 0 would be removed, .* the nearest share that can be met is 0\.25",
        ),
        ({"mlp": 1e-9}, r"prune\.mlp is 1e-09, and 0 would be removed"),
    ],
)
def test_what_leaves_too_little_is_refused(tiny_model, token_ids, how, told):
    with pytest.raises(ConfigError, match=told):
        prune(tiny_model, Prune(**how), token_ids)


def test_a_share_between_whole_heads_and_too_few_neurons_is_refused(tiny_model):
    """A head is more than all neurons that may go."""
    config = tiny_model.config.pruned([LayerSize(4, 2, 8)] * 2)
    with pytest.raises(
        ConfigError, match=r"the nearest share that can be met is (0\.\d+)$"
    ) as told:
        check_shares(config, Prune(ratio=0.07))
    check_shares(config, Prune(ratio=float(str(told.value).split()[-1])))


def test_query_heads_that_are_alone_are_told_as_the_reason(tiny_model):
    config = replace(tiny_model.config, num_kv_heads=4)
    for how in ({"heads": 0.3}, {"ratio": 0.95}):
        with pytest.raises(ConfigError, match="each KV head has one query head; head_unit: groups"):
            check_shares(config, Prune(**how, head_unit="queries"))
    with pytest.raises(
        ConfigError, match=r"of each KV head and an eighth of the neurons .* layer$"
    ):
        check_shares(config, Prune(mlp=0.9, head_unit="queries"))
    with pytest.raises(ConfigError, match=r"a query head of each KV head .* layer$"):
        check_shares(tiny_model.config, Prune(heads=0.9, head_unit="queries"))


@pytest.mark.parametrize("ratio", [0.3, 0.35, 0.4, 0.45])
@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
@pytest.mark.parametrize("kinds", ["neurons_first", "together"])
def test_a_share_is_met_up_to_half_a_neuron(tiny_model, token_ids, ratio, allocation, kinds):
    how = Prune(ratio=ratio, allocation=allocation, kinds=kinds, restore="none")
    removed = prune(tiny_model, how, token_ids).parameters
    assert removed == pytest.approx(ratio * tiny_model.config.num_parameters, abs=3 * 64 / 2 + 1)


def test_restoring_needs_a_window_to_hold_out(tiny_model, token_ids):
    with pytest.raises(ConfigError, match=r"4 windows .* has 3; .*prune\.restore none"):
        prune(tiny_model, Prune(mlp=0.5), token_ids[:3])


def with_last_layer(model: LoadedModel, matrix: str, value: float) -> LoadedModel:
    """A row of this matrix has this value."""
    *layers, last = model.weights.layers
    changed = getattr(last, matrix).clone()
    changed[3] = value
    layers.append(replace(last, **{matrix: changed}))
    return replace(model, weights=replace(model.weights, layers=layers))


@pytest.mark.parametrize("matrix", ["w_up", "wo", "w_down"])
@pytest.mark.parametrize("how", [Prune(mlp=0.3), Prune(heads=0.5, restore="none")])
def test_a_text_that_gives_what_is_not_finite_is_refused(tiny_model, token_ids, matrix, how):
    with pytest.raises(ConfigError, match="what layer 1 makes of it is not finite"):
        prune(with_last_layer(tiny_model, matrix, 3e38), how, token_ids)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("matrix", ["w_up", "wo"])
def test_weights_that_are_not_finite_are_refused(tiny_model, token_ids, matrix, value):
    model = with_last_layer(tiny_model, matrix, value)
    without_text = Prune(mlp=0.3, criterion="random", restore="none")
    for how, text in ((Prune(mlp=0.3), token_ids), (without_text, None)):
        with pytest.raises(CorruptCheckpoint, match=f"layer 1: {matrix} holds values that are not"):
            prune(model, how, text)


INT8 = """
name: pruned
quantizer: rtn
attention: {bits: 8}
gate_up: {bits: 8}
down: {bits: 8}
calibration: {windows: 4, tokens: 64}
"""


@pytest.mark.parametrize("recipe", [BF16, INT8])
@pytest.mark.parametrize("restore", ["none", "bias", "least_squares"])
def test_a_folder_of_a_pruned_model_serves_on_the_native_backend(
    tiny_folder, tmp_path, text, token_ids, recipe, restore
):
    how = (
        "prune: {heads: 0.25, mlp: 0.255, allocation: adaptive, head_unit: queries, "
        f"restore: {restore}}}"
    )
    made = compress_folder(
        str(tiny_folder), parse_recipe(recipe + how, "test"), [text], tmp_path / "out"
    )
    assert made.pruned is not None
    model = load_model(str(tmp_path / "out"), layers_at_use=True)
    assert list(model.config.layers) == [own.size for own in made.pruned.layers]
    assert len({own.intermediate_size for own in model.config.layers}) == 2
    added = made.pruned.added_biases
    assert (made.info.added_biases, made.info.format_version) == (added, 2 if added else 1)
    assert bool(added) == (restore != "none")
    assert model.config.num_parameters == made.pruned.model.config.num_parameters
    engine = assemble_engine(model, ServerSettings(backend="cpu", threads=1, kv_cache_gib=0.01))
    native = engine.engine.backend
    exact = load_model(str(tmp_path / "out"), dtype="float32")
    tokens = token_ids[1].tolist()
    found, expected = logits(native, tokens), logits(reference(exact), tokens)
    assert torch.allclose(found, expected, atol=0.06 * float(expected.abs().max()))
    blocks = native.read_blocks([1, 0])
    native.write_blocks([4, 5], blocks)
    assert torch.equal(native.read_blocks([4, 5]), blocks)
    assert blocks.shape == (2, native.info.kv_bytes_per_token * BLOCK_SIZE)


def test_what_goes_by_weights_alone_needs_no_text(tiny_folder, tmp_path, text):
    how = "prune: {mlp: 0.3, heads: 0.25, criterion: magnitude, restore: none}"
    recipe = parse_recipe(BF16 + how, "test")
    made = compress_folder(str(tiny_folder), recipe, [], tmp_path / "out")
    assert made.info.texts == ()
    tiny = load_model(str(tiny_folder), dtype="bfloat16", layers_at_use=True)
    windows = read_windows(tiny, [text], 4, 64).token_ids
    expected = prune(tiny, recipe.prune, windows, seen=statistics_of(tiny, windows)).model
    assert [own.size for own in made.pruned.layers] == list(expected.config.layers)
    found = load_model(str(tmp_path / "out"), layers_at_use=True)
    for own, other in zip(found.weights.layers, expected.weights.layers, strict=True):
        assert torch.equal(own.w_down, other.w_down)


@pytest.mark.parametrize(
    ("quantizer", "ways"),
    [
        ("rtn", r"prune\.criterion magnitude or random with prune\.restore none"),
        ("gptq", r"prune\.criterion .* none and a recipe with quantizer rtn and compensate none.*"),
    ],
)
def test_without_a_text_pruning_is_told_as_what_needs_it(quantizer, ways):
    recipe = parse_recipe(f"{{name: mine, quantizer: {quantizer}, prune: {{mlp: 0.2}}}}", "test")
    with pytest.raises(ConfigError, match=f"mine needs a text .*; or take {ways}$"):
        require_text(recipe, [])


def test_a_gguf_file_is_pruned_into_layers_of_their_own(write_gguf, tmp_path, text):
    write_gguf(tmp_path / "tiny.gguf")
    recipe = parse_recipe(BF16 + "prune: {mlp: 0.255, allocation: adaptive}", "test")
    made = compress_folder(str(tmp_path / "tiny.gguf"), recipe, [text], tmp_path / "out")
    model = load_model(str(tmp_path / "out"), layers_at_use=True)
    assert list(model.config.layers) == [own.size for own in made.pruned.layers]
    assert model.config.down_bias


def test_a_pruned_folder_is_pruned_again(tiny_folder, tmp_path, text):
    """What the first time added stays, and the second adds nothing that is there."""
    once, twice = (
        parse_recipe(BF16 + f"prune: {{{how}, restore: bias}}", "test")
        for how in ("mlp: 0.2", "mlp: 0.2, heads: 0.5")
    )
    first = compress_folder(str(tiny_folder), once, [text], tmp_path / "once")
    second = compress_folder(str(tmp_path / "once"), twice, [text], tmp_path / "twice")
    assert first.info.added_biases == ("down",)
    assert second.pruned.added_biases == ("output",)
    assert second.info.added_biases == ("down", "output")
    config = load_model(str(tmp_path / "twice"), layers_at_use=True).config
    assert (config.output_bias, config.down_bias) == (True, True)
    assert list(config.layers) == [own.size for own in second.pruned.layers]


def test_a_core_of_a_pruned_model_is_a_share_of_each_layers_own_neurons(tiny_model, token_ids):
    made = prune(tiny_model, Prune(mlp=0.3, allocation="adaptive"), token_ids)
    backend = reference(made.model)
    chooser = Chooser(made.model.config, backend.info)
    plan = chooser.plan(Policy(PolicyKind.CORE, density=0.5))
    neurons = made.model.config.layer_neurons
    assert len(set(neurons)) == 2
    assert plan.counts.tolist() == [round(own / 2 + 1e-9) for own in neurons]
    span = SequenceInput(token_ids[0].tolist(), 0, range(4), Phase.PREFILL, collect_statistics=True)
    prompt = PromptStatistics(BLOCK_SIZE)
    prompt.extend(0, backend.forward(ForwardBatch([span])).statistics[0])
    members = plan.choose(prompt).choice.members(made.model.config.intermediate_size)
    for own, count in zip(members, neurons, strict=True):
        assert not own[count:].any()


def test_sizes_that_cannot_be_are_refused(tiny_model):
    config = tiny_model.config
    for sizes, told in [
        ([LayerSize(4, 2, 96)], "1 layers have sizes, of 2"),
        ([LayerSize(4, 2, 96), LayerSize(4, 2, 97)], "layer 1 cannot have"),
        ([LayerSize(3, 2, 96), LayerSize(4, 2, 96)], "layer 0 cannot have"),
        ([LayerSize(4, 2, 96), LayerSize(0, 0, 96)], "layer 1 cannot have"),
    ]:
        with pytest.raises(CorruptCheckpoint, match=told):
            config.pruned(sizes)


def test_layers_alike_are_a_config_as_any_other(tiny_model):
    config = tiny_model.config.pruned([LayerSize(2, 1, 50)] * 2)
    assert (config.num_heads, config.num_kv_heads, config.intermediate_size) == (2, 1, 50)
    assert config.to_hf()["num_attention_heads"] == 2
    uneven = tiny_model.config.pruned([LayerSize(2, 1, 50), LayerSize(4, 2, 60)])
    assert uneven.num_neurons == 110
    with pytest.raises(UnsupportedModel, match="layer_sizes"):
        uneven.to_hf()
