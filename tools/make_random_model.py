"""Write a Llama of random weights, for speed alone: what it says has no meaning.

Usage: python tools/make_random_model.py TOKENIZER FOLDER [--seed N] [--hidden-size N] …

The defaults are TinyLlama's shape, 1.1 billion parameters in 2.2 GB. FOLDER becomes a Hugging Face folder in
bfloat16, a shard for each layer, so that one layer is in memory at a time. Reports and servers name a model
by its folder, so FOLDER's name must say `random`. Of the tokenizer, which another model lends, the ids beyond
the vocabulary are left out.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from make_test_model import write_tokenizer
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import Tokenizer

from sparserve.model.config import ModelConfig
from sparserve.model.loader import load_model
from sparserve.model.safetensors_checkpoint import INDEX
from sparserve.model.weights import HF_NAMES, layer_shapes

DTYPE = torch.bfloat16
TINY_LLAMA = {
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,  # longer than its own, which is no matter of weights
}


def write_model(
    folder: Path, shape: dict[str, int], tokenizer: Tokenizer, special: dict[str, int], seed: int
) -> None:
    """`special`: config.json's `bos_token_id` and `eos_token_id`, where there are such. Deterministic
    in `seed`. The folder appears whole or not at all.
    """
    raw: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": str(DTYPE).removeprefix("torch."),
        **shape,
        **special,
    }
    shards = _shards(ModelConfig.from_hf(raw, {}))
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as scratch:
        unfinished = Path(scratch) / folder.name
        unfinished.mkdir()
        where: dict[str, str] = {}
        for number, shapes in enumerate(track(shards, "writing shards"), start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {name: _random(size, generator) for name, size in shapes.items()}
            save_file(tensors, unfinished / file, metadata={"format": "pt"})
            where |= dict.fromkeys(shapes, file)
        (unfinished / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}, indent=1))
        (unfinished / "config.json").write_text(json.dumps(raw, indent=2))
        write_tokenizer(unfinished, tokenizer, None, special)
        unfinished.rename(folder)


def _shards(config: ModelConfig) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each file, name -> shape."""
    vocab = (config.vocab_size, config.hidden_size)
    layers = [
        {
            HF_NAMES.layer[field].format(i=i): shape
            for field, shape in layer_shapes(config, i).items()
        }
        for i in range(config.num_layers)
    ]
    last = {HF_NAMES.norm: (config.hidden_size,), HF_NAMES.lm_head: vocab}
    return [{HF_NAMES.embedding: vocab}, *layers, last]


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms are ones; a product of a matrix has about its input's size."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=DTYPE)
    return torch.empty(shape, dtype=DTYPE).normal_(0, shape[1] ** -0.5, generator=generator)


def cut_tokenizer(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """A BPE tokenizer without the ids from `size` on and the merges that make them."""
    whole = json.loads(tokenizer.to_str())
    model = whole["model"]
    kept = {token: i for token, i in model["vocab"].items() if i < size}
    model["vocab"] = kept
    model["merges"] = [(a, b) for a, b in model["merges"] if {a, b, a + b} <= kept.keys()]
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["id"] < size]
    return Tokenizer.from_str(json.dumps(whole))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tokenizer", help="the model that lends it: what --model of the commands takes"
    )
    parser.add_argument("folder", type=Path, help="is made; its name must say random")
    parser.add_argument("--seed", type=int, default=0)
    for name, value in TINY_LLAMA.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if "random" not in folder.name:
        parser.error(
            f"{folder.name} does not say random: every report would look like a real model's"
        )
    if folder.exists():
        parser.error(f"{folder} exists; nothing is overwritten")
    shape = {name: getattr(arguments, name) for name in TINY_LLAMA}
    lender = load_model(arguments.tokenizer, layers_at_use=True)
    ids = {
        "bos_token_id": lender.config.bos_token_id,
        "eos_token_id": next(iter(lender.config.eos_token_ids), None),
    }
    special = {k: i for k, i in ids.items() if i is not None and i < shape["vocab_size"]}
    tokenizer = cut_tokenizer(lender.tokenizer, shape["vocab_size"])
    write_model(folder, shape, tokenizer, special, arguments.seed)


if __name__ == "__main__":
    main()
