"""Packages of the extra `bench`."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from sparserve.errors import ConfigError

# Import name -> distribution, where they differ.
_DISTRIBUTIONS = {"llama_cpp": "llama-cpp-python", "openvino_genai": "openvino-genai"}


def require(module: str) -> Any:
    """Import what not every installation has. Raises ConfigError with the way to it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"this needs the package {_DISTRIBUTIONS.get(package, package)}: "
            f"pip install 'sparserve[bench]' ({error})"
        ) from error


@functools.cache
def llama_cpp() -> Any:
    """llama-cpp-python's low-level API, initialized, without its hundreds of log lines.

    Raises ConfigError as `require`.
    """
    api = require("llama_cpp")
    api.llama_log_set(_drop_log_line(api), None)
    api.llama_backend_init()
    return api


@functools.cache  # the library keeps a pointer to it
def _drop_log_line(api: Any) -> Any:
    return api.llama_log_callback(lambda level, text, data: None)
