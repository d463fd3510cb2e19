"""What tests share: a tiny random checkpoint, the demo model, engines and running servers.

The tiny model (2 layers, byte-level tokenizer) makes the fast tests; the demo model is fetched once
into the user's cache, as `sparserve demo` does.
"""

import sparserve  # isort: skip  # noqa: F401  (before torch: it sets how OpenMP threads wait)

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import (
    CertificateIssuerPrivateKeyTypes as PrivateKey,
)
from cryptography.x509.oid import NameOID
from hypothesis import settings
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sparse_kernels import native
from sparse_kernels.choice import ChoiceKind
from sparse_kernels.formats import DecoderFormats, LayerFormats
from sparse_kernels.weights import EndTensors, Factors, LayerTensors
from sparserve.api.server import Server
from sparserve.compression.quantize import quantize, quantize_layer
from sparserve.config import ServerSettings
from sparserve.engine.engine import Engine
from sparserve.engine.factory import assemble_engine
from sparserve.model.catalog import DEMO_MODEL
from sparserve.model.compressed_checkpoint import (
    VERSION,
    WITH_BIASES,
    AddedBias,
    CompressedWeights,
)
from sparserve.model.compressed_writer import CheckpointWriter, first_info
from sparserve.model.config import ModelConfig
from sparserve.model.identity import index_key
from sparserve.model.loader import LoadedModel, load_model
from sparserve.model.packing import layer_tensors
from sparserve.model.weights import HF_NAMES, layer_shapes
from sparserve.sparsity.index import NeuronIndex, Setting, write_index
from sparserve.sparsity.policy import PolicyKind

# Examples of the machine that runs the tests may take long: it has other work.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Authority:
    """Signs certificates for this machine and for clients."""

    def __init__(self, name: str) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        own = self._builder(self._name, self.key.public_key(), timedelta(days=1))
        basic = x509.BasicConstraints(ca=True, path_length=None)
        certificate = own.add_extension(basic, critical=True).sign(self.key, hashes.SHA256())
        self.pem = certificate.public_bytes(serialization.Encoding.PEM)

    def issue(
        self, folder: Path, name: str, *, key: PrivateKey | None = None, days: float = 1
    ) -> tuple[Path, Path]:
        """-> files of a certificate, for localhost too, and its key; `days` may lie behind."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        here = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
        )
        certificate = (
            self._builder(subject, key.public_key(), timedelta(days=days))
            .add_extension(here, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        chain, secret = folder / f"{name}.crt", folder / f"{name}.key"
        chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        secret.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return chain, secret

    def _builder(self, subject, key, lifetime: timedelta) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1000))
            .not_valid_after(now + lifetime)
        )


def tiny_tokenizer() -> Tokenizer:
    """Every byte is a token; 256 <bos>, 257 <eos>, 258 <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ("<bos>", "<eos>", "<pad>")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return tokenizer


def tiny_tensors(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under Hugging Face names, scaled so that greedy text is not one token."""
    generator = torch.Generator().manual_seed(seed)

    def random(shape: tuple[int, ...], name: str = "") -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            return 0.3 * values
        return 1 + 0.1 * values if len(shape) == 1 else values * shape[-1] ** -0.5

    tensors = {
        (name := HF_NAMES.layer[field].format(i=i)): random(shape, name)
        for i in range(config.num_layers)
        for field, shape in layer_shapes(config, i).items()
    }
    tensors[HF_NAMES.embedding] = random((config.vocab_size, config.hidden_size)) * 8
    tensors[HF_NAMES.norm] = random((config.hidden_size,))
    if not config.tie_word_embeddings:
        tensors[HF_NAMES.lm_head] = random((config.vocab_size, config.hidden_size)) * 4
    return tensors


def write_tiny(
    folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: object
) -> Path:
    """A Hugging Face folder with a tiny random Llama; `overrides` change its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {**TINY_CONFIG, **overrides}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    tensors = tiny_tensors(ModelConfig.from_hf(raw, {}), seed)
    save_file({k: v.to(dtype) for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def write_tiny_checkpoint() -> Callable[..., Path]:
    """`write_tiny` itself: test modules cannot import this one."""
    return write_tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder))


@pytest.fixture(scope="session")
def tiny_bfloat16(tiny_folder: Path) -> LoadedModel:
    """The same for the native backend, which reads the layers when it packs them."""
    return load_model(str(tiny_folder), dtype="bfloat16", layers_at_use=True)


@pytest.fixture(scope="session")
def demo_model() -> LoadedModel:
    return load_model(DEMO_MODEL)


@pytest.fixture(scope="session")
def demo_bfloat16() -> LoadedModel:
    return load_model(DEMO_MODEL, dtype="bfloat16", layers_at_use=True)


def add_biases(model: LoadedModel) -> LoadedModel:
    """With random biases of the projections after attention and of the feed-forwards, as pruning adds them."""
    generator = torch.Generator().manual_seed(4)
    layers = [
        replace(layer, bo=own[0], bd=own[1])
        for layer in model.weights.layers
        for own in [0.3 * torch.randn(2, model.config.hidden_size, generator=generator)]
    ]
    config = replace(model.config, output_bias=True, down_bias=True)
    return replace(model, config=config, weights=replace(model.weights, layers=layers))


@pytest.fixture(scope="session")
def with_biases() -> Callable[[LoadedModel], LoadedModel]:
    """`add_biases` itself."""
    return add_biases


def with_low_rank(
    layer: LayerTensors, formats: LayerFormats, seed: int, size: float
) -> LayerTensors:
    """Random low-rank terms of the ranks of `formats`; of `size` 1 smaller than what they are added to."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "qkv": (("q", "k", "v"), formats.attention.rank),
        "output": (("output",), formats.attention.rank),
        "gate_up": (("gate", "up"), formats.gate_up.rank),
        "down": (("down",), formats.down.rank),
    }
    for basis, (names, rank) in parts.items():
        if not rank:
            continue
        for name in names:
            matrix = getattr(layer, name)
            rows, columns = matrix.codes.shape
            codes = torch.randint(0, 256, (rows, rank), generator=generator).to(torch.uint8)
            scales = (torch.rand(rows, generator=generator) * 0.004 * size * rank**-0.5).half()
            low_rank = replace(matrix, factors=Factors(codes, scales))
            layer = replace(layer, **{name: low_rank})
        values = torch.randn(rank, columns, generator=generator) * columns**-0.5
        layer = replace(layer, **{f"{basis}_basis": values.bfloat16()})
    return layer


def compress_to(
    source: Path,
    formats: DecoderFormats,
    out: Path,
    layers: int | None = None,
    low_rank: float = 1,
    texts: tuple[str, ...] = ("a hash",),
    biases: tuple[AddedBias, ...] = (),
) -> CompressedWeights:
    """What stands in the folder `out` then; with `layers` a run that was interrupted after so many, with
    `biases` random ones that the source does not have."""
    model = load_model(str(source), dtype="bfloat16", layers_at_use=True)
    weights = model.weights
    version = WITH_BIASES if biases else VERSION
    info = replace(
        first_info(model, {"name": "test"}, formats),
        texts=texts,
        format_version=version,
        added_biases=biases,
    )
    generator = torch.Generator().manual_seed(2)
    added = [
        {
            f"{name}_bias": torch.randn(model.config.hidden_size, generator=generator)
            for name in biases
        }
        for _ in weights.layers
    ]
    tensors = [
        replace(
            with_low_rank(quantize_layer(layer_tensors(layer), own, ""), own, index, low_rank),
            **added[index],
        )
        for index, layer in enumerate(weights.layers)
        for own in [formats.layer(index)]
    ]
    head = None if weights.lm_head is weights.embedding else weights.lm_head
    if formats.lm_head.quantized:
        head = quantize(weights.lm_head, formats.lm_head, "lm_head")
    ends = EndTensors(weights.embedding, weights.norm, head)
    writer = CheckpointWriter(out, info)
    done = writer.finished_layers()
    for index, layer in enumerate(tensors[:layers]):
        if index not in done:
            writer.write_layer(index, layer)
    if layers is None:
        writer.finish(ends)
    return CompressedWeights(writer.info, tensors, ends)


@pytest.fixture(scope="session")
def write_compressed() -> Callable[..., CompressedWeights]:
    """`compress_to` itself."""
    return compress_to


def index_for(model: LoadedModel, format: str, *, planes: bool) -> NeuronIndex:
    """As if calibrated: half of the neurons of a core, or some chosen for each token, among all or in a core.
    What it predicts is made up.
    """
    layers, neurons = model.config.num_layers, model.config.intermediate_size
    generator = torch.Generator().manual_seed(1)
    clusters = torch.rand(2, layers, neurons, generator=generator).half()
    shares = torch.linspace(0.4, 0.6, layers)
    factors = 0.5 + torch.rand(layers, neurons, generator=generator)
    low_rank = torch.randn(layers, 2, 3, model.config.hidden_size, generator=generator) * 0.05

    def by_token(choice: ChoiceKind, density: float, kl: float, **how: object) -> Setting:
        thresholds = torch.tensor([0.3, 0.02, 0.6]).repeat(layers, 1)
        return Setting(
            PolicyKind.TOKEN, density, kl, 2 * kl, 0.8, choice, thresholds=thresholds, **how
        )

    return NeuronIndex(
        index_key(model, format),
        prior=clusters.float().mean(dim=0),
        cluster_layer=layers - 1,
        centroids=torch.nn.functional.normalize(clusters[:, -1].float().sqrt(), dim=1),
        clusters=clusters,
        settings=(
            Setting(PolicyKind.CORE, 0.5, 0.4, 0.8, 0.6, shares=shares),
            by_token(ChoiceKind.GATE, 0.7, 0.1, correction=1),
            by_token(ChoiceKind.GATE, 0.4, 0.3, shares=shares.clone()),
            *([by_token(ChoiceKind.PLANES, 0.6, 0.08)] if planes else []),
        ),
        planes_factors=factors if planes else None,
        gate_factors=factors,
        corrections=([(a, b) for a, b in low_rank.bfloat16()],),
    )  # fmt: skip


@pytest.fixture(scope="session")
def index_file(
    tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`index_file("float32")` -> one for the tiny model with weights in that format, `planes=True`: whose
    gate and up are in two planes.
    """

    def write(format: str, *, planes: bool = False) -> Path:
        path = tmp_path_factory.mktemp("index") / "tiny.safetensors"
        write_index(path, index_for(tiny_model, format, planes=planes))
        return path

    return write


@pytest.fixture(scope="session")
def tiny_index(index_file: Callable[..., Path]) -> Path:
    """For the tiny model on the reference backend."""
    return index_file("float32")


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device cuda, computed by the emulator or by a GPU."""
    if request.param == "emulator":
        try:
            path = native.load("emulator")._name
        except native.NativeLibraryError as error:
            pytest.skip(str(error))
        monkeypatch.setenv(native.EMULATED, path)
    return "cuda"


EngineFactory = Callable[..., Engine]


@pytest.fixture
def tiny_engine(tiny_model: LoadedModel) -> EngineFactory:
    """`tiny_engine(max_running=…, …)`: an engine with settings of its own over the tiny model."""
    return lambda **settings: assemble_engine(tiny_model, tiny_settings(**settings)).engine


@pytest.fixture
def native_engine(tiny_bfloat16: LoadedModel) -> EngineFactory:
    """The same on the native backend."""

    def make(**settings: object) -> Engine:
        own = tiny_settings(**{"backend": "cpu", **settings})
        return assemble_engine(tiny_bfloat16, own).engine

    return make


def tiny_settings(**overrides: object) -> ServerSettings:
    defaults = {
        "backend": "reference",
        "port": 0,
        "metrics_port": 0,
        "threads": 1,
        "kv_cache_gib": 0.05,
        "drain_timeout": 5,
    }
    return ServerSettings(**{**defaults, **overrides})


ServerFactory = Callable[..., AbstractAsyncContextManager[Server]]


@pytest.fixture(scope="session")
def make_authority() -> type[Authority]:
    """`Authority` itself: `make_authority("name").issue(folder, "localhost")`."""
    return Authority


@pytest.fixture
def serving(tiny_model: LoadedModel) -> ServerFactory:
    """`async with serving(max_running=…, …) as server`: over the tiny model, or another `model=`."""
    small = {"kv_cache_gib": 0.004}  # 16 contexts; a large cache takes longer to clear than to use
    return lambda model=tiny_model, **settings: running_server(model, **{**small, **settings})


@asynccontextmanager
async def running_server(model: LoadedModel, **settings: object) -> AsyncIterator[Server]:
    """A real server over `model` on free ports of the loopback interface."""
    merged = tiny_settings(**settings)
    built = assemble_engine(model, merged)
    server = Server(built.engine, built.model_name, merged)
    await server.start()
    try:
        yield server
    finally:
        await server.drain_and_stop()
