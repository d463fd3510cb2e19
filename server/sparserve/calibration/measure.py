"""What settings cost and read on a window of text, decoded as a server decodes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparse_kernels._abi import SK_CHOICE_TOKENS
from sparse_kernels.choice import ALL_NEURONS, NeuronChoice
from sparserve.bench.quality import Window
from sparserve.engine.block_manager import blocks_for
from sparserve.model.backend import BLOCK_SIZE, Backend, ForwardBatch, Phase, SequenceInput
from sparserve.sparsity.chooser import ChoicePlan
from sparserve.sparsity.statistics import PromptStatistics

PREFILL_CHUNK = 512


@dataclass(frozen=True, slots=True)
class WindowCost:
    """Of one setting on one window."""

    kl: float  # mean over its decoded positions of KL(dense || setting), nats
    top1: float  # share of them with dense's likeliest token
    reads: tuple[float, ...]  # shares of the neurons, mean over layers and tokens, see NeuronReads


def prefill(backend: Backend, window: Window) -> PromptStatistics:
    """The window's prompt, into the first blocks of `backend`, which has no other user."""
    prompt = PromptStatistics(BLOCK_SIZE)
    for start in range(0, len(window.prompt), PREFILL_CHUNK):
        part = window.prompt[start : start + PREFILL_CHUNK]
        table = range(blocks_for(window.tokens))
        own = SequenceInput(part, start, table, Phase.PREFILL, collect_statistics=True)
        statistics = backend.forward(ForwardBatch([own])).statistics[0]
        assert statistics is not None
        prompt.extend(start, statistics)
    return prompt


def costs(backend: Backend, window: Window, plans: Sequence[ChoicePlan]) -> list[WindowCost]:
    """Of each of `plans`: the window's prompt is read once, its continuation fed through decode, token by
    token as far as numbers go, once for each of them and once dense."""
    prompt = prefill(backend, window)
    dense, _ = _decoded(backend, window, ALL_NEURONS)
    dense = dense.log_softmax(dim=1)
    likely, probabilities = dense.argmax(dim=1), dense.exp()
    found = []
    for plan in plans:
        logits, reads = _decoded(backend, window, plan.choose(prompt).choice)
        own = logits.log_softmax(dim=1)
        # Rounding may leave a little less than nothing.
        kl = torch.linalg.vecdot(probabilities, dense - own).clamp(min=0)
        agrees = own.argmax(dim=1) == likely
        found.append(WindowCost(float(kl.double().mean()), float(agrees.double().mean()), reads))
    return found


def _decoded(
    backend: Backend, window: Window, choice: NeuronChoice
) -> tuple[torch.Tensor, tuple[float, ...]]:
    """-> (logits [fed tokens, vocab] float32, shares of the neurons read)."""
    rows = torch.empty(len(window.fed), backend.config.vocab_size)
    counts = torch.zeros(4, dtype=torch.int64)
    # Several tokens of a sequence in one forward are computed as one after another.
    for start in range(0, len(window.fed), SK_CHOICE_TOKENS):
        part = window.fed[start : start + SK_CHOICE_TOKENS]
        own = SequenceInput(
            part,
            len(window.prompt) + start,
            range(blocks_for(window.tokens)),
            Phase.DECODE,
            choice,
            output_offsets=range(len(part)),
        )
        output = backend.forward(ForwardBatch([own]))
        for offset in range(len(part)):
            rows[start + offset] = output.candidates.full_logits(offset).cpu()
        if output.reads and (reads := output.reads[0]) is not None:
            counts += reads.counts.sum(dim=0)
    config = backend.config
    of = config.num_neurons * len(window.fed)
    return rows, tuple((counts.double() / of).tolist())
