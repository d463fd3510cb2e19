"""From a model and a text to its index, stage by stage.

Factors and thresholds come from a walk through the layers in torch; what choices cost is measured with the
backend that serves, on windows that nothing was fitted on. Every stage is a function of the ones before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sparse_kernels.choice import ChoiceKind
from sparse_kernels.formats import DecoderFormats
from sparse_kernels.native import usable_cpus
from sparse_kernels.weights import ChoiceTensors, Correction
from sparserve.bench.quality import Window
from sparserve.bench.text import TEXTS
from sparserve.calibration.budgets import allocate
from sparserve.calibration.candidates import core_setting, plan_of, token_setting, used_by
from sparserve.calibration.clusters import spherical_kmeans
from sparserve.calibration.factors import Aim, Factors, Tiers, fit_corrections, fit_factors
from sparserve.calibration.measure import WindowCost, costs, prefill
from sparserve.calibration.plan import CalibrationPlan, Effort
from sparserve.calibration.stages import METADATA_KEY, Stages, Tensors
from sparserve.calibration.text import CalibrationText, read_text
from sparserve.config import EngineSettings
from sparserve.engine.backends import choose_backend
from sparserve.engine.factory import format_name, make_backend
from sparserve.engine.formats import served_formats
from sparserve.engine.threads import torch_threads
from sparserve.errors import ConfigError
from sparserve.model.backend import Backend, mean_neuron_bytes
from sparserve.model.identity import index_key
from sparserve.model.loader import LoadedModel
from sparserve.model.weight_bytes import layer_neuron_bytes
from sparserve.sparsity.index import IndexKey, NeuronIndex, Setting, refuse_foreign, write_index
from sparserve.sparsity.policy import PolicyKind
from sparserve.sparsity.predictors import embedding

# Which version of the pipeline an unfinished calibration belongs to.
PIPELINE = 1
CLUSTER_DEPTH = 0.78  # of the layer whose scores tell prompts apart; CoreInfer's own is 25 of 32
MAX_CLUSTERS, WINDOWS_PER_CLUSTER = 16, 4
# (what is done, steps done, steps in all)
Progress = Callable[[str, int, int], None]


def calibrate(
    model: LoadedModel, settings: EngineSettings, plan: CalibrationPlan, on_progress: Progress
) -> NeuronIndex:
    """The index, written to `plan.out`. What is finished is kept in a file beside it, and not done again.

    Raises ConfigError of a text that cannot be read or is too short or of another device, and as `make_backend`.
    """
    if settings.device_map != "cpu":
        raise ConfigError(
            f"device_map is {settings.device_map!r}, and a calibration runs in main memory; take --device-map "
            "cpu: the index serves wherever the weights are"
        )
    partial = partial_of(plan.out)
    refuse_foreign(partial, METADATA_KEY, "take another --out")
    text = read_text(model, plan.files, plan.windows, plan.prompt_tokens, plan.decode_tokens)
    try:
        key = index_key(model, format_name(model, settings))
    except OSError as error:
        raise ConfigError(f"the model's files cannot be read: {error}") from error
    dtype = str(model.weights.dtype).removeprefix("torch.")
    inputs = _inputs(key, text, settings, choose_backend(settings, dtype).name, plan)
    stages = Stages(partial, inputs)
    index = _Calibration(model, settings, plan, text, key, stages, on_progress).index()
    source = {name: inputs[name] for name in ("text", "windows", "prompt_tokens", "decode_tokens")}
    index = replace(index, source={**source, TEXTS: list(text.files)})
    try:
        write_index(plan.out, index)
        stages.forget()
    except OSError as error:
        raise ConfigError(f"{plan.out} cannot be written: {error}") from error
    return index


def partial_of(out: Path) -> Path:
    """What is finished of the index `out`."""
    return out.with_name(f"{out.name}.partial")


def _inputs(
    key: IndexKey,
    text: CalibrationText,
    settings: EngineSettings,
    backend: str,
    plan: CalibrationPlan,
) -> dict[str, object]:
    """All that results depend on."""
    effort = plan.effort
    return {
        "pipeline": PIPELINE,
        "key": [getattr(key, name) for name in IndexKey.__slots__],
        "text": text.hash,
        "threads": settings.threads or usable_cpus(),
        "kv_dtype": settings.kv_dtype,
        "backend": backend,
        "windows": plan.windows,
        "prompt_tokens": plan.prompt_tokens,
        "decode_tokens": plan.decode_tokens,
        "effort": [repr(getattr(effort, name)) for name in Effort.__slots__],
    }


class _Calibration:
    """The stages; each method is one and tells `on_progress`."""

    def __init__(
        self,
        model: LoadedModel,
        settings: EngineSettings,
        plan: CalibrationPlan,
        text: CalibrationText,
        key: IndexKey,
        stages: Stages,
        on_progress: Progress,
    ) -> None:
        self._model, self._settings, self._plan, self._text = model, settings, plan, text
        self._neurons = torch.tensor(model.config.layer_neurons)
        self._key, self._stages, self._on_progress = key, stages, on_progress
        self._effort = plan.effort
        dtype = str(model.weights.dtype).removeprefix("torch.")
        native = choose_backend(settings, dtype).is_native
        self._formats = served_formats(model, settings) if native else DecoderFormats()
        self._aims = {
            kind: Aim(own, self._tiers(kind, own), plan.effort.reaches)
            for kind, layers in layer_neuron_bytes(model.config, self._formats).items()
            for own in [mean_neuron_bytes(layers)]
            if kind is not None
        }
        windows = [window.prompt + window.fed for window in text.fitted]
        self._token_ids = torch.tensor(windows)  # [windows, tokens]

    def index(self) -> NeuronIndex:
        factors = self._factors()
        values = {kind: own.values for kind, own in factors.items()}
        tensors = ChoiceTensors(values.get(ChoiceKind.PLANES), values.get(ChoiceKind.GATE))
        backend = self._backend(tensors)
        index = self._prior(backend, tensors)
        settings = [*self._cores(backend, index), *self._by_token(backend, index, factors)]
        corrections, corrected = self._corrections(backend, index, factors, settings)
        if corrections:
            del backend  # its weights make room for those of the next
            index = replace(index, corrections=corrections)
            backend = self._backend(index.choice)
        return self._measured(backend, index, [*settings, *corrected])

    def _backend(self, tensors: ChoiceTensors) -> Backend:
        tokens = self._plan.prompt_tokens + self._plan.decode_tokens
        own = {"max_running": 1, "max_context": tokens, "kv_cache_gib": 0}
        settings = self._settings.model_copy(update=own)

        def on_layer(done: int, total: int) -> None:
            self._on_progress("quantizing layers", done, total)

        return make_backend(self._model, settings, tokens, choice=tensors, on_layer=on_layer)[0]

    def _factors(self) -> dict[ChoiceKind, Factors]:
        def compute() -> Tensors:
            with torch_threads(self._settings):
                found = fit_factors(
                    self._model,
                    self._formats,
                    self._token_ids,
                    self._aims,
                    self._telling("factors"),
                )
            return {
                f"{kind.value}.{name}": getattr(own, name)
                for kind, own in found.items()
                for name in ("values", "thresholds")
            }

        kept = self._stages.run("factors", compute)
        return {
            kind: Factors(kept[f"{kind.value}.values"], kept[f"{kind.value}.thresholds"])
            for kind in ChoiceKind
            if f"{kind.value}.values" in kept
        }

    def _prior(self, backend: Backend, tensors: ChoiceTensors) -> NeuronIndex:
        """Mean scores of all prompts and of groups of them; without settings yet."""
        layer = int(CLUSTER_DEPTH * self._key.layers)

        def compute() -> Tensors:
            scores = torch.stack([own.float() for own in self._prompt_scores(backend)])
            points = embedding(scores[:, layer])
            count = min(MAX_CLUSTERS, max(1, len(scores) // WINDOWS_PER_CLUSTER))
            groups = spherical_kmeans(points, count)
            members = [groups == group for group in range(int(groups.max()) + 1)]
            clusters = torch.stack([scores[own].mean(dim=0) for own in members])
            centroids = torch.stack([points[own].sum(dim=0) for own in members])
            return {
                "prior": scores.mean(dim=0),
                "clusters": clusters.half(),
                "centroids": torch.nn.functional.normalize(centroids, dim=1),
            }

        kept = self._stages.run("prior", compute)
        return NeuronIndex(
            key=self._key,
            prior=kept["prior"],
            cluster_layer=layer,
            centroids=kept["centroids"],
            clusters=kept["clusters"],
            settings=(),
            planes_factors=tensors.planes_factors,
            gate_factors=tensors.gate_factors,
        )

    def _prompt_scores(self, backend: Backend) -> Iterator[torch.Tensor]:
        """Of each fitted prompt the mean score of a token, float64 [layers, neurons]."""
        tell = self._telling("statistics of prompts")
        for number, window in enumerate(self._text.fitted, 1):
            total = prefill(backend, window).total()
            assert total is not None
            yield total.scores() / max(1, total.tokens)
            tell(number, len(self._text.fitted))

    def _cores(self, backend: Backend, index: NeuronIndex) -> list[Setting]:
        """Budgets by layer from the losses of each layer alone, as far as they help: halfway to equal ones or
        not at all, where that is better on fitted text."""
        effort, layers = self._effort, self._key.layers
        alone = []
        for layer in range(layers):
            for share in effort.loss_grid:
                shares = torch.ones(layers)
                shares[layer] = share
                alone.append(core_setting(shares))
        windows = self._text.fitted[: effort.loss_windows]
        losses = self._kl("losses of layers", backend, index, windows, alone)
        losses = losses.view(layers, len(effort.loss_grid))

        def mixed(density: float, way: float) -> Setting:
            budgets = allocate(losses, effort.loss_grid, density)
            return core_setting(torch.lerp(torch.full((layers,), density), budgets, way))

        ways = (0.0, 0.5, 1.0)
        tried = [mixed(density, way) for way in ways for density in effort.core_densities]
        windows = self._text.fitted[: effort.trial_windows]
        kl = self._kl("budgets", backend, index, windows, tried).view(len(ways), -1)
        best = kl.clamp(min=1e-9).log().mean(dim=1).argmin()
        return [mixed(density, ways[int(best)]) for density in effort.core_densities]

    def _by_token(
        self, backend: Backend, index: NeuronIndex, factors: dict[ChoiceKind, Factors]
    ) -> list[Setting]:
        """For each reach the tiers that are best on fitted text; of the better kind each also inside a core."""
        effort, found = self._effort, []
        windows = self._text.fitted[: effort.trial_windows]
        for kind, own in factors.items():
            aim = self._aims[kind]
            tried = [
                token_setting(kind, own, aim, tier, reach)
                for tier in range(len(aim.tiers))
                for reach in range(len(aim.reaches))
            ]
            best = [0] * len(aim.reaches)
            if len(aim.tiers) > 1:
                kl = self._kl(f"tiers of {kind.value}", backend, index, windows, tried)
                best = kl.view(len(aim.tiers), -1).argmin(dim=0).tolist()
            for reach, tier in enumerate(best):
                found.append(tried[tier * len(best) + reach])
                best_kind = kind is ChoiceKind.PLANES or ChoiceKind.PLANES not in factors
                if best_kind and aim.reaches[reach] <= effort.token_core_up_to:
                    found.append(token_setting(kind, own, aim, tier, reach, effort.token_core))
        return found

    def _tiers(self, kind: ChoiceKind, neuron_bytes: Sequence[float]) -> Sequence[Tiers]:
        if kind is ChoiceKind.GATE:
            return (Tiers(),)
        return self._effort.down_tiers if neuron_bytes[3] else self._effort.tiers

    def _corrections(
        self,
        backend: Backend,
        index: NeuronIndex,
        factors: dict[ChoiceKind, Factors],
        settings: Sequence[Setting],
    ) -> tuple[list[list[Correction]], list[Setting]]:
        """-> (corrections, the settings that use them). Choices by planes gain nothing by one."""
        effort = self._effort
        rank = min(effort.correction_rank, self._key.hidden // 4)
        chosen = [
            own
            for own in settings
            if own.density <= effort.corrected_up_to
            and (
                own.kind is PolicyKind.CORE
                or (own.choice is ChoiceKind.GATE and not _has_core(own))
            )
        ]
        if rank == 0 or not chosen:
            return [], []

        def compute() -> Tensors:
            prompts = [prefill(backend, window) for window in self._text.fitted]
            used = [used_by(own, factors, prompts, index, self._neurons) for own in chosen]
            with torch_threads(self._settings):
                made = fit_corrections(
                    self._model,
                    self._formats,
                    self._token_ids,
                    used,
                    rank,
                    self._telling("corrections"),
                )
            return {
                f"{number}.{name}": torch.stack([pair[place] for pair in own])
                for number, own in enumerate(made)
                for place, name in enumerate(("inputs", "outputs"))
            }

        kept = self._stages.run("corrections", compute)
        corrections = [
            list(zip(kept[f"{n}.inputs"], kept[f"{n}.outputs"], strict=True))
            for n in range(len(chosen))
        ]
        return corrections, [replace(own, correction=n) for n, own in enumerate(chosen, 1)]

    def _measured(
        self, backend: Backend, index: NeuronIndex, settings: Sequence[Setting]
    ) -> NeuronIndex:
        """With what each of `settings` costs on the windows held out."""
        windows = self._text.held_out
        found = self._costs("costs on held-out text", backend, index, windows, settings)
        costs_of = found.mean(dim=0)  # [settings, 6]
        p95 = found[:, :, 0].quantile(0.95, dim=0)
        measured = []
        for own, (kl, top1, *reads), high in zip(
            settings, costs_of.tolist(), p95.tolist(), strict=True
        ):
            density = _density(backend, own, reads, index)
            if density < 1:
                measured.append(replace(own, density=density, kl=kl, kl_p95=high, top1=top1))
        return replace(index, settings=measured)

    def _kl(
        self,
        what: str,
        backend: Backend,
        index: NeuronIndex,
        windows: Sequence[Window],
        settings: Sequence[Setting],
    ) -> torch.Tensor:
        """[settings] float64."""
        return self._costs(what, backend, index, windows, settings)[:, :, 0].mean(dim=0)

    def _costs(
        self,
        what: str,
        backend: Backend,
        index: NeuronIndex,
        windows: Sequence[Window],
        settings: Sequence[Setting],
    ) -> torch.Tensor:
        """KL, top-1 and reads, float64 [windows, settings, 6]."""
        plans = [plan_of(own, index, self._neurons) for own in settings]
        tell, rows = self._telling(what), []
        for number, window in enumerate(windows):

            def compute(window: Window = window) -> Tensors:
                found = [_row(cost) for cost in costs(backend, window, plans)]
                return {"costs": torch.tensor(found, dtype=torch.float64)}

            rows.append(self._stages.run(f"{what} {number}", compute)["costs"])
            tell(number + 1, len(windows))
        return torch.stack(rows)

    def _telling(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self._on_progress(what, done, total)


def _has_core(setting: Setting) -> bool:
    return setting.shares is not None


def _row(cost: WindowCost) -> list[float]:
    return [cost.kl, cost.top1, *cost.reads]


def _density(
    backend: Backend, setting: Setting, reads: Sequence[float], index: NeuronIndex
) -> float:
    """Share of the feed-forward layers' bytes, with those of a correction."""
    info = backend.info
    each = info.neuron_bytes[setting.choice]
    share = sum(part * own for part, own in zip(reads, each, strict=True)) / sum(each)
    return share + index.correction_bytes(setting.correction) / info.mlp_bytes
