"""From a model and texts to a folder with the model healed: what `sparserve heal` does."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from sparse_kernels.arena import keep_freed_memory
from sparse_kernels.formats import DecoderFormats
from sparse_kernels.native import usable_cpus
from sparserve.calibration import stages
from sparserve.calibration.stages import Stages
from sparserve.compression.healing import Heal
from sparserve.config import EngineSettings
from sparserve.engine.backends import choose_backend
from sparserve.engine.formats import in_bfloat16, served_formats
from sparserve.engine.threads import torch_threads
from sparserve.errors import ConfigError
from sparserve.healing import state
from sparserve.healing.network import Network
from sparserve.healing.policies import parse_through
from sparserve.healing.state import Look, StateFile
from sparserve.healing.stored import (
    formats_of,
    healed_ends,
    healed_tensors,
    layer_as_stored,
    network_of,
)
from sparserve.healing.text import Windows, read_given, windows_of, write_text
from sparserve.healing.through import Through
from sparserve.healing.training import CannotHeal, Healed, OnProgress, nothing_to_heal, train
from sparserve.model.compressed_checkpoint import WITH_BIASES, CompressionInfo, Source
from sparserve.model.compressed_writer import (
    CheckpointWriter,
    alone_with,
    first_info,
    partial_of,
    refuse_existing,
)
from sparserve.model.identity import hash_of_files, hash_of_tokenizer
from sparserve.model.loader import LoadedModel, load_model
from sparserve.model.text import TextFiles
from sparserve.sparsity.index import refuse_foreign

log = logging.getLogger(__name__)

# Which version of the training an unfinished run belongs to.
VERSION = 2
LOOKS = "healing.json"  # in the folder: the looks at the held-out windows

# (what is done, done, in all)
OnStage = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class HealedFolder:
    info: CompressionInfo
    healed: Healed
    seconds: float  # of this run


def heal(
    model: str,
    how: Heal,
    texts: Sequence[Path],
    out: Path,
    settings: EngineSettings,
    *,
    original: str | None = None,
    formats: DecoderFormats | None = None,
    on_stage: OnStage = lambda what, done, total: None,
    on_step: OnProgress = lambda progress: None,
) -> HealedFolder:
    """Write `model`, what `load_model` takes, as a folder `out` that it takes as well, healed as `how` says.

    The teacher is `original`, else what the folder `model` was made of, else `model` itself. `formats` are those that
    will serve; by default those of `settings`, which also say where the teacher writes text. An interrupted run goes on from its last look, kept in a file beside `out`.

    Of several processes that accelerate launched, the first writes.

    Raises ModelError, and ConfigError of texts that are too short, a policy that cannot be learned through, a teacher
    that is not this model's, and where `out` cannot be written or is there already.
    """
    begun = time.monotonic()
    _check_settings(settings)
    refuse_existing(out)
    refuse_foreign_files(out)
    student, teacher = _both(model, original)
    formats = formats or served_formats(student, settings)
    through = parse_through(how.through, student, formats)
    if student is teacher and type(through) is Through and not how.concentrate:
        # Told now, not after the original has written its windows.
        raise ConfigError(f"{model} {nothing_to_heal(how.through)}")
    given = read_given(teacher, how, texts)
    accelerator = _accelerator(how, settings)
    inputs = _inputs(how, student, teacher, given, formats, settings, accelerator)
    is_main = accelerator.is_main_process
    with alone_with(out) if is_main else nullcontext(), torch_threads(settings):
        info = _info(student, teacher, how, given, inputs)
        if is_main:  # whatever cannot be written is told now, not after hours
            CheckpointWriter(out, info)
        with accelerator.main_process_first():  # others then find what it has written
            windows = _windows(teacher, settings, how, given, out, inputs, on_stage)
        keep_freed_memory()
        network = network_of(student, how.rank, how.seed)
        kept = StateFile(_state_file(out), inputs)
        if is_main and kept.is_of_another_run():
            log.warning(
                "beginning anew: what an earlier run left at %s is of other settings, models or texts",
                _state_file(out),
            )
        try:
            healed = train(
                network, network_of(teacher), how, through, windows, kept, accelerator, on_step
            )
        except CannotHeal as error:
            if is_main:
                _forget(out, kept)
            raise ConfigError(f"{model} {error}") from error
        if healed.best.step == 0:
            if is_main:
                _forget(out, kept)
            raise ConfigError(
                f"no look at the held-out windows was better than the first one, a KL of {healed.best.held_out:.3g}: "
                f"nothing is written. Lower the learning rate, {how.learning_rate:g} now, or give more text"
            )
        if is_main:
            info = replace(info, healing={**(info.healing or {}), **_results(healed)})
            info = _write(student, network, healed, info, out, on_stage)
            _forget(out, kept)
        accelerator.wait_for_everyone()
    return HealedFolder(info, healed, time.monotonic() - begun)


def _forget(out: Path, kept: StateFile) -> None:
    """What was kept for a run that would go on."""
    kept.forget()
    _written_file(out).unlink(missing_ok=True)
    shutil.rmtree(partial_of(out), ignore_errors=True)


def refuse_foreign_files(out: Path) -> None:
    """Raises ConfigError of files beside `out` that a run would write over, and remove, and that no run made."""
    refuse_foreign(_state_file(out), state.METADATA_KEY, "take another --out")
    refuse_foreign(_written_file(out), stages.METADATA_KEY, "take another --out")


def _check_settings(settings: EngineSettings) -> None:
    """Raises ConfigError of those that healing does not follow."""
    if settings.compresses or settings.compress_text:
        raise ConfigError(
            "--compress and --prune are for models that are served; make a folder by `sparserve compress`, and heal that"
        )
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device is {settings.device}, and torch finds no GPU here, or was built without CUDA; take --device cpu"
        )


def _write(
    student: LoadedModel,
    network: Network,
    healed: Healed,
    info: CompressionInfo,
    out: Path,
    on_stage: OnStage,
) -> CompressionInfo:
    writer = CheckpointWriter(out, info)
    for index, layer in enumerate(network.healed):
        writer.write_layer(index, healed_tensors(layer_as_stored(student, index), layer))
        on_stage("writing layers", index + 1, len(network.healed))
    writer.write_file(LOOKS, _looks_as_json(healed.looks))
    writer.finish(healed_ends(student, network))
    return writer.info


def _accelerator(how: Heal, settings: EngineSettings) -> Accelerator:
    """Raises ConfigError of a batch that processes cannot share evenly."""
    if settings.device.startswith("cuda:"):
        torch.cuda.set_device(settings.device)
    # Frozen weights are buffers: they are the same in all processes, and large.
    frozen = DistributedDataParallelKwargs(broadcast_buffers=False)
    found = Accelerator(cpu=settings.device == "cpu", kwargs_handlers=[frozen])
    if how.batch % found.num_processes:
        raise ConfigError(
            f"batch is {how.batch}, and there are {found.num_processes} processes, which share it; take a multiple of it"
        )
    return found


def _both(model: str, original: str | None) -> tuple[LoadedModel, LoadedModel]:
    """(student, teacher). Raises ConfigError where the teacher is another model's, or is gone."""
    student = load_model(model, dtype="bfloat16", layers_at_use=True)
    if original is None and student.compressed is None:
        return student, student
    if original is None:
        assert student.compressed is not None
        source = student.compressed.info.source
        if not _is_still(source):
            raise ConfigError(
                f"{model} was made of {source.name}, which is no longer what it was at {source.path}; the teacher is the "
                "original model: name it with --original"
            )
        original = source.path
    teacher = load_model(original, dtype="bfloat16", layers_at_use=True)
    if teacher.tokenizer.to_str() != student.tokenizer.to_str():
        raise ConfigError(
            f"{model} and the original {original} have different tokenizers; give the model that it was made of"
        )
    if teacher.config.vocab_size != student.config.vocab_size:
        raise ConfigError(
            f"{model} has {student.config.vocab_size} logits and the original {original} "
            f"{teacher.config.vocab_size}; give the model that it was made of"
        )
    return student, teacher


def _is_still(source: Source) -> bool:
    """Whether what a folder names is where it was; the name comes from outside, and may be of a pipe, or no path."""
    path = Path(source.path)
    try:
        return (path.is_dir() or path.is_file()) and hash_of_files(path) == source.hash
    except (OSError, ValueError):
        return False


def _inputs(
    how: Heal,
    student: LoadedModel,
    teacher: LoadedModel,
    given: TextFiles,
    formats: DecoderFormats,
    settings: EngineSettings,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """All that results depend on."""
    return {
        "version": VERSION,
        "how": how.model_dump(mode="json"),
        "student": hash_of_files(student.path),
        "teacher": hash_of_files(teacher.path),
        "text": given.hash,
        "tokenizer": hash_of_tokenizer(teacher),
        "written_by": _writer(settings) if how.generated else None,
        "served": str(formats),
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "threads": settings.threads or usable_cpus(),
        "torch": torch.__version__,
    }


def _writer(settings: EngineSettings) -> list[str]:
    """What of the engine's settings the text depends on that the original writes. Raises ConfigError."""
    return [choose_backend(in_bfloat16(settings), "bfloat16").name, settings.kv_dtype]


def _windows(
    teacher: LoadedModel,
    settings: EngineSettings,
    how: Heal,
    given: TextFiles,
    out: Path,
    inputs: dict[str, Any],
    on_stage: OnStage,
) -> Windows:
    """What the teacher writes is kept: it takes minutes."""

    def write() -> dict[str, torch.Tensor]:
        on_tokens = lambda done, total: on_stage("the original writes", done, total)  # noqa: E731
        return {"token_ids": write_text(teacher, settings, how, given, on_tokens)}

    kept = ("version", "teacher", "text", "tokenizer", "written_by", "threads")
    needed = {name: inputs[name] for name in kept}
    needed |= {name: getattr(how, name) for name in ("generated", "window", "held_out", "seed")}
    written = Stages(_written_file(out), needed).run("written", write)["token_ids"]
    return windows_of(how, given, written)


def _state_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.state")


def _written_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.written")


def _info(
    student: LoadedModel, teacher: LoadedModel, how: Heal, given: TextFiles, inputs: dict[str, Any]
) -> CompressionInfo:
    """Of what will be made, without how it went."""
    known = student.compressed
    recipe = {"name": "healed"} if known is None else known.info.recipe
    info = first_info(student, recipe, formats_of(student))
    if known is not None:  # whose recipe is still the last one
        info = replace(info, earlier=known.info.earlier)
    biases = info.added_biases if student.config.down_bias else (*info.added_biases, "down")
    return replace(
        info,
        format_version=WITH_BIASES,
        texts=tuple(dict.fromkeys((*info.texts, *given.files))),
        added_biases=biases,
        healing={
            **how.model_dump(mode="json"),
            "student": inputs["student"],
            "teacher": inputs["teacher"],
            "teacher_name": teacher.name,
        },
    )


def _results(healed: Healed) -> dict[str, Any]:
    return {
        "steps": healed.best.step,
        "held_out_before": healed.looks[0].held_out,
        "held_out_after": healed.best.held_out,
    }


def _looks_as_json(looks: Sequence[Look]) -> bytes:
    """With null where a look of a run that diverged found no number."""
    rows = [
        {
            name: own if own is None or math.isfinite(own) else None
            for name, own in asdict(look).items()
        }
        for look in looks
    ]
    return (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode()
