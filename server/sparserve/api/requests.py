"""Protocol messages to the engine's types: every field is taken, or refused by its name."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Value

from sparse_kernels.choice import ChoiceKind, Score
from sparserve.engine.chat import Conversation
from sparserve.engine.constraint import Constraint, ConstraintKind
from sparserve.engine.policies import Policies
from sparserve.engine.request import (
    GenerationRequest,
    OutputParams,
    SamplingParams,
    StoppingParams,
)
from sparserve.engine.tokenizer import TextTokenizer
from sparserve.errors import InvalidRequest, NotBuiltYet, PromptTooLong, UnknownModel
from sparserve.sparsity.policy import DraftKind, Policy, PolicyKind, PredictorKind
from sparserve.v1 import inference_pb2 as pb

T = TypeVar("T")

POLICIES = {
    pb.SPARSITY_POLICY_DENSE: PolicyKind.DENSE,
    pb.SPARSITY_POLICY_CORE: PolicyKind.CORE,
    pb.SPARSITY_POLICY_TOKEN: PolicyKind.TOKEN,
    pb.SPARSITY_POLICY_EXACT: PolicyKind.EXACT,
    pb.SPARSITY_POLICY_AUTO: PolicyKind.AUTO,
}
CHOICES = {
    pb.SPARSITY_CHOICE_UNSPECIFIED: None,
    pb.SPARSITY_CHOICE_PLANES: ChoiceKind.PLANES,
    pb.SPARSITY_CHOICE_GATE: ChoiceKind.GATE,
}
PREDICTORS = {
    pb.SPARSITY_PREDICTOR_UNSPECIFIED: PredictorKind.AUTO,
    pb.SPARSITY_PREDICTOR_STABILITY: PredictorKind.STABILITY,
    pb.SPARSITY_PREDICTOR_SIMILARITY: PredictorKind.SIMILARITY,
    pb.SPARSITY_PREDICTOR_AUTO: PredictorKind.AUTO,
}
SCORES = {
    pb.SPARSITY_SCORE_UNSPECIFIED: Score.NORM,
    pb.SPARSITY_SCORE_NORM: Score.NORM,
    pb.SPARSITY_SCORE_COUNT: Score.COUNT,
    pb.SPARSITY_SCORE_SIGNED_COUNT: Score.SIGNED_COUNT,
}
DRAFTS = {
    pb.SPARSITY_DRAFT_UNSPECIFIED: None,
    pb.SPARSITY_DRAFT_CORE: DraftKind.CORE,
    pb.SPARSITY_DRAFT_TOKEN: DraftKind.TOKEN,
    pb.SPARSITY_DRAFT_NGRAM: DraftKind.NGRAM,
}
MAX_USER_LENGTH = 256
MAX_MESSAGES = 4096
MAX_TOOLS = 256
MAX_NESTING = 32  # of lists and objects inside tools and template arguments


def check_model(name: str, served: str) -> None:
    """A request may name the model, or leave it empty. Raises UnknownModel."""
    if name and name != served:
        raise UnknownModel(name, served)


def parse_request(
    message: pb.GenerateRequest | pb.ChatRequest,
    tokenizer: TextTokenizer,
    max_prompt_tokens: int,
    policies: Policies,
    seconds_left: float | None,
    arrival: float,
) -> GenerationRequest:
    """All but the constraint, which takes longer to compile.

    Raises InvalidRequest, PromptTooLong, ChatUnavailable, SparsityUnavailable or NotBuiltYet, which name
    the field.
    Renders and tokenizes, so a long prompt takes milliseconds: call it off the event loop.
    """
    if message.adapter:
        raise NotBuiltYet("adapter", "LoRA adapters are not served; merge them into the model")
    if len(message.user) > MAX_USER_LENGTH:
        raise InvalidRequest(
            "user", f"user has {len(message.user)} characters, the limit is {MAX_USER_LENGTH}"
        )
    prompt = _prompt(message, tokenizer, max_prompt_tokens)
    return GenerationRequest(
        request_id=message.request_id or uuid.uuid4().hex,
        sampling=_sampling(message.sampling),
        stopping=_stopping(message.stopping),
        output=_output(message.response),
        policy=_policy(message.sparsity, policies, len(prompt)),
        report_statistics=message.sparsity.report,
        cache_salt=message.cache_salt,
        priority=_given(message, "priority", 0),
        deadline=None if seconds_left is None else arrival + seconds_left,
        arrival=arrival,
        prompt_token_ids=prompt,
    )


def conversation_of(message: pb.ChatRequest) -> Conversation:
    """What makes the prompt of a chat. Raises InvalidRequest."""
    if not 1 <= len(message.messages) <= MAX_MESSAGES:
        raise InvalidRequest(
            "messages", f"{len(message.messages)} messages given; 1 to {MAX_MESSAGES} are allowed"
        )
    if len(message.tools) > MAX_TOOLS:
        raise InvalidRequest("tools", f"{len(message.tools)} tools given, the limit is {MAX_TOOLS}")
    return Conversation(
        messages=[_chat_message(m, f"messages[{i}]") for i, m in enumerate(message.messages)],
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(message.tools)],
        continue_final_message=message.continue_final_message,
        arguments={
            name: _plain_value(value, f"template_arguments.{name}")
            for name, value in message.template_arguments.fields.items()
        },
    )


def constraint_of(message: pb.GenerateRequest | pb.ChatRequest) -> Constraint | None:
    """What the text must look like, not compiled yet. Raises InvalidRequest."""
    if not message.HasField("constraint"):
        return None
    constraint = message.constraint
    match constraint.WhichOneof("kind"):
        case "json_schema":
            return Constraint(ConstraintKind.JSON_SCHEMA, constraint.json_schema)
        case "regex":
            return Constraint(ConstraintKind.REGEX, constraint.regex)
        case "grammar":
            return Constraint(ConstraintKind.GRAMMAR, constraint.grammar)
        case "choice":
            if not constraint.choice.options:
                raise InvalidRequest("constraint.choice", "no options to choose from are given")
            options = json.dumps(list(constraint.choice.options), ensure_ascii=False)
            return Constraint(ConstraintKind.CHOICE, options)
        case "json_object" if constraint.json_object:
            return Constraint(ConstraintKind.JSON_OBJECT)
        case "json_object":
            raise InvalidRequest(
                "constraint.json_object", "json_object is false; set it, or leave constraint out"
            )
    raise InvalidRequest(
        "constraint",
        "the constraint is empty; set json_schema, regex, grammar, choice or json_object",
    )


def _sampling(message: pb.Sampling) -> SamplingParams:
    return SamplingParams(
        temperature=_given(message, "temperature", 1.0),
        top_k=message.top_k,
        top_p=_given(message, "top_p", 1.0),
        min_p=message.min_p,
        typical_p=_given(message, "typical_p", 1.0),
        repetition_penalty=_given(message, "repetition_penalty", 1.0),
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed if message.HasField("seed") else None,
        n=_given(message, "n", 1),
        logit_bias=tuple(sorted(message.logit_bias.items())),
        allowed_token_ids=tuple(message.allowed_token_ids),
    )


def _stopping(message: pb.Stopping) -> StoppingParams:
    return StoppingParams(
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        min_tokens=message.min_tokens,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop=message.include_stop,
    )


def _output(message: pb.ResponseOptions) -> OutputParams:
    asks_prompt = message.HasField("prompt_logprobs")
    return OutputParams(
        logprobs=message.logprobs,
        top_logprobs=message.top_logprobs,
        prompt_logprobs=message.prompt_logprobs if asks_prompt else None,
        skip_special_tokens=_given(message, "skip_special_tokens", True),
    )


def _prompt(
    message: pb.GenerateRequest | pb.ChatRequest, tokenizer: TextTokenizer, limit: int
) -> tuple[int, ...]:
    if isinstance(message, pb.ChatRequest):
        return tokenizer.encode_chat(tokenizer.render_chat(conversation_of(message)), limit)
    match message.WhichOneof("prompt"):
        case "text":
            return tokenizer.encode(message.text, limit)
        case "token_ids":
            ids = message.token_ids.ids
            if len(ids) > limit:  # before a look at each of them: there can be millions
                text = f"the prompt has {len(ids)} tokens, the limit is {limit}"
                raise PromptTooLong("token_ids", text, limit)
            return tuple(ids)
    raise InvalidRequest("prompt", "the request has no prompt; set text or token_ids")


def _policy(message: pb.Sparsity, policies: Policies, prompt_tokens: int) -> Policy:
    """Complete; ranges that depend on the model are the chooser's to check."""
    density, target_kl = _given(message, "density", None), _given(message, "target_kl", None)
    if density is not None and not 0 < density <= 1:  # also false for NaN
        raise InvalidRequest("sparsity.density", f"density is {density:g}; it must be in (0, 1]")
    if target_kl is not None and not (target_kl >= 0 and math.isfinite(target_kl)):
        raise InvalidRequest(
            "sparsity.target_kl", f"target_kl is {target_kl:g}; it must be finite and >= 0"
        )
    # One token tells nothing of its neurons: who asked for no policy is not refused for the server's.
    default = policies.default if prompt_tokens > 1 else PolicyKind.DENSE
    kinds = {pb.SPARSITY_POLICY_UNSPECIFIED: default, **POLICIES}
    return policies.complete(
        Policy(
            kind=_member(message, "policy", kinds),
            density=_number(density),
            target_kl=_number(target_kl),
            choice=_member(message, "choice", CHOICES),
            core_density=_number(_given(message, "core_density", None)),
            predictor=_member(message, "predictor", PREDICTORS),
            score=_member(message, "score", SCORES),
            alpha=_number(_given(message, "alpha", None)),
            first_layer=_given(message, "first_layer", None),
            last_layer=_given(message, "last_layer", None),
            refresh_interval=message.refresh_interval,
            draft=_member(message, "draft", DRAFTS),
            draft_tokens=_given(message, "draft_tokens", None),
        )
    )


def _member(message: pb.Sparsity, name: str, values: Mapping[Any, T]) -> T:
    number = getattr(message, name)
    if number not in values:
        raise InvalidRequest(f"sparsity.{name}", f"sparsity.{name} {number} is not in the enum")
    return values[number]


def _number(value: float | None) -> float | None:
    """What the caller wrote: a float32 of 0.7 is 0.699999988."""
    return None if value is None else float(f"{value:.7g}")


def _chat_message(message: pb.ChatMessage, path: str) -> dict[str, Any]:
    if not message.role:
        raise InvalidRequest(f"{path}.role", "the message has no role; set it, such as to user")
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.HasField("name"):
        plain["name"] = message.name
    if message.HasField("tool_call_id"):
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            _tool_call(call, f"{path}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)
        ]
    return plain


def _tool_call(call: pb.ToolCall, path: str) -> dict[str, Any]:
    arguments = _json_object(call.arguments or "{}", f"{path}.arguments")
    plain = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return {"id": call.id, **plain} if call.id else plain


def _tool(tool: pb.Tool, path: str) -> dict[str, Any]:
    if not tool.name:
        raise InvalidRequest(f"{path}.name", "the tool has no name")
    nothing = '{"type": "object", "properties": {}}'
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": _json_object(tool.parameters or nothing, f"{path}.parameters"),
    }
    return {"type": "function", "function": function}


def _json_object(text: str, path: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(path, f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(path, f"{path} is a JSON {type(value).__name__}; it must be an object")
    _check_nesting(value, path)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_nesting(value: Any, path: str) -> None:
    level: Sequence[Any] = [value]
    for _ in range(MAX_NESTING + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, (dict, list)):
                inner += item.values() if isinstance(item, dict) else item
        if not inner:
            return
        level = inner
    raise InvalidRequest(path, f"{path} is nested deeper than {MAX_NESTING} levels")


def _plain_value(value: Value, path: str, depth: int = 0) -> Any:
    """A value as `json.loads` would give it: whole numbers are integers."""
    if depth > MAX_NESTING:
        raise InvalidRequest(path, f"{path} is nested deeper than {MAX_NESTING} levels")
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            if not math.isfinite(number):
                raise InvalidRequest(path, f"{path} holds {number}, which is no JSON number")
            return int(number) if number.is_integer() and abs(number) < 2**53 else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "list_value":
            return [_plain_value(item, path, depth + 1) for item in value.list_value.values]
        case "struct_value":
            fields: Mapping[str, Value] = value.struct_value.fields
            return {name: _plain_value(item, path, depth + 1) for name, item in fields.items()}
    return None


def _given(message: Message, name: str, default: T) -> T:
    value: T = getattr(message, name)
    return value if message.HasField(name) else default
