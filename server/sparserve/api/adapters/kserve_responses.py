"""What the engine tells of a request, as tensors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from sparserve.api.adapters.kserve_model import VERSION
from sparserve.api.adapters.kserve_requests import InferRequest
from sparserve.api.adapters.kserve_tensors import OUTPUTS, Element, add_output
from sparserve.api.responses import note_in_log
from sparserve.engine.request import Finish, Update
from sparserve.metrics import VLLM_FINISHED_REASONS
from sparserve.protocols import kserve_pb2 as pb

_FINAL = "triton_final_response"
_INDEX = "index"


@dataclass(slots=True)
class _Choice:
    """What was generated of a choice and not told yet."""

    text: list[str]
    num_tokens: int = 0
    cumulative_logprob: float = 0.0  # of all tokens, told or not
    finish: Finish | None = None

    def add(self, update: Update) -> None:
        self.text.append(update.text)
        self.num_tokens += len(update.tokens)
        self.cumulative_logprob += sum(token.logprob or 0.0 for token in update.tokens)
        self.finish = update.finish

    def told(self) -> None:
        self.text, self.num_tokens = [], 0


class Responder:
    """Makes the answer to one request, whole or as a stream, out of its updates."""

    def __init__(self, request: InferRequest, model_name: str, prompt_tokens: int) -> None:
        self._request = request
        self._model_name = model_name
        self._prompt_tokens = prompt_tokens
        prefix = [request.text] if request.prepends_input else []
        choices = request.message.sampling.n or 1
        self._choices = [_Choice([*prefix]) for _ in range(choices)]

    async def whole(self, updates: AsyncIterator[Update]) -> pb.ModelInferResponse:
        """Reads `updates` to their end."""
        async for update in updates:
            self._add(update)
        return self._response(self._choices)

    async def stream(self, updates: AsyncIterator[Update]) -> AsyncIterator[pb.ModelInferResponse]:
        """Ends with a response that says so; an empty one where the request wants that."""
        empty_final = self._request.wants_empty_final
        if self._request.stream:
            async for update in updates:
                choice = self._add(update)
                response = self._response([choice])
                choice.told()
                if len(self._choices) > 1:
                    response.parameters[_INDEX].int64_param = update.index
                is_last = all(choice.finish is not None for choice in self._choices)
                response.parameters[_FINAL].bool_param = is_last and not empty_final
                yield response
        else:
            response = await self.whole(updates)
            response.parameters[_FINAL].bool_param = not empty_final
            yield response
        if empty_final:
            response = self._empty()
            response.parameters[_FINAL].bool_param = True
            yield response

    def _add(self, update: Update) -> _Choice:
        note_in_log(update)
        choice = self._choices[update.index]
        choice.add(update)
        return choice

    def _response(self, choices: Sequence[_Choice]) -> pb.ModelInferResponse:
        response = self._empty()
        for spec in OUTPUTS:
            if spec.name in self._request.outputs:
                add_output(response, spec, self._values(spec.name, choices), self._request.raw)
        return response

    def _values(self, name: str, choices: Sequence[_Choice]) -> list[Element]:
        match name:
            case "text_output":
                return ["".join(choice.text).encode() for choice in choices]
            case "finish_reason":
                return [_reason(choice.finish) for choice in choices]
            case "cumulative_logprob":
                return [choice.cumulative_logprob for choice in choices]
            case "num_input_tokens":
                return [self._prompt_tokens]
        return [choice.num_tokens for choice in choices]

    def _empty(self) -> pb.ModelInferResponse:
        return pb.ModelInferResponse(
            model_name=self._model_name, model_version=VERSION, id=self._request.id
        )


def _reason(finish: Finish | None) -> bytes:
    """vLLM's word for it; "None", as Triton writes it, before the end."""
    return (VLLM_FINISHED_REASONS[finish.reason.value] if finish else "None").encode()
