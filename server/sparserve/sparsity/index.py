"""What `sparserve calibrate` measured of one model in one format, and the file that keeps it.

The file is safetensors; its metadata hold one JSON object under METADATA_KEY. It comes from outside:
everything in it is checked before it is used.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sparse_kernels._abi import SK_MAX_CORRECTION_RANK, SK_MAX_CORRECTIONS
from sparse_kernels.choice import ChoiceKind
from sparse_kernels.weights import ChoiceTensors, Correction
from sparserve.errors import ConfigError, UnusableIndex
from sparserve.sparsity.policy import PolicyKind

VERSION = 1
METADATA_KEY = "sparserve_index"
MAX_BYTES = 4 << 30
TINY = 1e-6  # share of a layer's neurons, at least
MAX_SETTINGS, MAX_CLUSTERS = 256, 256


@dataclass(frozen=True, slots=True)
class IndexKey:
    """What an index is tied to."""

    model: str  # for messages; the hash decides
    model_hash: str  # of the checkpoint's files
    tokenizer_hash: str
    format: str  # of the weights, BackendInfo.dtype
    layers: int
    neurons: int
    hidden: int


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """One way to choose, and what it costs and reads, measured on text it was not fitted on."""

    kind: PolicyKind  # CORE or TOKEN
    density: float  # share of the feed-forward layers' bytes that a decoded token reads, correction included
    kl: float  # mean over positions of the KL divergence to the dense model in the same format, nats
    kl_p95: float  # 95 % of the windows have a mean KL below it
    top1: float  # share of positions with the dense model's likeliest token
    choice: ChoiceKind | None = None  # of TOKEN
    shares: torch.Tensor | None = None  # of a core: share of each layer's neurons, float32 [layers]
    thresholds: torch.Tensor | None = None  # of TOKEN: float32 [layers, 3]
    correction: int = 0  # number of one of the index's corrections, from 1; 0: none


@dataclass(frozen=True, slots=True, eq=False)
class NeuronIndex:
    """Statistics, factors and the curve of what choices cost; see `Setting`.

    Scores are mean norm scores of prompts (`statistics.norm_score`), each divided by its prompt's tokens.
    """

    key: IndexKey
    prior: torch.Tensor  # float32 [layers, neurons], over all prompts
    cluster_layer: int  # whose scores tell prompts apart
    centroids: torch.Tensor  # float32 [clusters, neurons], of square roots of scores, of length 1
    clusters: torch.Tensor  # float16 [clusters, layers, neurons]
    settings: Sequence[Setting]
    planes_factors: torch.Tensor | None = None  # float32 [layers, neurons]
    gate_factors: torch.Tensor | None = None  # the same shape
    corrections: Sequence[Sequence[Correction]] = ()
    # What it was made of: hash of the text, arguments; for those who read the file.
    source: Mapping[str, object] = field(default_factory=dict)

    @property
    def choice(self) -> ChoiceTensors:
        """What a backend needs of it."""
        return ChoiceTensors(self.planes_factors, self.gate_factors, self.corrections)

    def correction_bytes(self, number: int) -> int:
        """Of a setting's correction, in all layers; 0 of number 0, which is none."""
        if not number:
            return 0
        return sum(part.nbytes for pair in self.corrections[number - 1] for part in pair)


def write_index(path: Path, index: NeuronIndex) -> None:
    """All of it or nothing; equal indices make equal files. Raises OSError."""
    tensors = {"prior": index.prior, "centroids": index.centroids, "clusters": index.clusters}
    for kind, factors in (("planes", index.planes_factors), ("gate", index.gate_factors)):
        if factors is not None:
            tensors[f"{kind}_factors"] = factors
    for number, setting in enumerate(index.settings):
        for name in ("shares", "thresholds"):
            if (values := getattr(setting, name)) is not None:
                tensors[f"setting.{number}.{name}"] = values
    for number, correction in enumerate(index.corrections, 1):
        for place, name in enumerate(("inputs", "outputs")):
            tensors[f"correction.{number}.{name}"] = torch.stack([p[place] for p in correction])
    header = {
        "version": VERSION,
        **{name: getattr(index.key, name) for name in IndexKey.__slots__},
        "cluster_layer": index.cluster_layer,
        "clusters": len(index.centroids),
        "settings": [_as_json(setting) for setting in index.settings],
        "corrections": len(index.corrections),
        "source": dict(index.source),
    }
    save_whole(path, tensors, {METADATA_KEY: json.dumps(header, sort_keys=True)})


def refuse_foreign(path: Path, metadata_key: str, way_out: str) -> None:
    """Raises ConfigError where there is something at `path` that is no safetensors file with `metadata_key`: it would
    be written over."""
    if not os.path.lexists(path):
        return
    try:
        with safe_open(path, framework="pt") as file:
            if metadata_key in (file.metadata() or {}):
                return
    except (OSError, SafetensorError):
        pass
    raise ConfigError(
        f"{path} would be written over, and is not what an earlier run left; remove it, or {way_out}"
    )


def save_whole(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file that appears whole or not at all. Raises OSError."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        # Cloned, for safetensors refuses tensors that share memory. Its save_file makes files that only
        # their owner may read.
        own = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        unfinished.write_bytes(save(own, metadata))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_index(path: Path, key: IndexKey) -> NeuronIndex:
    """The index at `path` for the model, tokenizer and format of `key`.

    Raises UnusableIndex of a file that is missing, damaged, of another version, or of something else.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UnusableIndex(f"the index {path} has {size} bytes, the limit is {MAX_BYTES}")
        with safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata())
            _check_key(path, header, key)
            return _Reader(path, file, header, key).index()
    except (SafetensorError, OSError) as error:
        raise UnusableIndex(f"the index {path} cannot be read: {error}") from error


def _as_json(setting: Setting) -> dict[str, object]:
    return {
        "kind": setting.kind.value,
        "choice": None if setting.choice is None else setting.choice.value,
        "density": setting.density,
        "kl": setting.kl,
        "kl_p95": setting.kl_p95,
        "top1": setting.top1,
        "core": setting.shares is not None,
        "correction": setting.correction,
    }


def _header(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        raise UnusableIndex(
            f"{path} is no calibrated index: its metadata lack {METADATA_KEY}; make one with "
            "`sparserve calibrate`"
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnusableIndex(
            f"the index {path} is damaged: its header is no JSON: {error}"
        ) from error
    if not isinstance(header, dict):
        raise UnusableIndex(f"the index {path} is damaged: its header is no JSON object")
    if header.get("version") != VERSION:
        raise UnusableIndex(
            f"the index {path} has version {reprlib.repr(header.get('version'))}, this server reads "
            f"{VERSION}; run `sparserve calibrate` again"
        )
    return header


def _check_key(path: Path, header: Mapping[str, Any], key: IndexKey) -> None:
    made_for = reprlib.repr(header.get("model"))
    again = "; run `sparserve calibrate` for what is served"
    if header.get("model_hash") != key.model_hash:
        raise UnusableIndex(
            f"the index {path} was made for other weights: {made_for} with hash "
            f"{_short(header.get('model_hash'))}, and {key.model!r} has {_short(key.model_hash)}{again}"
        )
    if header.get("tokenizer_hash") != key.tokenizer_hash:
        raise UnusableIndex(
            f"the index {path} was made for {made_for} with a tokenizer of hash "
            f"{_short(header.get('tokenizer_hash'))}, and {key.model!r} has one of "
            f"{_short(key.tokenizer_hash)}{again}"
        )
    if header.get("format") != key.format:
        raise UnusableIndex(
            f"the index {path} was made for weights in {reprlib.repr(header.get('format'))}, and "
            f"{key.model!r} is served in {key.format!r}{again}"
        )
    for name in ("layers", "neurons", "hidden"):
        if header.get(name) != getattr(key, name):
            raise UnusableIndex(
                f"the index {path} is damaged: {name} is {reprlib.repr(header.get(name))}, and "
                f"{key.model!r} has {getattr(key, name)}"
            )


def _short(hash: object) -> str:
    return str(hash)[:12]


Known = TypeVar("Known", PolicyKind, ChoiceKind)


class _Reader:
    """Takes an index out of a file, checking each value; all methods raise UnusableIndex."""

    def __init__(self, path: Path, file: Any, header: Mapping[str, Any], key: IndexKey) -> None:
        self._path, self._file, self._header, self._key = path, file, header, key
        self._unread = set(file.keys())

    def index(self) -> NeuronIndex:
        layers, neurons = self._key.layers, self._key.neurons
        clusters = self._whole("clusters", 0, MAX_CLUSTERS)
        raw = self._header.get("settings")
        if not isinstance(raw, list) or not 1 <= len(raw) <= MAX_SETTINGS:
            raise self._damaged(f"settings are no list of 1 to {MAX_SETTINGS}")
        corrections = self._whole("corrections", 0, SK_MAX_CORRECTIONS)
        source = self._header.get("source")
        index = NeuronIndex(
            key=self._key,
            prior=self._tensor("prior", [layers, neurons], torch.float32),
            cluster_layer=self._whole("cluster_layer", 0, layers - 1),
            centroids=self._tensor("centroids", [clusters, neurons], torch.float32, most=1.001),
            clusters=self._tensor("clusters", [clusters, layers, neurons], torch.float16),
            settings=[self._setting(i, own, corrections) for i, own in enumerate(raw)],
            planes_factors=self._factors("planes_factors"),
            gate_factors=self._factors("gate_factors"),
            corrections=[self._correction(number) for number in range(1, corrections + 1)],
            source=source if isinstance(source, dict) else {},
        )
        if self._unread:
            raise self._damaged(f"nothing reads its tensors {reprlib.repr(sorted(self._unread))}")
        factors = {ChoiceKind.PLANES: index.planes_factors, ChoiceKind.GATE: index.gate_factors}
        for number, setting in enumerate(index.settings):
            if setting.choice is not None and factors[setting.choice] is None:
                raise self._damaged(f"setting {number} lacks {setting.choice.value}_factors")
        return index

    def _setting(self, number: int, raw: object, corrections: int) -> Setting:
        where = f"setting {number}"
        if not isinstance(raw, dict):
            raise self._damaged(f"{where} is no object")
        kind = self._known(where, raw.get("kind"), PolicyKind)
        choice = raw.get("choice")
        choice = None if choice is None else self._known(where, choice, ChoiceKind)
        if kind not in (PolicyKind.CORE, PolicyKind.TOKEN):
            raise self._damaged(f"{where} is of kind {kind.value}")
        if (choice is None) != (kind is PolicyKind.CORE):
            raise self._damaged(f"{where} is of kind {kind.value} and chooses by {choice}")
        name, layers = f"setting.{number}", self._key.layers
        shares = thresholds = None
        if kind is PolicyKind.CORE or raw.get("core") is True:
            shares = self._tensor(f"{name}.shares", [layers], torch.float32, least=TINY, most=1)
        if choice is not None:
            thresholds = self._tensor(f"{name}.thresholds", [layers, 3], torch.float32, most=None)
        correction = raw.get("correction")
        if type(correction) is not int or not 0 <= correction <= corrections:
            raise self._damaged(f"{where} has correction {correction} of {corrections}")
        density = self._number(where, "density", raw, 1)
        if density == 0:
            raise self._damaged(f"{where} has density 0")
        return Setting(
            kind,
            density,
            self._number(where, "kl", raw, math.inf),
            self._number(where, "kl_p95", raw, math.inf),
            self._number(where, "top1", raw, 1),
            choice,
            shares,
            thresholds,
            correction,
        )

    def _factors(self, name: str) -> torch.Tensor | None:
        if name not in self._unread:
            return None
        return self._tensor(name, [self._key.layers, self._key.neurons], torch.float32)

    def _correction(self, number: int) -> list[Correction]:
        inputs, outputs = (
            self._low_rank(f"correction.{number}.{n}") for n in ("inputs", "outputs")
        )
        if inputs.shape != outputs.shape:
            raise self._damaged(f"correction {number} has matrices of two shapes")
        return list(zip(inputs, outputs, strict=True))

    def _low_rank(self, name: str) -> torch.Tensor:
        shape = list(self._file.get_slice(name).get_shape()) if name in self._unread else []
        rank = shape[1] if len(shape) == 3 and 1 <= shape[1] <= SK_MAX_CORRECTION_RANK else 1
        expected = [self._key.layers, rank, self._key.hidden]
        return self._tensor(name, expected, torch.bfloat16, least=None)

    def _tensor(
        self,
        name: str,
        shape: list[int],
        dtype: torch.dtype,
        *,
        least: float | None = 0,
        most: float | None = math.inf,
    ) -> torch.Tensor:
        """Of finite values from `least` on, None: any; `most` None: up to infinity itself."""
        if name not in self._unread:
            raise self._damaged(f"tensor {name} is missing")
        self._unread.remove(name)
        found = list(self._file.get_slice(name).get_shape())
        if found != shape:
            raise self._damaged(f"tensor {name} has shape {found}; expected {shape}")
        tensor: torch.Tensor = self._file.get_tensor(name)
        if tensor.dtype != dtype:
            raise self._damaged(f"tensor {name} is of {tensor.dtype}; expected {dtype}")
        usable = ~tensor.isnan() if most is None else tensor.isfinite() & (tensor <= most)
        if least is not None:
            usable &= tensor >= least
        if not bool(usable.all()):
            raise self._damaged(f"tensor {name} has values out of range")
        return tensor

    def _number(self, where: str, name: str, raw: Mapping[str, Any], most: float) -> float:
        """From 0 to `most`, and finite."""
        value: Any = raw.get(name)
        if type(value) not in (int, float) or not 0 <= value <= most or value == math.inf:
            raise self._damaged(f"{where} has {name} {reprlib.repr(value)}")
        return float(value)

    def _whole(self, name: str, least: int, most: int) -> int:
        value = self._header.get(name)
        if type(value) is not int or not least <= value <= most:
            raise self._damaged(f"{name} is {reprlib.repr(value)}, not from {least} to {most}")
        return value

    def _known(self, where: str, value: object, kind: type[Known]) -> Known:
        try:
            return kind(value)
        except ValueError:
            raise self._damaged(f"{where} names {reprlib.repr(value)}") from None

    def _damaged(self, what: str) -> UnusableIndex:
        return UnusableIndex(f"the index {self._path} is damaged: {what}")
