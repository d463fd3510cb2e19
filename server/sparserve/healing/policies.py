"""From the words of a policy to what a student learns through."""

from __future__ import annotations

from dataclasses import replace

from sparse_kernels.choice import ChoiceKind
from sparse_kernels.formats import DecoderFormats
from sparserve.bench.policies import PolicySpec
from sparserve.errors import ConfigError
from sparserve.healing.by_token import Gates
from sparserve.healing.planes import Planes
from sparserve.healing.through import Through, core_of
from sparserve.model.backend import mean_neuron_bytes
from sparserve.model.loader import LoadedModel
from sparserve.model.weight_bytes import layer_neuron_bytes
from sparserve.sparsity.policy import Policy, PolicyKind, PredictorKind


def parse_through(words: str, model: LoadedModel, formats: DecoderFormats) -> Through:
    """`formats`: those that `model` will be served in. Raises ConfigError of a policy that cannot be learned
    through."""
    policy = PolicySpec.parse(words).policy
    if policy.kind is PolicyKind.DENSE:
        return Through()
    density = policy.density
    plain = Policy(policy.kind, density)
    # Without an index a core's scores are the prompt's own, unless similarity is asked for.
    by_prompt = replace(plain, predictor=PredictorKind.STABILITY)
    if policy.kind is PolicyKind.CORE and density is not None and policy in (plain, by_prompt):
        return core_of(density, model.config)
    by_any = replace(policy, choice=None)
    if policy.kind is PolicyKind.TOKEN and density is not None and by_any == plain:
        return _by_token(words, policy.choice, density, model, formats)
    raise ConfigError(
        f"through is {words!r}, and healing goes through dense, core:D, token:D/planes or token:D/gate, without further "
        "options; what is healed for one of them tolerates other choices better, too"
    )


def _by_token(
    words: str,
    choice: ChoiceKind | None,
    density: float,
    model: LoadedModel,
    formats: DecoderFormats,
) -> Through:
    """Of a choice that is left open by planes, where there are some."""
    sizes = layer_neuron_bytes(model.config, formats)
    kind = ChoiceKind.GATE if choice is ChoiceKind.GATE else ChoiceKind.PLANES
    if kind not in sizes:
        raise ConfigError(
            f"through is {words!r}, and tokens choose by planes of gate and up; say which will be served, as in "
            "--dtype int8 --weight-planes 4+4, or in a recipe gate_up with low_bits; or let them choose by "
            f"gate, token:{density:g}/gate"
        )
    looked, *rest = own = mean_neuron_bytes(sizes[kind])
    reach = (density * sum(own) - looked) / sum(rest)
    if reach <= 0:
        raise ConfigError(
            f"through is {words!r}, and looking at every neuron takes {looked / sum(own):.2f} of the bytes; take more"
        )
    if kind is ChoiceKind.GATE:
        return Gates(own, min(reach, 1.0))
    return Planes(model, formats, own, min(reach, 1.0))
