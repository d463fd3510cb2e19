"""The adapters by name. Each is a module with `add`, which is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Protocol, cast

import grpc

from sparserve.config import ServerSettings
from sparserve.engine.async_engine import AsyncEngine

_MODULES = {
    "kserve": "kserve",
    "vllm": "vllm_engine",
    "vllm-inference": "vllm_inference",
}


class AddAdapter(Protocol):
    """Adds the services of a protocol to `server`, and returns their full names. `is_ready` is false before others
    are told to go elsewhere, while requests are still taken.

    Raises ConfigError where a package that it needs is not installed.
    """

    def __call__(
        self,
        server: grpc.aio.Server,
        engine: AsyncEngine,
        model_name: str,
        settings: ServerSettings,
        is_ready: Callable[[], bool],
    ) -> Sequence[str]: ...


def adapter(name: str) -> AddAdapter:
    """`name` is one of `config.adapters.AdapterName`."""
    module = import_module(f"sparserve.api.adapters.{_MODULES[name]}")
    return cast(AddAdapter, module.add)
