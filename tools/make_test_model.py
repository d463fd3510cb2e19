"""Write a model that computes the same function with weights on no grid.

Usage: python tools/make_test_model.py MODEL FOLDER [--seed N]

A model that comes out of a quantized file (the demo's, Q4_1) looks better in formats aligned with that
file's groups than a trained one would. Random positive scales per channel are folded through what they
cancel in: an RMSNorm's weight and the matrices after it, v and o, up and down. In float32 the logits stay
the same up to rounding, and no grid is left. FOLDER becomes a Hugging Face folder in float32.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from sparserve.bench.to_transformers import to_transformers
from sparserve.model.config import ModelConfig
from sparserve.model.loader import LoadedModel, load_model
from sparserve.model.weights import LayerWeights


def fold_scales(model: LoadedModel, seed: int) -> LoadedModel:
    """The same function with other weights; deterministic in `seed`."""
    generator = torch.Generator().manual_seed(seed)
    layers = tuple(_fold_layer(layer, model.config, generator) for layer in model.weights.layers)
    return replace(model, weights=replace(model.weights, layers=layers))


def _fold_layer(
    layer: LayerWeights, config: ModelConfig, generator: torch.Generator
) -> LayerWeights:
    def scales(count: int) -> torch.Tensor:
        """[count], log-uniform in [1/2, 2]."""
        return torch.exp2(2 * torch.rand(count, generator=generator) - 1)

    hidden, mlp = config.hidden_size, config.intermediate_size
    attn, ffn, neuron = scales(hidden), scales(hidden), scales(mlp)
    value = scales(config.num_kv_heads * config.head_dim)
    # Each query head takes the values of its group's head.
    per_head = value.view(config.num_kv_heads, 1, config.head_dim)
    group = config.num_heads // config.num_kv_heads
    output = per_head.expand(-1, group, -1).reshape(-1)
    return replace(
        layer,
        attn_norm=layer.attn_norm * attn,
        wq=layer.wq / attn,
        wk=layer.wk / attn,
        wv=layer.wv / attn * value[:, None],
        bv=None if layer.bv is None else layer.bv * value,
        wo=layer.wo / output,
        mlp_norm=layer.mlp_norm * ffn,
        w_gate=layer.w_gate / ffn,
        w_up=layer.w_up / ffn * neuron[:, None],
        w_down=layer.w_down / neuron,
    )


def write_folder(model: LoadedModel, folder: Path) -> None:
    """Raises ConfigError where transformers has no such model."""
    to_transformers(model).save_pretrained(folder)
    special = {
        "bos_token_id": model.config.bos_token_id,
        "eos_token_id": next(iter(model.config.eos_token_ids), None),
    }
    write_tokenizer(folder, model.tokenizer, model.chat_template, special)


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, chat_template: str | None, special: Mapping[str, int | None]
) -> None:
    """`special`: ids by their names in config.json, such as `bos_token_id`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {
        name.removesuffix("_id"): tokenizer.id_to_token(i)
        for name, i in special.items()
        if i is not None
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": chat_template,
        **tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="what --model of the commands takes")
    parser.add_argument("folder", type=Path, help="is made where it does not exist")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = load_model(arguments.model, dtype="float32")
    write_folder(fold_scales(model, arguments.seed), arguments.folder)


if __name__ == "__main__":
    main()
