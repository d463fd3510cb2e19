"""Between a network that learns and tensors as they are stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sparse_kernels.formats import DecoderFormats
from sparse_kernels.weights import EndTensors, LayerTensors, QuantizedMatrix
from sparserve.compression.low_rank import LowRank, quantize_factors
from sparserve.healing.network import DTYPE, HealedLayer, HealedStack, Network
from sparserve.model.loader import LoadedModel
from sparserve.model.packing import layer_tensors
from sparserve.model.stacks import DOWN, GATE_UP, OUTPUT, QKV, STACKS, Stack

# Fields of HealedLayer.
FIELDS = {QKV: "qkv", OUTPUT: "output", GATE_UP: "gate_up", DOWN: "down"}


@dataclass(frozen=True, slots=True, eq=False)
class StoredStack:
    weight: torch.Tensor  # [out, in], without its low-rank term
    term: LowRank | None  # as it is stored
    integers: bool  # they stay as they are, so that what is learned cannot be merged


def formats_of(model: LoadedModel) -> DecoderFormats:
    """Of what is stored."""
    return DecoderFormats() if model.compressed is None else model.compressed.formats


def stored_stack(layer: LayerTensors, stack: Stack) -> StoredStack:
    matrices = [getattr(layer, name) for name in stack.names]
    first = matrices[0]
    if not isinstance(first, QuantizedMatrix):
        return StoredStack(torch.cat(matrices), None, integers=False)
    weight = torch.cat([own.dequantize() for own in matrices])
    term = None
    if first.factors is not None:
        outputs = torch.cat([own.factors.dequantize() for own in matrices])
        term = LowRank(outputs, getattr(layer, stack.basis).float())
    if stack is DOWN:
        weight, term = weight.T, term and term.transposed
    return StoredStack(weight, term, integers=True)


def layer_as_stored(model: LoadedModel, index: int) -> LayerTensors:
    if model.compressed is not None:
        return model.compressed.layers[index]
    return layer_tensors(model.weights.layers[index])


def healed_tensors(layer: LayerTensors, healed: HealedLayer) -> LayerTensors:
    """`layer` with what was learned: added to matrices of 16 bits, as low-rank terms beside integers."""
    changes: dict[str, Any] = {
        "attention_norm": healed.attn_norm.detach().cpu(),
        "mlp_norm": healed.mlp_norm.detach().cpu(),
        "down_bias": healed.down_bias.detach().cpu(),
    }
    for stack in STACKS:
        changes |= _stack_changes(layer, stack, getattr(healed, FIELDS[stack]))
    gains = healed.log_gains.detach().cpu().exp()
    changes["up"] = _with_gains(changes.get("up", layer.up), gains)
    return replace(layer, **changes)


def healed_ends(model: LoadedModel, network: Network) -> EndTensors:
    weights, norm = model.weights, network.norm.detach().cpu()
    if model.compressed is not None:
        return replace(model.compressed.ends, norm=norm)
    tied = weights.lm_head is weights.embedding
    return EndTensors(weights.embedding, norm, None if tied else weights.lm_head)


def _stack_changes(layer: LayerTensors, stack: Stack, healed: HealedStack) -> dict[str, Any]:
    if not healed.rank:
        return {}
    matrices = [getattr(layer, name) for name in stack.names]
    if not isinstance(matrices[0], QuantizedMatrix):
        rows = torch.split(healed.merged().cpu(), [len(own) for own in matrices])
        parts = [own.to(DTYPE).contiguous() for own in rows]
        return dict(zip(stack.names, parts, strict=True))
    term = LowRank(healed.outputs.detach().cpu(), healed.inputs.detach().cpu())
    # Of down, a row's activations become integers for the matrix and for B together.
    scale = float(matrices[0].scales.max()) if stack is DOWN else 1.0
    made = quantize_factors(term.transposed if stack is DOWN else term, scale or 1.0)
    codes, scales = (
        torch.split(part, [len(own.codes) for own in matrices])
        for part in (made.codes, made.scales)
    )
    changes: dict[str, Any] = {
        name: replace(
            own, factors=replace(own.factors, codes=c.contiguous(), scales=s.contiguous())
        )
        for name, own, c, s in zip(stack.names, matrices, codes, scales, strict=True)
    }
    return changes | {stack.basis: made.inputs}


def _with_gains(up: Any, gains: torch.Tensor) -> Any:
    """Rows times `gains` [neurons], which are above 0."""
    if not isinstance(up, QuantizedMatrix):
        return (up.float() * gains[:, None]).to(DTYPE)
    factors = up.factors and replace(up.factors, scales=(up.factors.scales * gains).half())
    return replace(up, scales=(up.scales * gains[:, None]).half(), factors=factors)


def network_of(model: LoadedModel, rank: int = 0, seed: int = 0) -> Network:
    """A copy of `model` that can learn. Matrices of 16 bits get terms of `rank`, whose B begins as zeros (LoRA, arXiv
    2106.09685); integers learn through the terms that they have."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for index in range(model.config.num_layers):
        tensors = layer_as_stored(model, index)
        stacks = {}
        for stack, name in FIELDS.items():
            own = stored_stack(tensors, stack)
            term = own.term
            if not own.integers and rank:
                term = _new_term(own.weight, rank, generator)
            stacks[name] = HealedStack(own.weight, term)
        layers.append(HealedLayer(model.config, index, tensors, stacks))
    return Network(model.config, model.weights, layers)


def _new_term(weight: torch.Tensor, rank: int, generator: torch.Generator) -> LowRank:
    out, width = weight.shape
    rank = min(rank, out, width)
    inputs = torch.randn(rank, width, generator=generator) * width**-0.5
    return LowRank(torch.zeros(out, rank), inputs)
