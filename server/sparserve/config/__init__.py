"""Settings, each described once: flags, environment, the YAML file and `--help` come from these models."""

from sparserve.config.engine import (
    BackendChoice,
    Dtype,
    EngineSettings,
    HeadDtype,
    KvDtype,
    PartDtype,
    PolicyName,
)
from sparserve.config.serving import ServerSettings
from sparserve.config.sources import Settings, load_settings

__all__ = [
    "BackendChoice",
    "Dtype",
    "EngineSettings",
    "HeadDtype",
    "KvDtype",
    "PartDtype",
    "PolicyName",
    "ServerSettings",
    "Settings",
    "load_settings",
]
