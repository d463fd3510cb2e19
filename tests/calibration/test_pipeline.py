"""A whole calibration of the tiny model: its numbers, its file, and what happens when it is interrupted."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from sparse_kernels.choice import ChoiceKind
from sparserve.calibration.plan import QUICK
from sparserve.calibration.text import read_text
from sparserve.engine.factory import make_backend
from sparserve.errors import ConfigError, UnusableIndex
from sparserve.model import llama
from sparserve.model.backend import BLOCK_SIZE, ForwardBatch, Phase, SequenceInput
from sparserve.model.identity import index_key
from sparserve.model.reference import ReferenceBackend
from sparserve.sparsity.chooser import Chooser
from sparserve.sparsity.index import read_index
from sparserve.sparsity.policy import Policy, PolicyKind
from sparserve.sparsity.statistics import PromptStatistics

FULLER = replace(QUICK, correction_rank=4, loss_grid=(0.4, 0.7))


class Interrupted(Exception):
    pass


def test_equal_inputs_make_equal_files(calibrated_to, tmp_path):
    for name in ("one", "two"):
        calibrated_to(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(own.name for own in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("at", [3, 9, 12])
def test_an_interrupted_one_goes_on_and_makes_the_same_file(calibrated_to, tmp_path, at):
    told = []

    def interrupting(what, done, total):
        told.append((what, done))
        if len(told) == at:
            raise Interrupted

    with pytest.raises(Interrupted):
        calibrated_to(tmp_path / "index", effort=FULLER, on_progress=interrupting)
    assert not (tmp_path / "index").exists()
    assert (tmp_path / "index.partial").exists()
    again = Counter()
    calibrated_to(
        tmp_path / "index",
        effort=FULLER,
        on_progress=lambda what, done, total: again.update([what]),
    )
    assert "factors" not in again  # finished before the interruption
    calibrated_to(tmp_path / "whole", effort=FULLER)
    assert (tmp_path / "index").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "index.partial").exists()


def test_what_other_arguments_left_behind_is_not_used(calibrated_to, tmp_path):
    def interrupting(what, done, total):
        if what.startswith("losses"):
            raise Interrupted

    with pytest.raises(Interrupted):
        calibrated_to(tmp_path / "index", prompt_tokens=44, on_progress=interrupting)
    calibrated_to(tmp_path / "index")
    calibrated_to(tmp_path / "fresh")
    assert (tmp_path / "index").read_bytes() == (tmp_path / "fresh").read_bytes()


def test_a_file_of_others_is_not_written_over(calibrated_to, tmp_path):
    (tmp_path / "index.partial").write_text("mine")
    with pytest.raises(ConfigError, match=r"index\.partial would be written over, and is not what"):
        calibrated_to(tmp_path / "index")
    assert (tmp_path / "index.partial").read_text() == "mine"


def test_the_index_is_read_for_its_model_alone(
    calibrated_to, tmp_path, tiny_model, write_tiny_checkpoint
):
    from sparserve.model.loader import load_model

    calibrated_to(tmp_path / "index")
    index = read_index(tmp_path / "index", index_key(tiny_model, "float32"))
    assert len(index.settings) > 8
    other = load_model(str(write_tiny_checkpoint(tmp_path / "other", seed=1)))
    with pytest.raises(UnusableIndex, match="other weights"):
        read_index(tmp_path / "index", index_key(other, "float32"))
    with pytest.raises(UnusableIndex, match="'bfloat16'"):
        read_index(tmp_path / "index", index_key(tiny_model, "bfloat16"))


def test_costs_are_those_of_a_plain_decoder(calibrated_to, tmp_path, tiny_model, text_file):
    """One core, computed here with nothing but the model's equations, over the windows held out."""
    index = calibrated_to(tmp_path / "index")
    setting = next(own for own in index.settings if own.kind is PolicyKind.CORE)
    held_out = read_text(tiny_model, [text_file], 6, 40, 12).held_out
    plan = Chooser(tiny_model.config, _info(tiny_model), index).plan(
        Policy(PolicyKind.CORE, setting.density)
    )
    torch.testing.assert_close(plan.setting.shares, setting.shares)
    divergences, agreements = [], []
    for window in held_out:
        ids = torch.tensor(window.prompt + window.fed)
        backend = ReferenceBackend(tiny_model.config, tiny_model.weights, num_blocks=8, threads=1)
        own = SequenceInput(window.prompt, 0, range(4), Phase.PREFILL, collect_statistics=True)
        prompt = PromptStatistics(BLOCK_SIZE)
        prompt.extend(0, backend.forward(ForwardBatch([own])).statistics[0])
        members = plan.choose(prompt).choice.members(tiny_model.config.intermediate_size)
        dense, sparse = (_logits(tiny_model, ids, 40, own) for own in (None, members))
        divergences.append((dense.exp() * (dense - sparse)).sum(dim=1).mean())
        agreements.append((dense.argmax(dim=1) == sparse.argmax(dim=1)).double().mean())
    assert setting.kl == pytest.approx(float(torch.stack(divergences).mean()), rel=1e-3)
    assert setting.top1 == pytest.approx(float(torch.stack(agreements).mean()))
    assert setting.kl_p95 == pytest.approx(
        float(torch.stack(divergences).double().quantile(0.95)), rel=1e-3
    )
    assert setting.density == pytest.approx(float(members.double().mean()))


def _info(model):
    return ReferenceBackend(model.config, model.weights, num_blocks=1, threads=1).info


def _logits(model, ids, first, members):
    """Log-probabilities in float64 after each position from `first` on, whose neurons are `members`."""
    config, weights = model.config, model.weights
    frequencies = llama.rope_frequencies(config.rope, config.head_dim)
    cos, sin = llama.rope_tables(torch.arange(len(ids)), frequencies)
    hidden = torch.ones(len(ids), len(ids)).triu(1).bool()
    mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
    x = weights.embedding[ids]
    for index, layer in enumerate(weights.layers):
        normed = llama.rms_norm(x, layer.attn_norm, config.rms_norm_eps)
        q, k, v = (
            (normed @ w.T).view(len(ids), -1, config.head_dim)
            for w in (layer.wq, layer.wk, layer.wv)
        )
        q, k = llama.apply_rope(q, cos, sin), llama.apply_rope(k, cos, sin)
        x = x + llama.attention(q, k.transpose(0, 1), v.transpose(0, 1), mask) @ layer.wo.T
        normed = llama.rms_norm(x, layer.mlp_norm, config.rms_norm_eps)
        used = torch.nn.functional.silu(normed @ layer.w_gate.T) * (normed @ layer.w_up.T)
        if members is not None:
            used[first:] *= members[index]
        x = x + used @ layer.w_down.T
    logits = llama.rms_norm(x[first:], weights.norm, config.rms_norm_eps) @ weights.lm_head.T
    return logits.double().log_softmax(dim=1)


def test_with_planes_the_native_backend_reads_what_the_index_says(
    calibrated_to, tmp_path, tiny_bfloat16, text_file
):
    native = {"backend": "cpu", "dtype": "int8", "weight_planes": "4+4"}
    index = calibrated_to(tmp_path / "index", model=tiny_bfloat16, effort=FULLER, **native)
    kinds = {own.choice for own in index.settings}
    assert kinds == {None, *ChoiceKind}
    assert any(own.correction for own in index.settings)
    settings = _settings(**native)
    backend, _ = make_backend(tiny_bfloat16, settings, 64, choice=index.choice)
    plan = Chooser(tiny_bfloat16.config, backend.info, index).plan(Policy(PolicyKind.TOKEN, 0.6))
    assert plan.policy.choice is ChoiceKind.PLANES
    ids = tiny_bfloat16.tokenizer.encode(text_file.read_text()[:60]).ids
    table = range(4)
    backend.forward(ForwardBatch([SequenceInput(ids[:30], 0, table, Phase.PREFILL)]))
    choice = plan.choose(None).choice
    own = SequenceInput(ids[30:46], 30, table, Phase.DECODE, choice, output_offsets=(0,))
    [reads] = backend.forward(ForwardBatch([own])).reads
    each = backend.info.neuron_bytes[ChoiceKind.PLANES]
    counts = reads.counts.sum(dim=0).double() / reads.tokens
    neurons = 2 * tiny_bfloat16.config.intermediate_size
    read = sum(part * n for part, n in zip(each, counts.tolist(), strict=True))
    assert read / sum(each) / neurons == pytest.approx(0.6, abs=0.06)


def _settings(**own):
    from sparserve.config import EngineSettings

    return EngineSettings(**{"threads": 1, "kv_cache_gib": 0.01, **own})


def test_a_text_that_is_too_short_says_how_much_there_is(tiny_model, text_file):
    tokens = len(text_file.read_text())  # a byte is a token
    with pytest.raises(ConfigError, match=rf"{tokens} tokens.*{tokens // 53} windows of 53"):
        read_text(tiny_model, [text_file], 1000, 40, 12)


def test_windows_come_from_all_files_by_their_lengths(tiny_model, text_file, tmp_path):
    (tmp_path / "other").write_text("z" * (len(text_file.read_text()) // 3))
    text = read_text(tiny_model, [text_file, tmp_path / "other"], 8, 40, 12)
    from_other = [w for w in (*text.fitted, *text.held_out) if set(w.prompt) == {w.prompt[0]}]
    assert (len(text.fitted), len(text.held_out), len(from_other)) == (4, 4, 2)
