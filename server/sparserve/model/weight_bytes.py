"""Bytes of weights that a native backend reads."""

from __future__ import annotations

import torch

from sparse_kernels.choice import ChoiceKind
from sparse_kernels.formats import BFLOAT16, SCAN, DecoderFormats, LayerFormats
from sparse_kernels.pack import scan_columns
from sparserve.model.config import ModelConfig
from sparserve.model.weights import layer_shapes


def bytes_of_a_step(config: ModelConfig, formats: DecoderFormats) -> tuple[int, int]:
    """Bytes of weights that a dense decode step reads, and of these the feed-forward layers': codes,
    scales and zeros without padding, vectors in float32, and all but the embedding, of which a step takes
    one row. The bases of low-rank terms belong to no neuron, and do not count as the feed-forward layers'.
    """
    hidden, rows = config.hidden_size, config.vocab_size
    layers = [_bytes_of_a_layer(config, i, formats.layer(i)) for i in range(config.num_layers)]
    head = formats.lm_head.bytes(rows, hidden)
    # With two bounds of each row's error; a few rows of the LM head are beside it.
    if formats.lm_head_scan:
        head = SCAN.bytes(rows, scan_columns(hidden)) + 8 * rows
    return sum(whole for whole, _ in layers) + head + 4 * hidden, sum(mlp for _, mlp in layers)


def bytes_of_weights(config: ModelConfig, formats: DecoderFormats) -> int:
    """All that a step may read: with the embedding, which is no LM head that is quantized."""
    shared = config.tie_word_embeddings and not formats.lm_head.quantized
    embedding = 0 if shared else BFLOAT16.bytes(config.vocab_size, config.hidden_size)
    return bytes_of_a_step(config, formats)[0] + embedding


def _bytes_of_a_layer(config: ModelConfig, index: int, formats: LayerFormats) -> tuple[int, int]:
    """(of all, of these the feed-forward's)."""
    hidden, neurons = config.hidden_size, config.layer(index).intermediate_size
    shapes = layer_shapes(config, index)
    attention = sum(formats.attention.bytes(*shapes[name]) for name in ("wq", "wk", "wv", "wo"))
    vectors = 4 * sum(shape[0] for shape in shapes.values() if len(shape) == 1)
    mlp = 2 * formats.gate_up.bytes(neurons, hidden) + formats.down.bytes(neurons, hidden)
    bases = formats.attention.basis_bytes(hidden + shapes["wo"][1])
    bases += formats.gate_up.basis_bytes(hidden) + formats.down.basis_bytes(hidden)
    return attention + mlp + bases + vectors, mlp


def layer_neuron_bytes(
    config: ModelConfig, formats: DecoderFormats
) -> dict[ChoiceKind | None, torch.Tensor]:
    """See BackendInfo."""
    layers = [_neuron_bytes(config, formats.layer(i)) for i in range(config.num_layers)]
    kinds = layers[0].keys()  # of all: planes are the same
    return {
        kind: torch.tensor([own[kind] for own in layers], dtype=torch.float64) for kind in kinds
    }


def _neuron_bytes(
    config: ModelConfig, formats: LayerFormats
) -> dict[ChoiceKind | None, tuple[float, float, float, float]]:
    hidden, gate = config.hidden_size, formats.gate_up
    row = gate.bytes(1, hidden)
    low, down_low = (
        own.low_bits * (hidden / 8 + own.rank / own.bits) for own in (gate, formats.down)
    )
    down = formats.down.bytes(1, hidden)
    kinds: dict[ChoiceKind | None, tuple[float, float, float, float]] = dict.fromkeys(
        (None, ChoiceKind.GATE), (row, row + down, 0, 0)
    )
    if gate.low_bits:
        kinds[ChoiceKind.PLANES] = (2 * (row - low), down - down_low, 2 * low, down_low)
    return kinds
