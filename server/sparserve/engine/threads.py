"""Threads of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparse_kernels.native import usable_cpus
from sparserve.config import EngineSettings


@contextmanager
def torch_threads(settings: EngineSettings) -> Iterator[None]:
    """As many as settings say for torch, which leaves them to the backend otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(settings.threads or usable_cpus(), usable_cpus()))
    try:
        yield
    finally:
        torch.set_num_threads(before)
