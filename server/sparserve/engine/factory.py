"""From settings to a running engine: model, backend, KV cache, limits."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sparse_kernels._abi import sk_status
from sparse_kernels.arena import trim_heap
from sparse_kernels.decoder import Decoder
from sparse_kernels.formats import DecoderFormats
from sparse_kernels.native import EMULATED, NativeCallError, usable_cpus
from sparse_kernels.weights import ChoiceTensors
from sparserve.config import EngineSettings
from sparserve.engine.backends import Chosen, choose_backend
from sparserve.engine.compressed_cache import compressed_folder
from sparserve.engine.engine import Engine
from sparserve.engine.formats import served_formats
from sparserve.engine.limits import EngineLimits
from sparserve.engine.memory import GIB, check_weights, size_cache
from sparserve.engine.policies import Policies, PolicyRules
from sparserve.engine.tokenizer import TextTokenizer
from sparserve.errors import ConfigError, RequestError, UnusableIndex
from sparserve.metrics import Metrics
from sparserve.model.backend import BLOCK_SIZE, Backend
from sparserve.model.calibration import CALIBRATION_TEXT
from sparserve.model.catalog import DownloadProgress
from sparserve.model.identity import index_key, source_has_changed
from sparserve.model.kv_cache import bytes_per_block
from sparserve.model.loader import LoadedModel, LoadProgress, load_model
from sparserve.model.native import NativeBackend
from sparserve.model.packing import QuantizeProgress, make_decoder, pack_model
from sparserve.model.placement import Placement
from sparserve.model.reference import ReferenceBackend
from sparserve.sparsity.chooser import Chooser
from sparserve.sparsity.index import NeuronIndex, read_index
from sparserve.sparsity.policy import Policy, PolicyKind

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    engine: Engine
    model_name: str


def build_engine(
    settings: EngineSettings,
    *,
    on_tensor: LoadProgress = lambda done, total: None,
    on_layer: QuantizeProgress = lambda done, total: None,
    on_download: DownloadProgress = lambda what, done, total: None,
) -> BuiltEngine:
    """Load the model and size the KV cache. Raises ModelError or ConfigError."""
    model = load_by_settings(settings, on_tensor=on_tensor, on_download=on_download)
    built = assemble_engine(model, settings, on_layer=on_layer)
    del model  # of which the engine keeps what it needs
    trim_heap()
    return built


def load_by_settings(
    settings: EngineSettings,
    *,
    on_tensor: LoadProgress = lambda done, total: None,
    on_download: DownloadProgress = lambda what, done, total: None,
) -> LoadedModel:
    """The model that `settings` name, compressed if they say so, in their dtype, where they place it. Raises
    ModelError or ConfigError.

    For a native backend its layers stay in the checkpoint: the backend packs a copy of its own. `on_download`
    is told of all that comes before loading: layers that are compressed, too.
    """
    chosen = choose_backend(settings, settings.dtype)
    source, served_as = settings.model, None
    if settings.compresses:
        _check_compress(settings, chosen)
        served_as, folder = compressed_folder(settings, on_download)
        source = str(folder)
    elif settings.compress_text:
        raise ConfigError(
            f"compress_text is {settings.compress_text}, and nothing is compressed; name a recipe with --compress, or give --prune"
        )
    model = load_model(
        source,
        dtype="bfloat16" if chosen.is_native else settings.dtype,
        placement=Placement(settings.device_map, int(settings.max_memory_gib * GIB)),
        layers_at_use=chosen.is_native,
        on_tensor=on_tensor,
        on_download=on_download,
    )
    trim_heap()  # what reading the checkpoint left behind
    if model.compressed is not None:
        info = model.compressed.info
        log.info(
            "model %s was made of %s at %s (hash %.12s) by sparserve %s: %.2f bits per weight of its layers",
            model.name, info.source.name, info.source.path, info.source.hash, info.sparserve_version,
            info.bits_per_decoder_weight,
        )  # fmt: skip
        if source_has_changed(model.path, info.source):
            log.warning(
                "%s has changed since: %s is what it was before; compress it again to serve what it is now",
                info.source.path, model.path,
            )  # fmt: skip
    return model if served_as is None else replace(model, name=served_as)


def _check_compress(settings: EngineSettings, chosen: Chosen) -> None:
    """Raises ConfigError where what --compress makes would be served as plain weights."""
    if settings.compress and not chosen.is_native:
        raise ConfigError(
            f"compress is {settings.compress}, and only the cpu backend and the cuda backend compute on compressed "
            f"weights; here the reference backend would: {chosen.reason}"
        )


def format_name(model: LoadedModel, settings: EngineSettings) -> str:
    """What BackendInfo.dtype will be. Raises ConfigError."""
    dtype = str(model.weights.dtype).removeprefix("torch.")
    native = choose_backend(settings, dtype).is_native
    return str(served_formats(model, settings)) if native else dtype


def assemble_engine(
    model: LoadedModel,
    settings: EngineSettings,
    *,
    on_layer: QuantizeProgress = lambda done, total: None,
) -> BuiltEngine:
    """An engine over a model in memory; `on_layer` is told of layers that are quantized for it. Raises
    ConfigError (of the index UnusableIndex) or, of layers that are read only now, CorruptCheckpoint or
    UnsupportedModel."""
    max_context = _max_context(settings, model.config.max_position_embeddings)
    index = _read_index(model, settings, format_name(model, settings))
    choice = None if index is None else index.choice
    backend, max_context = make_backend(
        model, settings, max_context, choice=choice, on_layer=on_layer
    )
    log.info(
        "model %s: %.1fM parameters in %s, backend %s on %s, context %d, KV cache %d tokens in %s",
        model.name, model.config.num_parameters / 1e6, backend.info.dtype, backend.info.title,
        backend.info.place, max_context, backend.num_blocks * BLOCK_SIZE,
        backend.info.kv_dtype,
    )  # fmt: skip
    config = model.config
    special_tokens = {
        "bos_token": config.bos_token_id,
        "eos_token": config.eos_token_ids[0] if config.eos_token_ids else None,
    }
    tokenizer = TextTokenizer(
        model.tokenizer, model.chat_template, config.vocab_size, special_tokens
    )
    policies = _policies(settings, Chooser(config, backend.info, index))
    log.info(
        "policies %s, by default %s; %s",
        ", ".join(kind.value for kind in policies.kinds), policies.default.value,
        f"index {settings.index}" if index else "no index",
    )  # fmt: skip
    max_tokens = settings.max_new_tokens or 2**31 - 1
    limits = EngineLimits(
        max_context=max_context,
        max_running=settings.max_running,
        max_batched_tokens=settings.max_batched_tokens,
        mixed_prefill_tokens=settings.mixed_prefill_tokens,
        default_max_tokens=min(settings.default_max_tokens, max_tokens),
        max_tokens=max_tokens,
        max_choices=settings.max_choices,
        prefix_cache=settings.prefix_cache,
    )
    return BuiltEngine(
        Engine(backend, tokenizer, limits, Metrics(model.name, max_context), policies), model.name
    )


def _policies(settings: EngineSettings, chooser: Chooser) -> Policies:
    """Raises ConfigError of a default that requests could not ask for."""
    least, most = settings.min_density, settings.max_target_kl or math.inf
    rules = PolicyRules(
        default=PolicyKind(settings.default_policy),
        default_density=max(settings.default_density, least) if settings.default_density else None,
        default_target_kl=min(settings.default_target_kl, most),
        min_density=least,
        max_target_kl=most,
        allowed=frozenset(PolicyKind(name) for name in settings.policies),
    )
    policies = Policies(chooser, rules)
    try:
        policies.plan(policies.complete(Policy(policies.default)))
    except RequestError as error:
        raise ConfigError(f"default_policy is {settings.default_policy}: {error}") from error
    return policies


def make_backend(
    model: LoadedModel,
    settings: EngineSettings,
    max_context: int,
    *,
    choice: ChoiceTensors | None = None,
    on_layer: QuantizeProgress = lambda done, total: None,
) -> tuple[Backend, int]:
    """-> (backend, context that fits its KV cache); with `choice` its sequences can choose neurons by
    importance. Raises ConfigError or ModelError."""
    config, dtype = model.config, model.weights.dtype
    dtype_name = str(dtype).removeprefix("torch.")
    chosen = choose_backend(settings, dtype_name)
    if chosen.is_native:
        _log_device(settings, chosen)
        return _native_backend(model, settings, chosen.device, max_context, choice, on_layer)
    log.info("the backend is the reference one: %s", chosen.reason)
    if settings.kv_dtype not in ("same", dtype_name):
        raise ConfigError(
            f"kv_dtype is {settings.kv_dtype}, but the backend is the reference one, which keeps KV like the "
            f"weights ({dtype_name}): {chosen.reason}; take --kv-dtype same, or what the cpu backend needs"
        )
    num_blocks, context = size_cache(settings, bytes_per_block(config, dtype), max_context)
    backend = ReferenceBackend(
        config,
        model.weights,
        num_blocks=num_blocks,
        threads=_threads(settings),
        choice=choice or ChoiceTensors(),
    )
    return backend, context


def _log_device(settings: EngineSettings, chosen: Chosen) -> None:
    if chosen.name == "cuda" and (emulated := os.environ.get(EMULATED)):
        log.warning("%s is no GPU: the emulator %s computes, for tests", chosen.device, emulated)
    elif chosen.name == "cpu" and settings.backend == settings.device == "auto":
        log.info("the device is the CPU: %s", chosen.reason)


def _native_backend(
    model: LoadedModel,
    settings: EngineSettings,
    device: str,
    max_context: int,
    choice: ChoiceTensors | None,
    on_layer: QuantizeProgress,
) -> tuple[Backend, int]:
    """See `make_backend`. First the weights: the cache gets a part of the memory that they leave."""
    with _told_as_config_error(model.name, device):
        formats = served_formats(model, settings)
        if device != "cpu":
            check_weights(model, formats, settings, device)
        decoder = make_decoder(
            model.config,
            model.weights,
            formats,
            threads=_threads(settings),
            device=device,
            kv_bits=_kv_bits(settings),
            graphs=settings.cuda_graphs,
            core_copies=settings.core_copies,
            calibration=_calibration(model, formats),
            choice=choice,
            compressed=model.rounded,
            on_layer=on_layer,
        )
        num_blocks, context = size_cache(settings, decoder.kv_block_bytes, max_context, device)
        return NativeBackend(model.config, decoder, num_blocks=num_blocks), context


def _read_index(model: LoadedModel, settings: EngineSettings, format: str) -> NeuronIndex | None:
    """Of the model with its weights in `format`. Raises UnusableIndex."""
    if not settings.index:
        return None
    path = Path(settings.index)
    try:
        key = index_key(model, format)
    except OSError as error:
        raise UnusableIndex(f"the model's files cannot be read to check {path}: {error}") from error
    return read_index(path, key)


def make_decoders(
    model: LoadedModel, settings: EngineSettings, levels: Sequence[str]
) -> list[Decoder]:
    """One for each level of the instruction set, all over one copy of the weights.

    Raises ConfigError or ModelError.
    """
    with _told_as_config_error(model.name):
        formats, threads = served_formats(model, settings), _threads(settings)
        packed = pack_model(
            model.config,
            model.weights,
            formats,
            threads=threads,
            calibration=_calibration(model, formats),
            compressed=model.rounded,
        )
        kv_bits = _kv_bits(settings)
        return [Decoder(packed, threads=threads, isa=level, kv_bits=kv_bits) for level in levels]


def _calibration(model: LoadedModel, formats: DecoderFormats) -> Sequence[int]:
    """Tokens of a text, where packing wants one."""
    if not formats.lm_head_scan:
        return ()
    ids = model.tokenizer.encode(CALIBRATION_TEXT).ids
    return [token_id for token_id in ids if token_id < model.config.vocab_size]


@contextmanager
def _told_as_config_error(model_name: str, device: str = "cpu") -> Iterator[None]:
    """What a native backend refuses, with the way out."""
    backend, way_out = "cpu", "take --backend reference"
    if device != "cpu":
        backend, way_out = "cuda", "take --device cpu"
    try:
        yield
    except NativeCallError as error:
        if error.status == sk_status.SK_STATUS_OUT_OF_MEMORY and device != "cpu":
            way_out = "take --dtype int8 or int4, a smaller --max-context or --kv-cache-gib, or --device cpu"
        raise ConfigError(
            f"the {backend} backend cannot run {model_name}: {error}; {way_out}"
        ) from error
    except MemoryError as error:
        raise ConfigError(f"the weights of {model_name} do not fit into memory: {error}") from error


def _kv_bits(settings: EngineSettings) -> int:
    """Of a native backend's KV cache."""
    return 8 if settings.kv_dtype == "int8" else 16


def _threads(settings: EngineSettings) -> int:
    usable = usable_cpus()
    if settings.threads > usable:
        # Threads without a CPU of their own would hold up all others at every barrier.
        log.warning(
            "threads is %d, but this process can use only %d CPUs: taking %d",
            settings.threads, usable, usable,
        )  # fmt: skip
    return min(settings.threads or usable, usable)


def _max_context(settings: EngineSettings, trained: int) -> int:
    if settings.max_context > trained:
        raise ConfigError(
            f"max_context {settings.max_context} is beyond the model's own limit of {trained}"
        )
    if settings.max_context == 1:
        raise ConfigError("max_context is 1; a prompt token and a new token need at least 2")
    return settings.max_context or trained
