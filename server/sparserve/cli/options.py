"""Command-line flags made from a settings model, so that each setting is described once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand, TyperGroup

from sparserve.cli.environment import check_environment
from sparserve.config import ServerSettings, Settings, load_settings

Policies = Annotated[
    str,
    typer.Option(
        metavar="POLICY,…",
        help="Which neurons decoded tokens use: dense; core:D, a set chosen from the prompt; token:D, a choice per "
        "token; core:N+token:D, one inside a core of the share N of all neurons; kl:K, what the index says costs a mean "
        "KL of K; auto; exact. D is the share of the feed-forward layers' bytes that a token reads. Options follow "
        "after slashes: planes or gate (what tokens choose by), refresh=16, stability, similarity or auto (where a "
        "core's scores come from), norm, count or signed_count (those scores), alpha=0.4 (of counts), layers=6-26 "
        "(others stay dense), draft=ngram, drafts=4. CoreInfer as published: "
        "core:0.4/stability/signed_count/alpha=0.4/layers=6-26.",
    ),
]
NO_VALUE = ""  # metavar of a flag that takes none: by itself typer shows <bool>


class Command(TyperCommand):
    """A command whose --help is a flag without a value too."""

    def get_help_option(self, ctx: Any) -> Any:
        return _without_value(super().get_help_option(ctx))


class Group(TyperGroup):
    """The same for a group of commands."""

    def get_help_option(self, ctx: Any) -> Any:
        return _without_value(super().get_help_option(ctx))


def _without_value(option: Any) -> Any:
    if option is not None:
        option.metavar = NO_VALUE
    return option


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file of settings, named as the flags with underscores."),
]


def with_settings(kind: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for every setting of `kind`; it is called with `settings=`.

    Precedence: flag, SPARSERVE_<NAME>, settings file (servers only), default.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            p
            for p in inspect.signature(command, eval_str=True).parameters.values()
            if p.name != "settings"
        ]
        flags = [_flag(name, field) for name, field in kind.model_fields.items()]
        switches = [name for name, field in kind.model_fields.items() if field.annotation is bool]
        negations = [_negation(name) for name in switches]
        config = [_config_flag()] if issubclass(kind, ServerSettings) else []

        def run(**values: Any) -> None:
            given = {flag.name: values.pop(flag.name) for flag in flags}
            for name in switches:
                if values.pop(f"no_{name}"):
                    given[name] = False
            path = values.pop("config", None)
            check_environment([name for name, value in given.items() if value is None])
            command(settings=load_settings(kind, given, path), **values)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([*own, *flags, *negations, *config])  # type: ignore[attr-defined]
        return run

    return decorate


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    kind: Any = field.annotation
    choices = [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
    help_text = " ".join(
        [
            *([f"One of {', '.join(choices)}."] if choices else []),
            str(field.description),
            *([f"--no-{name.replace('_', '-')} turns it off."] if kind is bool else []),
            f"[default: {field.default}] [env: SPARSERVE_{name.upper()}]",
        ]
    )
    metavar = NO_VALUE if kind is bool else f"<{'choice' if choices else kind.__name__}>"
    option = typer.Option(
        f"--{name.replace('_', '-')}", help=help_text, metavar=metavar, show_default=False
    )
    annotation: Any = bool if kind is bool else str  # parsed like the environment and the file
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[annotation | None, option],
    )


def _negation(name: str) -> inspect.Parameter:
    # Typer's own --x/--no-x takes a column of its own, which leaves too little for the texts.
    option = typer.Option(f"--no-{name.replace('_', '-')}", hidden=True)
    return inspect.Parameter(
        f"no_{name}",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, option],
    )


def _config_flag() -> inspect.Parameter:
    return inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigFile
    )
