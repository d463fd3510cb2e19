"""Random tiny decoders of any shape, for the packer, the library and the oracle."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from sparse_kernels.pack import PackedDecoder, pack
from sparse_kernels.weights import DecoderConfig, EndTensors, LayerShape, LayerTensors

TWO_LAYERS = (LayerShape(4, 2, 96), LayerShape(4, 2, 96))


@dataclass(frozen=True)
class Tiny:
    config: DecoderConfig
    ends: EndTensors
    layers: list[LayerTensors]

    def packed(self) -> PackedDecoder:
        return pack(self.config, self.ends, self.layers)


def make_tiny(
    *,
    hidden_size: int = 64,
    vocab_size: int = 50,
    head_dim: int = 16,
    layers: Sequence[LayerShape] = TWO_LAYERS,
    biases: bool = False,
    head_norms: bool = False,
    tied: bool = False,
    rope_rows: int = 1,
    rope_scale: float = 1.0,
    rms_norm_eps: float = 1e-5,
    seed: int = 0,
) -> Tiny:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator)
        return (values * scale * columns**-0.5).bfloat16()

    def vector(length: int, base: float = 1.0) -> torch.Tensor:
        return base + 0.2 * torch.randn(length, generator=generator)

    def layer(shape: LayerShape) -> LayerTensors:
        q, kv = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
        tensors = LayerTensors(
            q=matrix(q, hidden_size),
            k=matrix(kv, hidden_size),
            v=matrix(kv, hidden_size),
            output=matrix(hidden_size, q),
            gate=matrix(shape.intermediate_size, hidden_size),
            up=matrix(shape.intermediate_size, hidden_size),
            down=matrix(hidden_size, shape.intermediate_size),
            attention_norm=vector(hidden_size),
            mlp_norm=vector(hidden_size),
        )
        if biases:
            tensors = replace(
                tensors,
                q_bias=vector(q, 0.0),
                k_bias=vector(kv, 0.0),
                v_bias=vector(kv, 0.0),
                output_bias=vector(hidden_size, 0.0),
            )
        if head_norms:
            tensors = replace(tensors, q_norm=vector(head_dim), k_norm=vector(head_dim))
        return tensors

    exponents = torch.arange(0, head_dim, 2) / head_dim
    frequencies = 1.0 / 100.0**exponents
    if rope_rows > 1:
        frequencies = frequencies * torch.linspace(1, 0.5, rope_rows)[:, None]
    config = DecoderConfig(
        hidden_size, vocab_size, head_dim, rms_norm_eps, frequencies, layers, rope_scale
    )
    ends = EndTensors(
        matrix(vocab_size, hidden_size, 8.0),
        vector(hidden_size),
        None if tied else matrix(vocab_size, hidden_size, 4.0),
    )
    return Tiny(config, ends, [layer(shape) for shape in layers])


@pytest.fixture(scope="session")
def tiny_decoder() -> Callable[..., Tiny]:
    """`tiny_decoder(hidden_size=…, …)`: its constants and random weights."""
    return make_tiny
