"""A model's tokenizer as the files of a Hugging Face folder, zipped."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import zipfile
from collections.abc import AsyncIterator

from sparserve.engine.engine import Engine
from sparserve.engine.tokenizer import TextTokenizer
from sparserve.model.config import ModelConfig

PART_BYTES = 64 << 10
_DATE = (1980, 1, 1, 0, 0, 0)  # zip's first: the same tokenizer gives the same bytes


class TokenizerArchive:
    """A model's archive, made when it is first asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._made: tuple[bytes, str] | None = None

    async def parts(self) -> AsyncIterator[tuple[bytes, str]]:
        """Pieces of the zip; the last comes with the SHA-256 of all, the others with ""."""
        if self._made is None:
            self._made = await asyncio.to_thread(self._make)
        data, sha256 = self._made
        for start in range(0, len(data), PART_BYTES):
            is_last = start + PART_BYTES >= len(data)
            yield data[start : start + PART_BYTES], sha256 if is_last else ""

    def _make(self) -> tuple[bytes, str]:
        engine = self._engine
        data = tokenizer_archive(engine.tokenizer, engine.backend.config, engine.limits.max_context)
        return data, hashlib.sha256(data).hexdigest()


def tokenizer_archive(tokenizer: TextTokenizer, config: ModelConfig, max_context: int) -> bytes:
    """tokenizer.json, tokenizer_config.json and config.json, as transformers' AutoTokenizer loads
    them from a folder. Takes up to a second: call it off the event loop.
    """
    special = {name: token for name, token in tokenizer.special_tokens.items() if token}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_context,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if tokenizer.chat_template is not None:
        tokenizer_config["chat_template"] = tokenizer.chat_template
    model_config = {
        "architectures": [config.architecture],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    files = {
        "config.json": json.dumps(model_config, indent=2),
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2, ensure_ascii=False),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name, _DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, content)
    return buffer.getvalue()
