"""The weights of a report that are ours: the model in some formats, and as recipes compressed it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparserve.bench.formats import sweep_engine
from sparserve.bench.policies import PolicySpec
from sparserve.bench.report_models import CompressedModel, healed_through
from sparserve.bench.sweep import Plan
from sparserve.bench.systems import DENSE_POLICY
from sparserve.bench.text import TEXTS, refuse_calibration_text
from sparserve.config import EngineSettings
from sparserve.engine.backends import choose_backend
from sparserve.engine.factory import format_name
from sparserve.engine.formats import DETAILS, PARTS, served_formats, with_dtype
from sparserve.errors import ConfigError, SparsityUnavailable, UnusableIndex
from sparserve.model.compressed_tensors import bits_per_weight, layer_weights
from sparserve.model.config import ModelConfig
from sparserve.model.identity import index_key
from sparserve.model.loader import LoadedModel
from sparserve.sparsity.index import IndexKey, read_index

log = logging.getLogger(__name__)

# Settings -> the model that they name, in their dtype, for the backend that they choose.
Load = Callable[[EngineSettings], LoadedModel]


@dataclass(frozen=True, slots=True)
class Weights:
    name: str  # of the format as it was asked for, or of the recipe
    recipe: str | None
    settings: EngineSettings  # that serve them, with the index that fits
    key: IndexKey
    policies: Sequence[PolicySpec]  # that can be followed
    # Of a weight of the original: of the layers' matrices, of all tensors.
    bits: tuple[float, float]
    pruned: float  # share of the original's parameters that they lack
    healed: str | None  # what they were healed through

    def label(self, spec: PolicySpec) -> str:
        return label_of(self.name, spec)


def label_of(name: str, spec: PolicySpec) -> str:
    return name if str(spec) == DENSE_POLICY else f"{name} {spec}"


def settings_of(
    settings: EngineSettings, formats: Sequence[str], compressed: Sequence[CompressedModel]
) -> dict[str, EngineSettings]:
    """By name. Flags of data types are for `formats`: a compressed model has its own."""
    own = {format: with_dtype(settings, format) for format in formats}
    fields = type(settings).model_fields
    defaults = {name: fields[name].default for name in ("dtype", *PARTS, *DETAILS)}
    for model in compressed:
        own[model.name] = settings.model_copy(update={**defaults, "model": str(model.folder)})
    return own


def prepare(
    settings: EngineSettings,
    formats: Sequence[str],
    compressed: Sequence[CompressedModel],
    policies: Sequence[PolicySpec],
    indexes: Sequence[Path],
    text: Path,
    speed: Plan,
    original: ModelConfig,
    load: Load,
) -> list[Weights]:
    """All weights, each made into an engine once, so that what cannot be measured is told before the rest is.
    `original`: of what sizes and shares are told against.

    Policies that weights cannot follow without another index are left out, and the log says so. Raises
    ConfigError, ModelError, or RequestError of a policy that cannot work anywhere.
    """
    found, unused = [], dict.fromkeys(indexes, "")
    folders = {model.name: model.folder for model in compressed}
    for name, own in settings_of(settings, formats, compressed).items():
        model = load(own)
        key = index_key(model, format_name(model, own))
        path = _fitting(indexes, key, text, unused)
        own = own.model_copy(update={"index": "" if path is None else str(path)})
        found.append(
            Weights(
                name,
                name if name in folders else None,
                own,
                key,
                _followed(name, model, own, policies, speed),
                _bits(model, own, original),
                _pruned(model, original),
                healed_through(folders[name]) if name in folders else None,
            )
        )
    if unused:
        path, reason = next(iter(unused.items()))
        raise ConfigError(f"{path} of --index fits none of what is measured: {reason}")
    return found


def _fitting(
    indexes: Sequence[Path], key: IndexKey, text: Path, unused: dict[Path, str]
) -> Path | None:
    """The first that was made for `key`, which is then out of `unused`; of others the reason is put there.

    Raises ConfigError of one that was calibrated on `text`.
    """
    for path in indexes:
        try:
            index = read_index(path, key)
        except UnusableIndex as error:
            if path in unused:
                unused[path] = str(error)
            continue
        refuse_calibration_text(text, "index", index.source.get(TEXTS))
        unused.pop(path, None)
        return path
    return None


def _followed(
    name: str,
    model: LoadedModel,
    settings: EngineSettings,
    policies: Sequence[PolicySpec],
    speed: Plan,
) -> list[PolicySpec]:
    engine = sweep_engine(model, settings, speed)
    followed = []
    for spec in policies:
        try:
            engine.policies.plan(spec.policy)
        except SparsityUnavailable as error:
            log.warning("%s is left out: %s", label_of(name, spec), error)
        else:
            followed.append(spec)
    return followed


def _pruned(model: LoadedModel, original: ModelConfig) -> float:
    """Raises CorruptCheckpoint of sizes that `original` cannot have been cut to."""
    # Not the model's own count: it may have biases that the original lacks.
    left = original.pruned(tuple(model.config.layers)).num_parameters
    return round(1 - left / original.num_parameters, 6)


def _bits(
    model: LoadedModel, settings: EngineSettings, original: ModelConfig
) -> tuple[float, float]:
    decoder, whole = _bits_stored(model, settings)
    layers = layer_weights(model.config) / layer_weights(original)
    return decoder * layers, whole * model.config.num_parameters / original.num_parameters


def _bits_stored(model: LoadedModel, settings: EngineSettings) -> tuple[float, float]:
    """Of a weight that is there."""
    if model.compressed is not None:
        info = model.compressed.info
        return info.bits_per_decoder_weight, info.bits_per_weight
    dtype = model.weights.dtype
    if choose_backend(settings, str(dtype).removeprefix("torch.")).is_native:
        return bits_per_weight(model.config, served_formats(model, settings))
    return 8.0 * dtype.itemsize, 8.0 * dtype.itemsize
