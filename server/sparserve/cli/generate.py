"""`sparserve generate`."""

from __future__ import annotations

import uuid
from typing import Annotated

import typer

from sparserve.cli.options import with_settings
from sparserve.cli.output import err, out, progress_bars
from sparserve.client import Client
from sparserve.config import EngineSettings
from sparserve.engine.engine import Engine
from sparserve.engine.factory import build_engine
from sparserve.engine.request import Finish, GenerationRequest, SamplingParams, StoppingParams
from sparserve.errors import ConfigError


@with_settings(EngineSettings)
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    settings: EngineSettings,
    server: Annotated[
        str | None,
        typer.Option(help="host:port of a running server; without it the model runs here."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Wrap the prompt in the model's chat template (not with --server)."
        ),
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy; at most 2.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the fewest tokens that hold this probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text. Default: random.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given again.")
    ] = None,
    report_neurons: Annotated[
        bool,
        typer.Option(
            "--report-neurons", help="Tell how few neurons carry the prompt's activations."
        ),
    ] = False,
) -> None:
    """Continue a prompt, here or on a server, printing the text as it is made."""
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    stops = tuple(stop or ())
    if server is not None:
        here_only = sorted(settings.model_fields_set | ({"chat"} if chat else set()))
        if here_only:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in here_only)
            raise ConfigError(
                f"{flags}: for a model that runs here; a --server has its own settings"
            )
        _generate_remote(server, prompt, max_tokens, stops, sampling, report_neurons)
        return
    with progress_bars() as bars:
        engine = build_engine(
            settings, on_tensor=bars.on_tensor, on_download=bars.on_download
        ).engine
    if chat:
        prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    request = GenerationRequest(
        request_id=uuid.uuid4().hex,
        prompt_token_ids=engine.tokenizer.encode(prompt, engine.limits.max_context - 1),
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
        stopping=StoppingParams(max_tokens=max_tokens, stop=stops),
        report_statistics=report_neurons,
    )
    finish = _generate_here(engine, request)
    _summary(
        finish.reason.value, finish.prompt_tokens, finish.completion_tokens,
        finish.timings.ttft, finish.timings.decode, finish.core_share,
    )  # fmt: skip


def _generate_here(engine: Engine, request: GenerationRequest) -> Finish:
    engine.validate(request)
    engine.add(request)
    finish = None
    while finish is None:
        for update in engine.step():
            _print_text(update.text)
            finish = update.finish
    if finish.error is not None:
        raise finish.error
    return finish


def _generate_remote(
    target: str,
    prompt: str,
    max_tokens: int,
    stop: tuple[str, ...],
    sampling: dict[str, float | int | None],
    report_neurons: bool,
) -> None:
    with Client(target) as client:
        for delta in client.stream(
            prompt,
            max_tokens=max_tokens,
            stop=stop,
            report_neurons=report_neurons or None,
            **sampling,
        ):
            _print_text(delta.text)
            if (result := delta.result) is not None:
                _summary(
                    result.finish_reason.lower(), result.prompt_tokens, result.completion_tokens,
                    result.ttft_seconds, result.decode_seconds, result.core_share,
                )  # fmt: skip


def _print_text(text: str) -> None:
    out.out(text, end="", highlight=False)
    out.file.flush()


def _summary(
    reason: str, prompt: int, completion: int, ttft: float, decode: float, core_share: float | None
) -> None:
    out.out("")
    speed = f", {(completion - 1) / decode:.1f} tokens/s" if decode else ""
    err.print(
        f"[dim]{reason}: {prompt} prompt + {completion} new tokens, TTFT {ttft * 1000:.0f} ms{speed}[/]"
    )
    if core_share is not None:
        err.print(
            f"[dim]{core_share:.1%} of the neurons carry 90 % of this prompt's activations[/]"
        )
