"""From a model's weights to the native library's own copy of them, and a decoder over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from sparse_kernels.decoder import Decoder
from sparse_kernels.formats import DecoderFormats
from sparse_kernels.pack import PackedDecoder, pack, with_choice, with_scan
from sparse_kernels.weights import (
    ChoiceTensors,
    DecoderConfig,
    EndTensors,
    LayerShape,
    LayerTensors,
    NonFiniteWeights,
)
from sparserve.compression.quantize import ScaleOverflow, quantize, quantize_layer
from sparserve.compression.scan import make_scan
from sparserve.errors import CorruptCheckpoint, UnsupportedModel
from sparserve.model import llama
from sparserve.model.backend import BLOCK_SIZE, Phase, SequenceInput
from sparserve.model.compressed_checkpoint import CompressedWeights
from sparserve.model.config import ModelConfig
from sparserve.model.weights import LayerWeights, ModelWeights

DTYPE = torch.bfloat16
# Tokens of a calibration text that are read as one sequence.
CALIBRATION_TOKENS = 256

# (layers quantized, layers in all)
QuantizeProgress = Callable[[int, int], None]


def make_decoder(
    config: ModelConfig,
    weights: ModelWeights,
    formats: DecoderFormats = DecoderFormats(),
    *,
    threads: int,
    device: str = "cpu",
    kv_bits: int = 16,
    graphs: bool = True,
    core_copies: bool = True,
    calibration: Sequence[int] = (),
    choice: ChoiceTensors | None = None,
    compressed: CompressedWeights | None = None,
    on_layer: QuantizeProgress = lambda done, total: None,
) -> Decoder:
    """A decoder over a copy of `weights`, which on a GPU has the `threads` for packing alone. Raises as
    `pack_model`, and NativeCallError of what the library refuses.
    """
    packed = pack_model(
        config,
        weights,
        formats,
        threads=threads,
        calibration=calibration,
        choice=choice,
        compressed=compressed,
        on_layer=on_layer,
    )
    own_threads = threads if device == "cpu" else 1
    return Decoder(
        packed,
        device=device,
        threads=own_threads,
        kv_bits=kv_bits,
        graphs=graphs,
        core_copies=core_copies,
    )


def pack_model(
    config: ModelConfig,
    weights: ModelWeights,
    formats: DecoderFormats = DecoderFormats(),
    *,
    threads: int = 1,
    calibration: Sequence[int] = (),
    choice: ChoiceTensors | None = None,
    compressed: CompressedWeights | None = None,
    on_layer: QuantizeProgress = lambda done, total: None,
) -> PackedDecoder:
    """The library's own copy of `weights`, which are in DTYPE in main memory; each layer is asked for
    once, quantized as `formats` says (then `on_layer` is told) and packed before the next is. A scan of the
    LM head is made for what the model computes of the tokens `calibration`, on so many `threads`. With
    `choice` sequences can choose neurons by importance. Of a `compressed` model, whose own formats are `formats`,
    layers and ends are packed as they are stored.

    Raises NativeCallError of what the library refuses, CorruptCheckpoint of weights that are not finite, UnsupportedModel of those that cannot be
    quantized, and MemoryError.
    """
    shapes = [
        LayerShape(own.num_heads, own.num_kv_heads, own.intermediate_size, config.window(layer))
        for layer, own in enumerate(config.layers)
    ]
    decoder_config = DecoderConfig(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_frequencies=llama.rope_frequencies(
            config.rope, config.head_dim, weights.rope_factors, config.max_position_embeddings
        ).contiguous(),
        layers=shapes,
        rope_scale=config.rope.attention_factor,
    )
    with told_as_model_errors():
        if compressed is None:
            ends, layers = _ends(weights, formats), _layers(weights, formats, on_layer)
        else:
            # By index: a sequence's iterator would hold one layer while it reads the next.
            ends = compressed.ends
            layers = map(compressed.layers.__getitem__, range(config.num_layers))
        packed = pack(decoder_config, ends, layers, formats)
        if choice is not None:
            packed = with_choice(packed, choice)
        if not formats.lm_head_scan:
            return packed
        inputs = _head_inputs(packed, calibration or range(min(config.vocab_size, 256)), threads)
        return with_scan(packed, make_scan(weights.lm_head, inputs))


@contextmanager
def told_as_model_errors() -> Iterator[None]:
    try:
        yield
    except NonFiniteWeights as error:
        raise CorruptCheckpoint(f"the weights are damaged: {error}") from error
    except ScaleOverflow as error:
        raise UnsupportedModel(f"the weights cannot be quantized: {error}") from error


def _head_inputs(packed: PackedDecoder, token_ids: Sequence[int], threads: int) -> torch.Tensor:
    """What the LM head gets after each of these tokens, [tokens, hidden]. But for the first of a sequence:
    there all models have something of its own kind."""
    parts = []
    with Decoder(packed, threads=threads) as decoder:
        table = range(-(-CALIBRATION_TOKENS // BLOCK_SIZE))
        kv = decoder.new_kv(len(table))
        for begin in range(0, len(token_ids), CALIBRATION_TOKENS):
            piece = token_ids[begin : begin + CALIBRATION_TOKENS]
            sequence = SequenceInput(piece, 0, table, Phase.PREFILL)
            parts.append(decoder.forward([sequence], kv, hidden_rows=range(1, len(piece))).hidden)
    return llama.rms_norm(torch.cat(parts), packed.norm, packed.config.rms_norm_eps)


def _ends(weights: ModelWeights, formats: DecoderFormats) -> EndTensors:
    if formats.lm_head.quantized:
        lm_head = quantize(weights.lm_head, formats.lm_head, "lm_head")
        return EndTensors(weights.embedding, weights.norm, lm_head)
    tied = weights.lm_head is weights.embedding
    return EndTensors(weights.embedding, weights.norm, None if tied else weights.lm_head)


def _layers(
    weights: ModelWeights, formats: DecoderFormats, on_layer: QuantizeProgress
) -> Iterator[LayerTensors]:
    total = len(weights.layers)

    def layer(index: int) -> LayerTensors:
        tensors = layer_tensors(weights.layers[index])
        made = quantize_layer(tensors, formats.layer(index), f"layer {index}: ")
        if formats.quantized:
            on_layer(index + 1, total)
        return made

    # By index: a sequence's iterator would hold one layer while it reads the next.
    return map(layer, range(total))


def layer_tensors(layer: LayerWeights) -> LayerTensors:
    return LayerTensors(
        q=layer.wq,
        k=layer.wk,
        v=layer.wv,
        output=layer.wo,
        gate=layer.w_gate,
        up=layer.w_up,
        down=layer.w_down,
        attention_norm=layer.attn_norm,
        mlp_norm=layer.mlp_norm,
        q_bias=layer.bq,
        k_bias=layer.bk,
        v_bias=layer.bv,
        output_bias=layer.bo,
        down_bias=layer.bd,
        q_norm=layer.q_norm,
        k_norm=layer.k_norm,
    )
