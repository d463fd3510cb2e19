"""GPU kernels read the weights that a token uses, once: counted by the emulator."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sparse_kernels import native

TOOL = Path(__file__).parents[2] / "tools" / "cuda_traffic.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    try:
        native.load("emulator")
    except native.NativeLibraryError as error:
        pytest.skip(str(error))
    spec = importlib.util.spec_from_file_location("cuda_traffic", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_traffic"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4", "planes 4+4"])
def test_no_more_is_asked_for_than_must_be(tool: ModuleType, name: str) -> None:
    rows = tool.measure(name, tool.FORMATS[name])
    assert {row.kernel for row in rows} >= {"activate", "down"}
    for row in rows:
        assert 1 <= row.asked_over_least <= 1.05, row
        assert 1 <= row.sectors_over_least <= 1.05, row
