"""Scales of columns and what takes them back: together they change nothing."""

from dataclasses import replace

import pytest
import torch

from sparse_kernels.formats import MatrixFormat
from sparse_kernels.weights import Factors
from sparserve.compression.quantize import quantize
from sparserve.model.effective import effective
from sparserve.model.loader import load_model
from sparserve.model.packing import layer_tensors
from sparserve.model.stacks import GATE_UP, OUTPUT, QKV, columns_alike, with_inputs_divided
from sparserve.model.walk import Walk

QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 8, "attention_bias": True},
        QWEN2,
        QWEN3,
    ],
    ids=["groups", "no groups", "one group", "narrow heads", "biases", "q and k norms"],
)
@pytest.mark.parametrize("stack", [QKV, OUTPUT, GATE_UP], ids=lambda stack: stack.names[0])
def test_a_layer_with_scaled_columns_computes_what_it_did(
    write_tiny_checkpoint, tmp_path, config, stack
):
    folder = write_tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16, **config)
    model = load_model(str(folder), dtype="bfloat16")
    layer = layer_tensors(model.weights.layers[0])
    generator = torch.Generator().manual_seed(0)
    v = quantize(layer.v, MatrixFormat(8, 32), "v")
    codes = torch.randint(0, 256, (len(layer.v), 32), generator=generator, dtype=torch.uint8)
    basis = torch.randn(32, model.config.hidden_size, generator=generator).bfloat16()
    layer = replace(layer, v=replace(v, factors=Factors(codes, v.scales[:, 0])), qkv_basis=basis)

    alike = columns_alike(stack, model.config, 0)
    width = getattr(layer, stack.names[0]).shape[1]
    if alike is None:
        scales = torch.rand(width, generator=generator) * 4 + 0.25
    else:
        heads, _, head_dim = alike
        scales = torch.rand(heads, 1, head_dim, generator=generator) * 4 + 0.25
        scales = scales.expand(alike).flatten()
    assert len(scales) == width

    def outputs(layer, scales) -> torch.Tensor:
        exact = effective(layer)
        scaled = {name: getattr(exact, name) * scales for name in stack.fields}
        walk = Walk(model, torch.arange(60).view(2, 30))
        walk.add_attention(0, replace(exact, **scaled))
        walk.add_feed_forward(replace(exact, **scaled))
        return walk.x

    before = outputs(layer, torch.ones(width))
    after = outputs(with_inputs_divided(layer, stack, scales, alike), scales)
    away = (outputs(layer, scales) - before).norm()
    # The scales of v are rounded to float16.
    assert (after - before).norm() < away * (1e-3 if stack is OUTPUT else 1e-5)
