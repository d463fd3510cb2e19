"""Settings of the listener for other projects' protocols."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

AdapterName = Literal["vllm", "kserve", "vllm-inference"]


class AdapterSettings(BaseSettings):
    """Which adapters serve, and where: gateways bring neither TLS nor keys, so they have a listener of their own."""

    model_config = SettingsConfigDict(env_prefix="SPARSERVE_", extra="forbid", frozen=True)

    adapters: Annotated[
        str,
        Field(
            description="Protocols of other projects to serve too, with commas between: vllm (vllm.grpc.engine.VllmEngine, "
            "for smg), kserve (KServe v2, for tritonclient), vllm-inference (vllm.Inference and vllm.Control, for vllm-router). "
            "Empty: none."
        ),
    ] = ""
    adapters_host: Annotated[
        str,
        Field(
            description="Address for the adapters, which have neither encryption nor authentication."
        ),
    ] = "127.0.0.1"
    adapters_port: Annotated[
        int, Field(ge=0, le=65535, description="gRPC port of the adapters; 0 picks a free one.")
    ] = 50061
    allow_public_adapters: Annotated[
        bool,
        Field(
            description="Let adapters_host be an address that other machines reach: in a private network, with nobody else in it."
        ),
    ] = False

    @field_validator("adapters")
    @classmethod
    def _known_adapters(cls, value: str) -> str:
        known = get_args(AdapterName)
        if unknown := [name for name in _names(value) if name not in known]:
            raise ValueError(f"{', '.join(unknown)} is none of {', '.join(known)}")
        return value

    @property
    def adapter_names(self) -> list[str]:
        return _names(self.adapters)


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))
