"""Settings of a server: where it listens, what may wait, how it ends, what it tells."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sparserve.config.adapters import AdapterSettings
from sparserve.config.engine import EngineSettings
from sparserve.config.security import SecuritySettings


class ServerSettings(EngineSettings, AdapterSettings, SecuritySettings):
    """Everything `sparserve serve` can be told."""

    host: Annotated[
        str,
        Field(
            description="Address to listen on; 0.0.0.0 for all interfaces, which then had better have tls_cert and api_keys."
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="gRPC port; 0 picks a free one.")] = (
        50051
    )
    metrics_host: Annotated[
        str,
        Field(
            description="Address of metrics_port, which has neither encryption nor authentication. Empty: that of host."
        ),
    ] = ""
    metrics_port: Annotated[
        int,
        Field(
            ge=0,
            le=65535,
            description="HTTP port of /metrics, /healthz and /readyz; 0 picks a free one.",
        ),
    ] = 9090
    max_waiting: Annotated[
        int,
        Field(
            ge=0,
            le=1_000_000,
            description="Requests that may wait; one more is refused with RESOURCE_EXHAUSTED.",
        ),
    ] = 256
    max_waiting_tokens: Annotated[
        int,
        Field(
            ge=1,
            le=2**62,
            description="Prompt tokens that may wait for their first answer; more are refused with RESOURCE_EXHAUSTED.",
        ),
    ] = 1_000_000
    max_stream_backlog: Annotated[
        int,
        Field(
            ge=1,
            le=1_000_000,
            description="Tokens a client may lag behind its stream; then its request is ended.",
        ),
    ] = 4096
    max_message_mib: Annotated[
        int, Field(ge=1, le=1024, description="Largest gRPC message accepted, in MiB.")
    ] = 16
    max_metadata_kib: Annotated[
        int, Field(ge=1, le=1024, description="Most metadata of a call accepted, in KiB.")
    ] = 16
    max_concurrent_streams: Annotated[
        int,
        Field(ge=1, le=1_000_000, description="Calls at once over one connection; more wait."),
    ] = 4096
    max_connection_age: Annotated[
        float,
        Field(
            ge=0,
            le=7 * 86400,
            description="Seconds after which a connection is asked to reconnect, so that balancers can rebalance; 0: never.",
        ),
    ] = 0
    max_connection_grace: Annotated[
        float,
        Field(
            ge=0,
            le=7 * 86400,
            description="Seconds that calls then get on such a connection before it is closed; 0: as long as they take.",
        ),
    ] = 0
    drain_delay: Annotated[
        float,
        Field(
            ge=0,
            le=3600,
            description="Seconds after SIGTERM in which health and /readyz already say no and new requests are still taken, so that "
            "balancers notice before any is refused.",
        ),
    ] = 0
    drain_timeout: Annotated[
        float,
        Field(
            ge=0,
            le=86400,
            description="Seconds that requests in flight get to finish after SIGTERM, from the end of drain_delay on.",
        ),
    ] = 30
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Field(description="Least severe log lines to print."),
    ] = "info"

    log_format: Annotated[
        Literal["text", "json"],
        Field(description="Log lines as text, or as one JSON object a line."),
    ] = "text"
    metrics_compat: Annotated[
        Literal["none", "vllm"],
        Field(
            description="vllm: /metrics shows vLLM's metric names and labels beside our own, for its dashboards and autoscalers."
        ),
    ] = "none"

    @property
    def max_message_bytes(self) -> int:
        return self.max_message_mib << 20

    @property
    def max_metadata_bytes(self) -> int:
        return self.max_metadata_kib << 10
