"""Settings out of flags, the environment and a YAML file.

Precedence: flag, then `SPARSERVE_<NAME>` in the environment, then the YAML file, then the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, cast

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from sparserve.config.engine import EngineSettings
from sparserve.errors import ConfigError

Settings = TypeVar("Settings", bound=EngineSettings)


def load_settings(
    kind: type[Settings], flags: Mapping[str, object], config: Path | None = None
) -> Settings:
    """Merge flags (None: not given), environment, YAML file and defaults into `kind`.

    `model_fields_set` of the result names what the flags set. Raises ConfigError that names each wrong setting, its value and what is allowed.
    """
    from_file = {} if config is None else _read(config)

    class Sourced(kind):  # type: ignore[misc, valid-type]
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings, env_settings, InitSettingsSource(settings_cls, from_file))

    try:
        merged = Sourced(**{name: value for name, value in flags.items() if value is not None})
        given = {name for name, value in flags.items() if value is not None}
        return cast(Settings, kind.model_construct(given, **merged.model_dump()))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem) for problem in error.errors())) from error
    except SettingsError as error:
        raise ConfigError(f"the settings cannot be read: {error}") from error


def _read(config: Path) -> dict[str, object]:
    """The settings file's names and values, not checked yet. Raises ConfigError."""
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"the settings file {config} does not exist") from error
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the settings file {config} cannot be read: {reason}") from error
    if content is None:  # nothing but comments
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"the settings file {config} must be lines of `name: value`")
    return content


def _explain(problem: ErrorDetails) -> str:
    name = ".".join(map(str, problem["loc"]))
    if not name:
        return problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"{name} is no setting; `sparserve serve --help` lists them"
    flag = f"--{name.replace('_', '-')}, SPARSERVE_{name.upper()} or {name} in the settings file"
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{name} is {problem['input']!r}: {reason} ({flag})"
