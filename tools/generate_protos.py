"""Generate the Python messages and stubs of proto/ into server/, each beside its own path.

Usage: python tools/generate_protos.py [--check]

With --check nothing is written; exits 1 when the committed files differ from what the protos give.
"""

import filecmp
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = sorted((ROOT / "proto").rglob("*.proto"))
TARGET = ROOT / "server"


def generate(out: Path) -> None:
    well_known = resources.files("grpc_tools") / "_proto"
    code = protoc.main(
        [
            "protoc",
            f"-I{ROOT / 'proto'}",
            f"-I{well_known}",
            f"--python_out={out}",
            f"--mypy_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_grpc_out={out}",
            *map(str, PROTOS),
        ]
    )
    if code:
        sys.exit(code)
    for proto in PROTOS:
        package = out / proto.parent.relative_to(ROOT / "proto")
        doc = '"""Generated from proto/ by tools/generate_protos.py; do not edit."""\n'
        (package / "__init__.py").write_text(doc)


def main() -> None:
    if "--check" not in sys.argv[1:]:
        generate(TARGET)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        made = [p.relative_to(folder) for p in Path(folder).rglob("*.py*") if p.is_file()]
        stale = [
            p
            for p in made
            if not (TARGET / p).exists()
            or not filecmp.cmp(TARGET / p, Path(folder) / p, shallow=False)
        ]
    if stale:
        sys.exit(f"stale: {', '.join(map(str, stale))}; run python tools/generate_protos.py")


if __name__ == "__main__":
    main()
