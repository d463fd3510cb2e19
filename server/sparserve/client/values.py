"""Single values into fields of a message, or an InvalidRequest that names field, value and what is allowed."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from sparserve.errors import InvalidRequest

M = TypeVar("M", bound=Message)

_WHOLE = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31, "[-2^31, 2^31)"),
    FieldDescriptor.TYPE_UINT64: (0, 2**64, "[0, 2^64)"),
}
_REAL = (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE)
_SEVERAL = {
    FieldDescriptor.TYPE_INT32: "a list of token ids, such as [1, 2]",
    FieldDescriptor.TYPE_STRING: "a list of texts",
}


def filled(message: M, **values: Any) -> M:
    """`message` with the fields that are not None. Raises InvalidRequest."""
    for name, value in values.items():
        if value is not None:
            set_value(message, name, value, name)
    return message


def set_value(message: Message, name: str, value: Any, path: str, told: str = "") -> None:
    """Set a scalar, list or map field; `path` is the field's in the whole request, `told` what its
    caller knows it as.

    numpy's numbers are numbers too; a text is never taken for the list of its letters. Raises
    InvalidRequest.
    """
    told = told or path
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.message_type is not None:  # a map: logit_bias is the only one
        if not isinstance(value, Mapping):
            raise wrong(path, told, value, "a mapping of token ids to numbers, such as {5: -100}")
        key, item = field.message_type.fields
        biases = getattr(message, name)
        for k, v in value.items():
            biases[checked(key, k, path, f"a key of {told}")] = checked(
                item, v, f"{path}[{k}]", f"{told}[{k}]"
            )
    elif field.is_repeated:
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
            raise wrong(path, told, value, _SEVERAL[field.type])
        extend(getattr(message, name), field, value, path, told)
    else:
        setattr(message, name, checked(field, value, path, told))


def extend(into: Any, field: Any, values: Iterable[Any], path: str, told: str) -> None:
    """Append each of `values` to a repeated field."""
    for i, value in enumerate(values):
        try:
            into.append(checked(field, value, path, told))
        except InvalidRequest:  # a prompt can have a million ids: only the one at fault is named
            checked(field, value, f"{path}[{i}]", f"{told}[{i}]")


def checked(field: Any, value: Any, path: str, told: str) -> Any:
    """`value` as the Python type that `field`, a descriptor, carries. Raises InvalidRequest."""
    if field.type == FieldDescriptor.TYPE_STRING:
        return text(value, path, told)
    if field.type == FieldDescriptor.TYPE_BOOL:
        if not isinstance(value, bool):
            raise wrong(path, told, value, "True or False")
        return value
    if field.enum_type is not None:
        return _enum_number(field.enum_type, value, path, told)
    if field.type in _REAL:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise wrong(path, told, value, "a number")
        try:
            return float(value)
        except OverflowError:  # a whole number beyond every float
            raise wrong(path, told, value, "a number that a float can hold") from None
    low, high, allowed = _WHOLE[field.type]
    try:
        number = operator.index(value)
    except TypeError:
        raise wrong(path, told, value, "a whole number") from None
    if isinstance(value, bool):
        raise wrong(path, told, value, "a whole number")
    if not low <= number < high:
        raise wrong(path, told, value, f"in {allowed}")
    return number


def text(value: Any, path: str, told: str) -> str:
    """Raises InvalidRequest on what is no text, or has no UTF-8."""
    if not isinstance(value, str):
        raise wrong(path, told, value, "a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            path,
            f"{told} has half of a surrogate pair at position {error.start}; it must be Unicode text",
        ) from None
    return value


def _enum_number(kind: Any, value: Any, path: str, told: str) -> int:
    """Of a value's name in lower case, without what the names of all values begin with."""
    prefix = kind.values_by_number[0].name.removesuffix("UNSPECIFIED")
    names: dict[str, int] = {
        v.name.removeprefix(prefix).lower(): v.number for v in kind.values if v.number
    }
    if not isinstance(value, str) or value.lower() not in names:
        raise wrong(path, told, value, f"one of {', '.join(names)}")
    return names[value.lower()]


def wrong(path: str, told: str, value: Any, allowed: str) -> InvalidRequest:
    return InvalidRequest(path, f"{told} is {reprlib.repr(value)}; it must be {allowed}")
