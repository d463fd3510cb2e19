"""What the tests of bench share: a tiny model whose tokenizer llama.cpp has words for."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sparserve.bench.report_tiers import Row

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face is imported


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Evaluations keep files; these go with the test."""
    monkeypatch.setenv("SPARSERVE_CACHE_DIR", str(tmp_path / "cache"))


MERGES = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("1", "2"), ("i", "n")]
MERGED_VOCABULARY = 256 + len(MERGES) + 3


def byte_level_tokenizer() -> Tokenizer:
    """GPT-2's bytes, a few merges and three special tokens."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(merge) for merge in MERGES]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    digits, byte_level = (
        pre_tokenizers.Digits(True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    specials = ("<bos>", "<eos>", "<pad>")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return tokenizer


@pytest.fixture(scope="session")
def write_mergeable(write_tiny_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """`write_mergeable(folder, …)`: as `write_tiny_checkpoint`, with a tokenizer that has merges."""

    def write(folder: Path, **overrides: object) -> Path:
        size = MERGED_VOCABULARY
        own = {"vocab_size": size, "bos_token_id": size - 3, "eos_token_id": size - 2}
        write_tiny_checkpoint(folder, **{**own, **overrides})
        byte_level_tokenizer().save(str(folder / "tokenizer.json"))
        return folder

    return write


@pytest.fixture(scope="session")
def mergeable_folder(
    write_mergeable: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return write_mergeable(tmp_path_factory.mktemp("mergeable"))


@pytest.fixture(scope="session")
def report_row() -> Callable[..., Row]:
    """`report_row(label, kl, *rounds, …)`: a row of a report, with fields that are given."""

    def make(
        label: str, kl: float, *rounds: float, system: str = "sparserve", **given: object
    ) -> Row:
        speed = sorted(rounds)[len(rounds) // 2]
        usual = {
            "recipe": None,
            "policy": "dense",
            "pruned": 0,
            "healed": None,
            "bits_decoder": 4.375,
            "bits_file": 5.25,
        }
        return Row(
            system=system,
            label=label,
            format=label.removeprefix(f"{system} ").split()[0],
            kl=kl,
            kl_low=0.9 * kl,
            kl_high=1.2 * kl,
            top1=0.875,
            perplexity=12.5,
            density=1.0,
            batch=1,
            context=128,
            new_tokens=64,
            tokens_per_second=speed,
            tokens_per_second_low=min(rounds),
            tokens_per_second_high=max(rounds),
            rounds=rounds,
            read_ceiling_gb_s=24.0,
            percent_of_byte_bound=50.0,
            ratio=speed / 50,
            **{**usual, **given},
        )

    return make
