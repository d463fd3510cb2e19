"""What the backend is told of a sequence that is in a step."""

from __future__ import annotations

from sparse_kernels.choice import ALL_NEURONS, NeuronChoice, Score
from sparserve.engine.next_token import needed_candidates
from sparserve.engine.scheduler import Scheduled, Work
from sparserve.model.backend import Phase, SequenceInput


def input_of(item: Scheduled, vocab_size: int) -> SequenceInput:
    """For the next forward."""
    sequence = item.sequence
    start, count = item.start, item.count
    in_prompt = item.phase is Phase.PREFILL
    kind = None
    if in_prompt:
        kind = sequence.wanted_statistics
    elif item.work is Work.REFRESH and sequence.neurons.needs_statistics:
        kind = sequence.neurons.statistics_kind
    targets: tuple[int, ...] = ()
    if in_prompt and sequence.wants_prompt_logprobs:
        targets = sequence.request.prompt_token_ids[start + 1 : start + count + 1]
    return SequenceInput(
        token_ids=sequence.tokens(start, count),
        start=start,
        block_table=sequence.block_table,
        phase=item.phase,
        choice=_neurons(item),
        output_offsets=item.outputs,
        temperature=sequence.request.sampling.softmax_temperature,
        needed=needed_candidates(sequence, vocab_size) if item.outputs else 0,
        collect_statistics=kind is not None,
        score=kind.score if kind else Score.NORM,
        score_share=kind.share if kind else 1.0,
        targets=targets,
        num_top=sequence.request.output.prompt_logprobs or 0,
    )


def _neurons(item: Scheduled) -> NeuronChoice:
    """Those that the step reads."""
    neurons = item.sequence.neurons
    if item.work is Work.DRAFT:
        assert neurons.drafting is not None
        return neurons.drafting.choice
    return neurons.choice if item.work is Work.DECODE else ALL_NEURONS
