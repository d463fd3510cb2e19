"""The quality of every system of a report. Each row is kept in a file as it comes, beside all that it depends
on, so that a report that was interrupted, or gets another system, measures only what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sparserve import __version__
from sparserve.bench import evaluation
from sparserve.bench.evaluation import Plan, evaluate_formats
from sparserve.bench.peers.registry import PeerSpec
from sparserve.bench.policies import PolicySpec
from sparserve.bench.quality import Quality
from sparserve.bench.report_weights import Load, Weights
from sparserve.bench.rounds import BenchProgress
from sparserve.config import EngineSettings
from sparserve.engine.formats import with_dtype
from sparserve.errors import ConfigError
from sparserve.model.loader import LoadedModel
from sparserve.model.text import text_hash
from sparserve.sparsity.policy import DENSE, PolicyKind

UNFINISHED = ".unfinished"

Measured = Mapping[str, Any]  # JSON values: all that a row depends on


class KeptQuality:
    """A JSON file of rows, each beside what it was measured of."""

    def __init__(self, path: Path) -> None:
        """A file that cannot be read counts as none. Raises ConfigError where none can be written."""
        self._path = path
        self._rows = _read(path)
        self._write()  # told now, not after an hour

    def find(self, measured: Measured) -> Quality | None:
        return self._rows.get(_key(measured))

    def add(self, measured: Measured, row: Quality) -> None:
        """Raises ConfigError where it cannot be written."""
        self._rows[_key(measured)] = row
        self._write()

    def _write(self) -> None:
        entries = [{"of": json.loads(key), "row": asdict(row)} for key, row in self._rows.items()]
        with writing(self._path) as unfinished:
            unfinished.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A path to write to; what is there then becomes `path`. Raises ConfigError."""
    unfinished = path.with_name(f"{path.stem}{UNFINISHED}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}; take another --out") from error


def measure_quality(
    settings: EngineSettings,
    plan: Plan,
    weights: Sequence[Weights],
    model_hash: str,
    load: Load,
    kept: KeptQuality,
    on_progress: BenchProgress,
    on_note: Callable[[str], None],
) -> list[Quality]:
    """A row for each policy of each of `weights`, then one for each of `plan.peers`, which name their formats.

    `plan` says what is read; it has no formats and policies of its own. `model_hash`: of the files of
    `settings.model`. Raises as `evaluate_formats`.
    """
    jobs = [_of_weights(own, plan, model_hash) for own in weights]
    jobs += [_of_peer(peer, settings, plan, model_hash) for peer in plan.peers]
    asked = [measured for job in jobs for _, measured in job.asked]
    if there := sum(kept.find(measured) is not None for measured in asked):
        on_note(f"{there} of {len(asked)} rows of quality were measured before and are not again")
    models = _Models(settings, load)
    for done, job in enumerate(jobs):
        on_progress("quality", done, len(jobs))
        missing = {spec: measured for spec, measured in job.asked if kept.find(measured) is None}
        if missing:
            rows = evaluate_formats(
                job.settings,
                replace(job.plan, policies=list(missing)),
                models.loader(job.settings),
                _prefixed(job.name, on_progress),
            )
            for measured, row in zip(missing.values(), rows, strict=True):
                kept.add(measured, row)
    on_progress("quality", len(jobs), len(jobs))
    return [row for row in map(kept.find, asked) if row is not None]


@dataclass(frozen=True, slots=True)
class _Job:
    """What is scored of one copy of the weights."""

    name: str
    settings: EngineSettings
    plan: Plan
    asked: Sequence[tuple[PolicySpec, Measured]]


def _of_weights(own: Weights, plan: Plan, model_hash: str) -> _Job:
    shared = _shared(plan, model_hash) | {
        "system": "sparserve",
        "weights": own.key.model_hash,
        "tokenizer": own.key.tokenizer_hash,
        "format": own.key.format,
        "backend": own.settings.backend,
        "kv_dtype": own.settings.kv_dtype,
    }
    index = text_hash(Path(own.settings.index).read_bytes()) if own.settings.index else None
    asked = []
    for spec in map(_scored_as, own.policies):
        dense = spec.policy.kind is PolicyKind.DENSE
        asked.append((spec, {**shared, "policy": str(spec), "index": None if dense else index}))
    formats = [own.settings.dtype]
    return _Job(own.name, own.settings, replace(plan, formats=formats, peers=()), asked)


def _of_peer(peer: PeerSpec, settings: EngineSettings, plan: Plan, model_hash: str) -> _Job:
    measured = _shared(plan, model_hash) | {"system": peer.name, "format": peer.format}
    own = replace(plan, peers=(peer,))
    return _Job(f"{peer.name} {peer.format}", settings, own, [(PolicySpec(DENSE), measured)])


def _shared(plan: Plan, model_hash: str) -> dict[str, Any]:
    return {
        "sparserve": __version__,
        "original": model_hash,
        "text": text_hash(plan.text.read_bytes()),
        "windows": plan.windows,
        "prompt_tokens": plan.prompt_tokens,
        "decode_tokens": plan.decode_tokens,
    }


def _scored_as(spec: PolicySpec) -> PolicySpec:
    """`exact` has the distributions of dense."""
    return PolicySpec(DENSE) if spec.policy.kind is PolicyKind.EXACT else spec


class _Models:
    """Loads the original in float32 once for all jobs, whatever their settings."""

    def __init__(self, settings: EngineSettings, load: Load) -> None:
        # Integers and the native backends are for what is compared with it.
        update = {"backend": "reference", "device": "auto"}
        own = with_dtype(settings, "float32").model_copy(update=update)
        self._settings, self._load = own, load

    @cached_property
    def _original(self) -> LoadedModel:
        return self._load(self._settings)

    def loader(self, settings: EngineSettings) -> evaluation.Load:
        """For weights that `settings` serve."""

        def load(name: str, dtype: str) -> LoadedModel:
            if (name, dtype) == (self._settings.model, "float32"):
                return self._original
            return self._load(with_dtype(settings.model_copy(update={"model": name}), dtype))

        return load


def _prefixed(name: str, on_progress: BenchProgress) -> BenchProgress:
    return lambda what, done, total: on_progress(f"{name}: {what}", done, total)


def _key(measured: Measured) -> str:
    return json.dumps(measured, sort_keys=True)


def _read(path: Path) -> dict[str, Quality]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {_key(entry["of"]): Quality(**entry["row"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
