"""What SPARSERVE_* variables mean where they are no settings: slips of a name, and Kubernetes' own; and gRPC's own
log, which is off."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from difflib import get_close_matches

from sparserve.cli.output import warn
from sparserve.config import ServerSettings
from sparserve.errors import ConfigError

# gRPC's core writes lines of its own shape to stderr, one of each port that is closed; what matters is told by us.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

PREFIX = "SPARSERVE_"
# Every variable that means something: settings, where models are kept (model/catalog.py), a client's key.
_KNOWN = {name.upper() for name in ServerSettings.model_fields} | {"CACHE_DIR", "API_KEY"}


def check_environment(needed: Collection[str]) -> None:
    """Warn on stderr of variables that are no setting; `needed` are settings that no flag sets.

    Kubernetes gives a pod variables for each Service in its namespace; those of one named sparserve
    begin with our prefix. They are passed over, but SPARSERVE_PORT=tcp://… would be the setting `port`.
    Raises ConfigError for it.
    """
    for name, value in os.environ.items():
        if not name.upper().startswith(PREFIX):  # settings are read in any case
            continue
        known = name.upper().removeprefix(PREFIX)
        if known not in _KNOWN:
            if not _is_of_kubernetes(known, value):
                _warn_of_slip(name, known)
        elif (setting := known.lower()) in needed and _is_of_kubernetes(known, value):
            raise ConfigError(
                f"{name} is {value!r}, which Kubernetes sets for a Service of this name, not a "
                f"{setting.replace('_', ' ')}; set enableServiceLinks: false in the pod's spec, rename "
                f"the Service, or give --{setting.replace('_', '-')}"
            )


def _warn_of_slip(name: str, known: str) -> None:
    near = " or ".join(PREFIX + each for each in get_close_matches(known, _KNOWN))
    warn(f"{name} is no setting and changes nothing" + (f"; did you mean {near}?" if near else ""))


def _is_of_kubernetes(known: str, value: str) -> bool:
    addressed = value.startswith(("tcp://", "udp://", "sctp://"))
    return addressed or re.search(r"(^|_)(SERVICE|PORT)_", known) is not None
