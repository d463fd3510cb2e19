"""Which JSON schemas can be kept exactly.

The grammar compiler (xgrammar 0.2) passes over keywords that it does not know, and over those beside
a `$ref`, an `enum` or an `anyOf`. Text would then break the schema without anyone hearing of it, so
every keyword that would not be kept is refused here.
"""

from __future__ import annotations

import re
from typing import Any

MAX_DEPTH = 64
# Of a count and of a repetition in a pattern; the compiler's own integers wrap around at 2^32.
MAX_REPEAT = 1_000_000

_ANNOTATIONS = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "discriminator",
        "$schema",
        "$id",
        "$comment",
        "$defs",
        "definitions",
    ]
)
# A schema with one of these is nothing else.
_WHOLE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
_NUMBER = frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])
_OF_TYPE = {
    "object": frozenset(
        [
            "properties",
            "required",
            "additionalProperties",
            "unevaluatedProperties",
            "patternProperties",
            "minProperties",
            "maxProperties",
        ]
    ),
    "array": frozenset(["items", "prefixItems", "unevaluatedItems", "minItems", "maxItems"]),
    "string": frozenset(["pattern", "format", "minLength", "maxLength"]),
    "integer": _NUMBER | {"multipleOf"},
    "number": _NUMBER,
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_FORMATS = frozenset(
    [
        "email",
        "date",
        "time",
        "date-time",
        "duration",
        "ipv4",
        "ipv6",
        "hostname",
        "uuid",
        "uri",
        "uri-reference",
        "uri-template",
        "json-pointer",
        "relative-json-pointer",
    ]
)
# Where schemas stand inside a schema.
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = [
    "items",
    "additionalProperties",
    "unevaluatedProperties",
    "unevaluatedItems",
]

_SHAPES: dict[str, tuple[type, str]] = {
    **dict.fromkeys(_MAPS, (dict, "an object")),
    **dict.fromkeys((*_LISTS, "enum", "required"), (list, "an array")),
    **dict.fromkeys(("pattern", "format", "$ref"), (str, "a string")),
}


def check(schema: object, path: str = "$", depth: int = 0) -> None:
    """Raises ValueError, naming the place, on what the grammar of `schema` would not keep."""
    if depth > MAX_DEPTH:
        raise ValueError(f"the schema is nested more than {MAX_DEPTH} deep")
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ValueError(f"{path} must be an object or a boolean, not {type(schema).__name__}")
    for keyword, (shape, name) in _SHAPES.items():
        if keyword in schema and not isinstance(schema[keyword], shape):
            raise ValueError(f"{path}.{keyword} must be {name}")
    kept = _ANNOTATIONS | _kept_keywords(schema, path)
    for keyword in schema:
        if keyword not in kept:
            raise ValueError(f"{path}: keyword {keyword!r} is not supported here")
    if schema.get("format", "date") not in _FORMATS:
        raise ValueError(f"{path}: format {schema['format']!r} is not supported")
    for keyword in _COUNTS:
        value = schema.get(keyword, 0)
        if type(value) is not int or not 0 <= value <= MAX_REPEAT:
            raise ValueError(
                f"{path}: {keyword} is {value}; it must be an integer in [0, {MAX_REPEAT}]"
            )
    _check_properties(schema, path)
    _check_string(schema, path)
    for inner, place in _subschemas(schema, path):
        check(inner, place, depth + 1)


def _check_properties(schema: dict[str, Any], path: str) -> None:
    properties, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name in schema.get("required", []):
        if not isinstance(name, str) or name not in properties:
            raise ValueError(f"{path}: {name!r} is required, but not among the properties")
    if patterns and (properties or len(patterns) > 1):
        raise ValueError(f"{path}: patternProperties is supported alone, with one pattern")
    for pattern in patterns:
        _check_pattern(pattern, path)


def _check_string(schema: dict[str, Any], path: str) -> None:
    if "pattern" in schema:
        _check_pattern(schema["pattern"], path)
    if {"minLength", "maxLength"} & schema.keys() and {"pattern", "format"} & schema.keys():
        raise ValueError(f"{path}: a length beside a pattern or a format is not supported")


# A negated class, an escape, a character.
_PATTERN_PART = re.compile(
    r"\[\^(?:\\.|[^\\\]])*\]|\\(?:u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)|.", re.DOTALL
)
_NEEDS_ESCAPE = re.compile(
    r'["\x00-\x1f]|\\(?:[\\nrtfv0c"\x00-\x1f]|u$|(?:u00|x)(?:[01].|22|5c))', re.IGNORECASE
)


def _check_pattern(pattern: str, path: str) -> None:
    """What `.`, `\\s`, ranges and negated classes match, the compiler restricts to what may stand
    unescaped in a JSON string; what a pattern spells out, it puts there as it is.
    """
    check_repeats(pattern)
    for part in _PATTERN_PART.findall(pattern):
        if not part.startswith("[^") and _NEEDS_ESCAPE.match(part):
            raise ValueError(
                f"{path}: the pattern names {part!r}; quotes, backslashes and control characters, "
                "which JSON escapes, are not supported in patterns"
            )


def check_repeats(pattern: str) -> None:
    """Raises ValueError on a repetition in a regex or a grammar of more than MAX_REPEAT."""
    unescaped = re.sub(r"\\.", "", pattern, flags=re.DOTALL)
    for count in re.findall(r"\d+", " ".join(re.findall(r"\{[\d,\s]+\}", unescaped))):
        if len(count) > 7 or int(count) > MAX_REPEAT:
            raise ValueError(
                f"a repetition of {count[:20]} is too large, the limit is {MAX_REPEAT}"
            )


def _kept_keywords(schema: dict[str, Any], path: str) -> frozenset[str]:
    wholes = [keyword for keyword in _WHOLE if keyword in schema]
    if len(wholes) > 1:
        raise ValueError(f"{path}: {wholes[0]} and {wholes[1]} in one schema are not supported")
    types = _types(schema, path)
    if not wholes:
        return frozenset({"type"}).union(*(_OF_TYPE[name] for name in types))
    if wholes[0] == "allOf" and len(schema["allOf"]) != 1:
        raise ValueError(f"{path}: allOf of several schemas is not supported; write them as one")
    if wholes[0] not in ("const", "enum"):
        return frozenset(wholes)
    values = schema["enum"] if wholes[0] == "enum" else [schema["const"]]
    for value in values:
        if types and not any(_is_of(value, name) for name in types):
            raise ValueError(f"{path}: {value!r} is not of type {' or '.join(types)}")
    return frozenset({*wholes, "type"})


def _types(schema: dict[str, Any], path: str) -> list[str]:
    types = schema.get("type")
    if types is None:
        # As the compiler reads it: these keywords alone make an object or an array.
        if schema.keys() & {"properties", "additionalProperties", "unevaluatedProperties"}:
            return ["object"]
        return ["array"] if schema.keys() & {"items", "prefixItems", "unevaluatedItems"} else []
    names = types if isinstance(types, list) else [types]
    for name in names:
        if not isinstance(name, str) or name not in _OF_TYPE:
            raise ValueError(f"{path}: type {name!r} is none of {', '.join(_OF_TYPE)}")
    return names


def _is_of(value: object, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    python: dict[str, type | tuple[type, ...]] = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    return isinstance(value, python[name])


def _subschemas(schema: dict[str, Any], path: str) -> list[tuple[object, str]]:
    found = [(schema[k], f"{path}.{k}") for k in _SINGLE if k in schema]
    for keyword in _MAPS:
        inner = schema.get(keyword, {})
        found += [(value, f"{path}.{keyword}.{name}") for name, value in inner.items()]
    for keyword in _LISTS:
        inner = schema.get(keyword, [])
        found += [(value, f"{path}.{keyword}[{i}]") for i, value in enumerate(inner)]
    return found
