"""Which neurons one choice of a request uses while it is generated, and what that read and cost."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from sparse_kernels.choice import ALL_NEURONS as EVERY_NEURON
from sparse_kernels.choice import NeuronChoice, Score
from sparserve.engine.block_manager import ALL_NEURONS, Provenance, StatisticsKind
from sparserve.engine.request import SparsityReport
from sparserve.model.backend import BackendInfo, NeuronReads, Phase
from sparserve.sparsity.chooser import ChoicePlan, Chosen
from sparserve.sparsity.core import coverage
from sparserve.sparsity.policy import DENSE, Policy
from sparserve.sparsity.statistics import NeuronStatistics, PromptStatistics

# Coverage so much below that of the prompt is drift; the second time in a row more is read, and from some
# density on all is.
DRIFT = 0.1
MORE_DENSITY = 0.1
DENSE_FROM = 0.9


class ChoiceState:
    """Dense until the prompt is in; `choose` then makes the set, which preemption does not change.

    Used on the engine thread only.
    """

    def __init__(
        self,
        plan: ChoicePlan,
        info: BackendInfo,
        replan: Callable[[Policy], ChoicePlan],
        first: ChoiceState | None = None,
    ) -> None:
        """`replan` is for what a drifting sequence needs more. `first` is the state of the request's first
        choice, where that alone gathers the prompt's statistics: its set is this one's.
        """
        self.plan = plan
        self.chosen: Chosen | None = None
        self.drafting: Chosen | None = None  # of EXACT, where the model drafts
        self.statistics_kind = _kind_of(plan)
        self.decoded = Provenance(Phase.DECODE, ALL_NEURONS)  # of the blocks that decoding writes
        self.fallbacks = 0
        self._policy = plan.policy.kind
        self._info = info
        self._replan = replan
        self._first = first if self.needs_statistics else None
        self._prompt: PromptStatistics | None = None  # kept where decoded tokens will be added
        self._prompts_own: Chosen | None = None
        self._text: PromptStatistics | None = None  # prompt and refreshed tokens
        self._refreshed: NeuronStatistics | None = None  # in the dense pass under way
        self._drifts = 0  # in a row
        self._passes = 0
        self._last_was_dense = False
        self._mlp_bytes = 0.0
        self._kv_bytes = 0.0
        self._tokens = 0
        self._dense_tokens = 0

    @property
    def needs_statistics(self) -> bool:
        return self.plan.score is not None

    @property
    def choice(self) -> NeuronChoice:
        """Of decoded tokens."""
        return EVERY_NEURON if self.chosen is None else self.chosen.choice

    def choose(self, prompt: PromptStatistics | None) -> None:
        """The prompt is in; `prompt` has its statistics where `needs_statistics`.

        Raises InvalidRequest of a prompt of one token where the policy needs more.
        """
        if self._first is not None:
            # Not the set that the first one has now: its own text may have changed it.
            chosen, self._prompt = self._first._prompts_own, self._first._prompt
            self.drafting = self._first.drafting
            assert chosen is not None, "the others wait for the first one's prefill"
        else:
            if self.plan.policy.refresh_interval:
                self._prompt = prompt
            if self.plan.drafts is not None:
                self.drafting = self.plan.drafts.choose(prompt)
            chosen = self.plan.choose(prompt)
        self._prompts_own = chosen
        self._take(chosen)

    def take_refreshed(self, start: int, parts: Sequence[NeuronStatistics]) -> None:
        """What a dense pass told of decoded tokens from position `start` on, where `needs_statistics`: the first
        after the prompt, or the next after those taken before.
        """
        if self._text is None:
            assert self._prompt is not None, "kept for this"
            self._text = self._prompt.fork()
        for part in parts:
            if self._refreshed is None:
                self._refreshed = replace(part)  # `_text` adds to its own
            else:
                self._refreshed += part
        self._text.extend(start, parts)

    def refreshed(self) -> None:
        """A dense pass is over: from now on the set is that of prompt and output so far. Where the last one held
        much less of the new tokens' score than of those it was made of, twice in a row, it is larger.
        """
        tokens, self._refreshed = self._refreshed, None
        if tokens is None or self.chosen is None:
            return
        members = self.chosen.choice.members(tokens.sums.shape[1])
        expected = self.chosen.coverage
        if members is not None and expected is not None:
            drifts = coverage(tokens.scores(), members) < expected - DRIFT
            self._drifts = self._drifts + 1 if drifts else 0
        if self._drifts == 2:
            self._drifts = 0
            self._read_more()
        self._take(self.plan.choose(self._text))

    def _read_more(self) -> None:
        density = round(self.plan.density + MORE_DENSITY, 6)  # .8 + .1 is less than .9
        if density >= DENSE_FROM:
            self.plan = self._replan(DENSE)
            self.fallbacks += 1
        else:
            self.plan = self._replan(replace(self.plan.policy, density=density, target_kl=None))

    def _take(self, chosen: Chosen) -> None:
        self.chosen = chosen
        self.decoded = Provenance(Phase.DECODE, neurons_name(chosen.choice))

    def count_pass(self, choice: NeuronChoice, reads: NeuronReads | None, context: int) -> None:
        """One forward of decoded tokens, drafts or refreshed ones, over `context` positions of KV. Without
        `reads` it used all neurons, which are read once however many tokens there are.
        """
        self._passes += 1
        self._last_was_dense = reads is None
        self._kv_bytes += context * self._info.kv_bytes_per_token
        self._mlp_bytes += self._info.mlp_bytes if reads is None else self._bytes_of(choice, reads)

    def count_token(self) -> None:
        """The last pass gave a token."""
        self._tokens += 1
        self._dense_tokens += self._last_was_dense

    def _bytes_of(self, choice: NeuronChoice, reads: NeuronReads) -> float:
        neurons = self._info.read_bytes(choice.kind, reads.counts)
        index = self.plan.index
        corrected = 0 if index is None else index.correction_bytes(choice.correction)
        return neurons + reads.tokens * corrected

    def report(self, *, refreshes: int, drafted: int, accepted: int) -> SparsityReport:
        chosen, info = self.chosen, self._info
        return SparsityReport(
            policy=self._policy,
            expected_density=self.plan.density,
            dense_mlp_bytes=info.mlp_bytes,
            mlp_bytes=self._mlp_bytes,
            other_bytes=self._kv_bytes + self._passes * (info.weight_bytes - info.mlp_bytes),
            decoded_tokens=self._tokens,
            dense_tokens=self._dense_tokens,
            refreshes=refreshes,
            drafted_tokens=drafted,
            accepted_tokens=accepted,
            fallbacks=self.fallbacks,
            predicted_kl=self.plan.predicted_kl,
            coverage=None if chosen is None else chosen.coverage,
            stable=None if chosen is None else chosen.stable,
        )


def _kind_of(plan: ChoicePlan) -> StatisticsKind:
    if plan.score in (None, Score.NORM):
        return StatisticsKind()
    return StatisticsKind(plan.score, plan.score_share)


def neurons_name(choice: NeuronChoice) -> str:
    """The same for equal choices alone; see Provenance."""
    if choice.is_dense:
        return ALL_NEURONS
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (choice.core, choice.thresholds):
        digest.update(b"-" if tensor is None else tensor.numpy().tobytes())
    kind = choice.kind.value if choice.kind else "core"
    return f"{kind}/{choice.correction}/{digest.hexdigest()}"
