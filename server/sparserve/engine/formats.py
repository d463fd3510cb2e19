"""From settings, or from what a compressed model is in, to the formats of its matrices."""

from __future__ import annotations

from sparse_kernels.formats import BFLOAT16, DecoderFormats, MatrixFormat
from sparserve.config import EngineSettings
from sparserve.errors import ConfigError
from sparserve.model.loader import LoadedModel

BITS = {"int8": 8, "int4": 4}
# weight_planes -> (bits of a code, bits of its lower plane)
PLANES = {"4+4": (8, 4), "2+2": (4, 2), "3+1": (4, 1)}
# Settings that make another model of it when it is loaded, in any format.
OF_PRUNING = ("prune", "prune_heads", "prune_mlp")
EXACT = ("float32", "float16")  # of originals to compare with
PARTS = ("attention_dtype", "mlp_dtype", "lm_head_dtype")
# Settings that say how integers are stored and used.
DETAILS = ("group_size", "weight_planes", "down_planes", "activation_bits")


def served_formats(model: LoadedModel, settings: EngineSettings) -> DecoderFormats:
    """Of `model` on a native backend: what it was compressed to, else what `settings` want. Raises ConfigError."""
    if (rounded := model.rounded) is None:
        return weight_formats(settings)
    for name in ("dtype", *PARTS, *DETAILS):
        value = getattr(settings, name)
        if value != type(settings).model_fields[name].default:
            raise ConfigError(
                f"{name} is {value}, and {model.path} was compressed to {rounded.formats}, which is how "
                f"it is served; leave {name} out, or take what it was made of, {rounded.info.source.name}"
            )
    return rounded.formats


def weight_formats(settings: EngineSettings) -> DecoderFormats:
    """What a native backend makes of weights that are not compressed. Raises ConfigError of settings that contradict each
    other."""
    attention, mlp, lm_head = (_bits(settings, part) for part in PARTS)
    _check_planes(settings, mlp)
    if attention == mlp == lm_head == 16:
        _refuse_details(settings)
    _, low_bits = PLANES.get(settings.weight_planes, (0, 0))

    def format_of(bits: int, low_bits: int = 0, group_size: int = 64) -> MatrixFormat:
        if settings.group_size != "auto":
            group_size = settings.group_size
        return BFLOAT16 if bits == 16 else MatrixFormat(bits, group_size, low_bits)

    return DecoderFormats(
        attention=format_of(attention, group_size=32),
        gate_up=format_of(mlp, low_bits),
        down=format_of(mlp, low_bits if settings.down_planes == "same" else 0),
        lm_head=format_of(lm_head),
        activation_bits=settings.activation_bits,
        lm_head_scan=settings.lm_head_dtype == "int4+exact",
    )


def native_only(settings: EngineSettings) -> str | None:
    """A setting of data types that only the native backends can follow, in words."""
    if settings.dtype in BITS:
        return f"dtype is {settings.dtype}"
    given = (f"{part} is {getattr(settings, part)}" for part in PARTS if _own(settings, part))
    return next(given, None)


def with_dtype(settings: EngineSettings, dtype: str) -> EngineSettings:
    """The same settings for weights of `dtype`, without those that only integers have where there would
    be none; with "auto" as `compress` says, with others of what it would compress, pruned all the same. What no
    native backend computes, an original to compare with, is not pruned and asks for no device."""
    update: dict[str, object] = {"dtype": dtype}
    fields = type(settings).model_fields
    if dtype != "auto":
        prunes = dtype not in EXACT and any(getattr(settings, name) for name in OF_PRUNING)
        reset = ("compress",) if prunes else ("compress", "compress_text", *OF_PRUNING)
        update |= {name: fields[name].default for name in reset}
    if dtype in EXACT:
        update |= {part: fields[part].default for part in PARTS}
        if dtype != settings.dtype:
            update["device"] = fields["device"].default
    changed = settings.model_copy(update=update)
    if all(_bits(changed, part) == 16 for part in PARTS):
        update |= {name: fields[name].default for name in DETAILS}
    return settings.model_copy(update=update)


def in_bfloat16(settings: EngineSettings) -> EngineSettings:
    """The same settings with nothing rounded."""
    fields, rounding = type(settings).model_fields, ("dtype", *PARTS, *DETAILS)
    return settings.model_copy(
        update={**{name: fields[name].default for name in rounding}, "dtype": "bfloat16"}
    )


def _own(settings: EngineSettings, part: str) -> bool:
    return bool(getattr(settings, part) != "same")


def _bits(settings: EngineSettings, part: str) -> int:
    """Of an element; 16 for whatever is not quantized."""
    dtype = getattr(settings, part) if _own(settings, part) else settings.dtype
    if part == "lm_head_dtype" and not _own(settings, part) and dtype == "int4":
        dtype = "int8"  # the head is the most sensitive to rounding, and every token reads it once
    return BITS.get(dtype, 16)


def _check_planes(settings: EngineSettings, bits: int) -> None:
    if settings.weight_planes == "whole":
        if settings.down_planes == "same":
            raise ConfigError(
                "down_planes is same, and weight_planes whole: there are no planes; take --weight-planes 4+4 "
                "with int8, 3+1 or 2+2 with int4"
            )
        return
    needed, _ = PLANES[settings.weight_planes]
    if bits != needed:
        found = "bfloat16" if bits == 16 else f"int{bits}"
        raise ConfigError(
            f"weight_planes is {settings.weight_planes}, which int{needed} can have, and the feed-forward "
            f"matrices are {found}; take --weight-planes whole or --mlp-dtype int{needed}"
        )


def _refuse_details(settings: EngineSettings) -> None:
    for name in DETAILS:
        value = getattr(settings, name)
        if value != type(settings).model_fields[name].default:
            raise ConfigError(
                f"{name} is {value}, and no matrix is of integers; take --dtype int8 or int4"
            )
