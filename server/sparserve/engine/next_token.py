"""From a row of logits to a choice's next token, its text, and maybe its end."""

from __future__ import annotations

import math
from collections.abc import Set

from sparserve.engine.logits import LogitAdjuster
from sparserve.engine.request import Finish, FinishReason, GeneratedToken
from sparserve.engine.sampler import Row, adjusted_row, candidates_for, generated_token, sample
from sparserve.engine.sequence import Sequence
from sparserve.errors import InvalidRequest


def needed_candidates(sequence: Sequence, vocab_size: int) -> int:
    """Candidates that `draw` depends on for the next token; 0: the whole row."""
    request = sequence.request
    if request.output.wants_logprobs or not sequence.adjuster.is_idle:
        return 0
    return candidates_for(request.sampling, vocab_size)


def draw(sequence: Sequence, row: Row) -> GeneratedToken:
    """The next token of a sequence. Raises InvalidRequest where its request forbids every token, and
    FloatingPointError where the model's output is not finite (float16 overflows, damaged weights).
    """
    step = len(sequence.output_token_ids)
    token_id = _choose(sequence, sequence.adjuster, row, step)
    output = sequence.request.output
    if not output.wants_logprobs:
        return GeneratedToken(token_id)
    return generated_token(row, token_id, output.top_logprobs)


def draft(sequence: Sequence, row: Row) -> None:
    """Add to its drafts the token that `draw` would take if the drafts before it were generated; the sequence stays as it
    is. What no token can be drawn from ends the drafts: dense logits may be another matter.
    """
    speculation = sequence.speculation
    assert speculation is not None
    adjuster = speculation.adjuster(sequence.adjuster)
    step = len(sequence.output_token_ids) + len(speculation.drafts)
    try:
        speculation.drafts.append(_choose(sequence, adjuster, row, step))
        if adjuster.is_finished:
            speculation.end()
    except (InvalidRequest, FloatingPointError):
        speculation.end()


def _choose(sequence: Sequence, adjuster: LogitAdjuster, row: Row, step: int) -> int:
    """The `step`-th token, which `adjuster` accepts. Raises as `draw`."""
    if not row.head_only and not math.isfinite(row.log_normalizer_1):
        raise FloatingPointError("the model's logits are not finite")
    sampling, chosen_from = sequence.request.sampling, row
    if not adjuster.is_idle:
        chosen_from = adjusted_row(adjuster.adjust(row.full_logits()), sampling.softmax_temperature)
        if not math.isfinite(chosen_from.log_normalizer):
            raise InvalidRequest(
                "sampling",
                f"no token is left to choose from after {step} tokens: allowed_token_ids, min_tokens "
                "and the constraint exclude each other here",
            )
    token_id = sample(chosen_from, sampling, sequence.seed, sequence.choice, step)
    adjuster.accept(token_id)
    return token_id


def continue_text(
    sequence: Sequence, token_id: int, eos_token_ids: Set[int], max_context: int
) -> tuple[str, Finish | None]:
    """The text that a token, now in the sequence's output, completes; and the end, where this is it."""
    stopping, adjuster = sequence.request.stopping, sequence.adjuster
    is_eos = token_id in eos_token_ids and not stopping.ignore_eos
    if adjuster.may_end and (is_eos or token_id in stopping.stop_token_ids):
        text = sequence.detokenizer.push(token_id)[0] if stopping.include_stop else ""
        reason = FinishReason.STOP_EOS if is_eos else FinishReason.STOP_TOKEN
        return text + sequence.detokenizer.flush(), sequence.finish(reason, stop_token_id=token_id)
    text, stop = sequence.detokenizer.push(token_id, may_stop=adjuster.may_end)
    if stop is not None:
        return text, sequence.finish(FinishReason.STOP_STRING, stop_string=stop)
    end = _end_after(sequence, max_context)
    if end is None:
        return text, None
    return text + sequence.detokenizer.flush(), sequence.finish(end)


def _end_after(sequence: Sequence, max_context: int) -> FinishReason | None:
    """Why no token follows the last one, if none does."""
    if sequence.adjuster.is_finished:
        return FinishReason.STOP_EOS
    generated = len(sequence.output_token_ids)
    if generated >= sequence.max_tokens:
        return FinishReason.LENGTH
    if sequence.prompt_len + generated >= max_context:
        return FinishReason.CONTEXT
    return None
