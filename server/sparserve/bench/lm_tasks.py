"""lm-eval's tasks on a model as served."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sparserve.bench.peers.packages import require
from sparserve.config import EngineSettings
from sparserve.engine.factory import assemble_engine
from sparserve.errors import ConfigError
from sparserve.model.loader import LoadedModel

BOOTSTRAP_ITERATIONS = 1000  # of standard errors that have no formula


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task under one format."""

    system: str
    format: str
    policy: str
    density: float
    refresh: int
    task: str
    metric: str
    value: float
    stderr: float | None  # None where lm-eval has none for this metric
    samples: int  # documents


class Tasks:
    """Tasks of lm-eval by their names, those in the YAML files of `folder` among them."""

    def __init__(self, names: Sequence[str], folder: Path | None) -> None:
        """Raises ConfigError where lm-eval is missing or a name is not known."""
        require("lm_eval")
        import lm_eval
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"the folder of --task-folder {folder} does not exist")
        self._evaluate = lm_eval.simple_evaluate
        self._manager = TaskManager(include_path=folder and str(folder))
        for name in names:
            if not self._manager.match_tasks([name]):
                near = get_close_matches(name, self._manager.all_tasks)
                hint = f"; near it: {', '.join(near)}" if near else ""
                raise ConfigError(f"lm-eval has no task {name!r}, nor has --task-folder{hint}")
        self._names = list(names)

    def run(
        self,
        model: LoadedModel,
        settings: EngineSettings,
        limit: int | None,
        on_progress: Callable[[str, int, int], None],
    ) -> list[TaskScore]:
        """`limit`: documents of each task at most. Raises ConfigError of a task that cannot be loaded."""
        from sparserve.bench.lm_eval_model import EngineModel

        engine = assemble_engine(model, settings.model_copy(update={"prefix_cache": False})).engine
        os.environ["DISABLE_MULTIPROC"] = "1"  # or lm-eval's bootstrap forks a process with threads
        try:
            results = self._evaluate(
                EngineModel(engine, on_progress),
                tasks=self._names,
                limit=limit,
                task_manager=self._manager,
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
                log_samples=False,
            )
        except (OSError, ValueError, KeyError) as error:  # what reading files and data sets raises
            raise ConfigError(f"the tasks {', '.join(self._names)} failed: {error}") from error
        samples = results["n-samples"]
        return [
            TaskScore(
                "sparserve", engine.backend.info.dtype, "dense", 1.0, 0, task, metric, value, stderr,
                samples[task]["effective"],
            )
            for task, found in results["results"].items()
            if task in samples
            for metric, value, stderr in _metrics(found)
        ]  # fmt: skip


def _metrics(found: dict[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """lm-eval's `{"acc,none": …, "acc_stderr,none": …}` -> (metric, value, standard error)."""
    for key, value in found.items():
        name, _, kind = key.partition(",")
        if kind and not name.endswith("_stderr"):
            stderr = found.get(f"{name}_stderr,{kind}")
            full = name if kind == "none" else f"{name},{kind}"
            yield full, float(value), float(stderr) if isinstance(stderr, int | float) else None
