"""Write the two mirrors of sparse_kernels/include/sparse_kernels.h.

`sparse_kernels/_abi.py` holds the header's constants, enums, structs and function signatures for
ctypes; `sparse_kernels/common/struct_layout.inc` lists the fields, so that the compiled library can be
asked where it put them. Run it after each change of the header (needs pycparser, in the dev extra):

    python tools/generate_abi.py           # write both
    python tools/generate_abi.py --check   # exit 1 if one of them is stale

A declaration that has no exact ctypes counterpart here is an error, never left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from pycparser import c_ast, c_parser

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "sparse_kernels" / "include" / "sparse_kernels.h"
MIRROR = ROOT / "sparse_kernels" / "_abi.py"
LAYOUT = ROOT / "sparse_kernels" / "common" / "struct_layout.inc"

NUMBERS = {
    **{f"{sign}int{bits}_t": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "float": "float",
    "double": "double",
}
STDINT = "".join(f"typedef int {name};\n" for name in NUMBERS if name.endswith("_t"))
# Lines of the preprocessor that mean nothing to ctypes.
IGNORED_DIRECTIVES = re.compile(
    r"#(ifndef SPARSE_KERNELS_H_|define SPARSE_KERNELS_H_|include <std(int|def)\.h>|endif)$"
    r"|#define SK_API __attribute__\(\(visibility\(\"default\"\)\)\)$"
)
INTEGER_DEFINE = re.compile(r"#define (SK_[A-Z0-9_]+) (\d+)$")

# Functions that only the library of the CPU, or of the GPU, has.
OF_ONE_LIBRARY = ("sk_cpu_", "sk_read_probe", "sk_device_")


class HeaderError(Exception):
    """The header holds something that this generator does not translate."""


def split_header(text: str) -> tuple[dict[str, int], str]:
    """Return the integer #defines and the C declarations of a header."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    text = re.sub(r"#ifdef __cplusplus\n.*?#endif", "", text, flags=re.DOTALL)
    constants: dict[str, int] = {}
    declarations: list[str] = []
    for line in map(str.rstrip, text.splitlines()):
        if define := INTEGER_DEFINE.match(line):
            constants[define[1]] = int(define[2])
        elif not line.startswith("#"):
            declarations.append(re.sub(r"^SK_API ", "", line))
        elif not IGNORED_DIRECTIVES.match(line):
            raise HeaderError(f"not understood: {line}")
    return constants, "\n".join(declarations)


def integer(node: c_ast.Node, known: dict[str, int]) -> int:
    if isinstance(node, c_ast.Constant) and node.type == "int":
        return int(node.value, 0)
    if isinstance(node, c_ast.UnaryOp) and node.op == "-":
        return -integer(node.expr, known)
    if isinstance(node, c_ast.ID) and node.name in known:
        return known[node.name]
    raise HeaderError(f"{node.coord}: not an integer that can be translated")


def ctype(node: c_ast.Node, known: dict[str, int]) -> str:
    """Return the ctypes expression for the type of a field or parameter."""
    if isinstance(node, c_ast.ArrayDecl):
        return f"{ctype(node.type, known)} * {integer(node.dim, known)}"
    if isinstance(node, c_ast.PtrDecl):
        return pointer(node.type, known)
    base = node.type
    if isinstance(base, c_ast.Struct):
        return str(base.name)
    name = " ".join(base.names) if isinstance(base, c_ast.IdentifierType) else "?"
    if name not in NUMBERS:
        raise HeaderError(f"{node.coord}: type '{name}' has no counterpart of fixed width")
    return f"ctypes.c_{NUMBERS[name]}"


def pointer(target: c_ast.Node, known: dict[str, int]) -> str:
    if isinstance(target, c_ast.FuncDecl):
        return f"ctypes.CFUNCTYPE({', '.join([result(target, known), *parameters(target, known)])})"
    if isinstance(target, c_ast.TypeDecl) and isinstance(target.type, c_ast.IdentifierType):
        if target.type.names == ["void"]:
            return "ctypes.c_void_p"
        if target.type.names == ["char"]:
            return "ctypes.c_char_p"
    return f"ctypes.POINTER({ctype(target, known)})"


def result(function: c_ast.FuncDecl, known: dict[str, int]) -> str:
    is_void = isinstance(function.type, c_ast.TypeDecl) and function.type.type.names == ["void"]
    return "None" if is_void else ctype(function.type, known)


def parameters(function: c_ast.FuncDecl, known: dict[str, int]) -> list[str]:
    nodes = [parameter.type for parameter in function.args.params]
    if len(nodes) == 1 and isinstance(nodes[0], c_ast.TypeDecl):
        base = nodes[0].type
        if isinstance(base, c_ast.IdentifierType) and base.names == ["void"]:
            return []
    return [ctype(node, known) for node in nodes]


def annotation(ctypes_name: str) -> str:
    """Return what Python sees when it reads a field of this type."""
    if " * " in ctypes_name:
        return f"ctypes.Array[{ctypes_name.rsplit(' * ', 1)[0]}]"
    if ctypes_name in ("ctypes.c_float", "ctypes.c_double"):
        return "float"
    if ctypes_name == "ctypes.c_void_p":
        return "int | None"
    if ctypes_name == "ctypes.c_char_p":
        return "bytes | None"
    if ctypes_name.startswith("ctypes.POINTER("):
        return f'"ctypes._Pointer[{ctypes_name[len("ctypes.POINTER(") : -1]}]"'
    if ctypes_name.startswith("ctypes.CFUNCTYPE("):
        return "Any"
    return "int" if ctypes_name.startswith("ctypes.c_") else ctypes_name


def enum_lines(node: c_ast.Enum, known: dict[str, int]) -> list[str]:
    lines = ["", "", f"class {node.name}(enum.IntEnum):"]
    for member in node.values.enumerators:
        if member.value is None:
            raise HeaderError(f"{node.name}.{member.name} has no explicit value")
        known[member.name] = integer(member.value, known)
        lines.append(f"    {member.name} = {known[member.name]}")
    return lines


def struct_lines(node: c_ast.Struct, known: dict[str, int]) -> tuple[list[str], list[str]]:
    """Return the Python class and the layout table's lines of one struct."""
    fields: list[tuple[str, str]] = []
    for field in node.decls:
        if field.bitsize is not None or field.name is None:
            raise HeaderError(f"{node.name}: bit fields and nameless fields are not translated")
        fields.append((field.name, ctype(field.type, known)))
    head = [("abi_version", "ctypes.c_uint32"), ("struct_size", "ctypes.c_uint32")]
    if fields[:2] != head:
        raise HeaderError(f"{node.name} must begin with uint32_t abi_version, struct_size")
    lines = ["", "", f"class {node.name}(ctypes.Structure):"]
    lines += [f"    {name}: {annotation(kind)}" for name, kind in fields]
    lines += ["", "    _fields_ = ("]
    lines += [f'        ("{name}", {kind}),' for name, kind in fields]
    lines += ["    )"]
    layout = [f"STRUCT({node.name})", *(f"FIELD({node.name}, {name})" for name, _ in fields)]
    return lines, layout


def function_lines(name: str, node: c_ast.FuncDecl, known: dict[str, int]) -> list[str]:
    arguments = parameters(node, known)
    lines = [f"    library.{name}.restype = {result(node, known)}"]
    if not arguments:
        return [*lines, f"    library.{name}.argtypes = []"]
    lines.append(f"    library.{name}.argtypes = [")
    lines += [f"        {argument}," for argument in arguments]
    return [*lines, "    ]"]


def translate(text: str) -> tuple[str, str]:
    """Return the Python mirror and the layout table of a header's text."""
    constants, declarations = split_header(text)
    known = dict(constants)
    types: list[str] = []
    layout: list[str] = []
    functions: list[str] = []
    for node in c_parser.CParser().parse(STDINT + declarations, HEADER.name).ext:
        kind = getattr(node, "type", None)
        if isinstance(node, c_ast.Typedef) and node.name in NUMBERS:
            continue
        if isinstance(kind, c_ast.Enum) and kind.name and kind.values:
            types += enum_lines(kind, known)
        elif isinstance(kind, c_ast.Struct) and kind.name and kind.decls:
            lines, table = struct_lines(kind, known)
            types += lines
            layout += table
        elif isinstance(kind, c_ast.FuncDecl):
            lines = function_lines(node.name, kind, known)
            if node.name.startswith(OF_ONE_LIBRARY):
                lines = [
                    f'    if hasattr(library, "{node.name}"):',
                    *(f"    {line}" for line in lines),
                ]
            functions += lines
        else:
            raise HeaderError(f"{node.coord}: only enums, structs and functions are translated")
    origin = "Generated by tools/generate_abi.py from include/sparse_kernels.h; do not edit."
    imports = ["import ctypes", "import enum"]
    if any(line.endswith(": Any") for line in types):
        imports.append("from typing import Any")
    python = [f'"""{origin}"""', "", "# The names are those of the C header."]
    python += ["", *imports, ""]
    python += [f"{name} = {value}" for name, value in constants.items()]
    python += [*types, "", "", "def declare_functions(library: ctypes.CDLL) -> None:"]
    python += ['    """Give the functions of a loaded library their argument and result types."""']
    python += functions
    return "\n".join(python) + "\n", "\n".join([f"// {origin}", *layout]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    check = parser.parse_args().check
    try:
        python, layout = translate(HEADER.read_text())
    except (HeaderError, c_parser.ParseError) as error:
        print(f"{HEADER}: {error}", file=sys.stderr)
        return 1
    stale = False
    for path, text in ((MIRROR, python), (LAYOUT, layout)):
        if path.exists() and path.read_text() == text:
            continue
        stale = True
        if check:
            print(f"{path} is stale: run python tools/generate_abi.py", file=sys.stderr)
        else:
            path.write_text(text)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
