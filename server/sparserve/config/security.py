"""Settings of who may use the server's own listener, and how much."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

_PER_MINUTE = 1_000_000_000


class SecuritySettings(BaseSettings):
    """Encryption, keys and what a key may use. They hold for the server's own services, not for adapters."""

    model_config = SettingsConfigDict(env_prefix="SPARSERVE_", extra="forbid", frozen=True)

    tls_cert: Annotated[
        str,
        Field(
            description="PEM file with the server's certificate and then those of its issuers, for TLS; read again when it "
            "changes. Empty: plain text."
        ),
    ] = ""
    tls_key: Annotated[
        str, Field(description="PEM file with the certificate's private key: RSA, P-256 or P-384.")
    ] = ""
    tls_client_ca: Annotated[
        str,
        Field(
            description="PEM file with certificate authorities: every client must then show a certificate of theirs (mTLS)."
        ),
    ] = ""
    api_keys: Annotated[
        str,
        Field(
            description="YAML file with the hashes of the keys that may call, as `sparserve keys new` writes it; read again when "
            "it changes. Empty: no key is asked for."
        ),
    ] = ""
    allow_insecure_keys: Annotated[
        bool,
        Field(
            description="Take keys without TLS on an address that other machines reach: behind a proxy that ends TLS."
        ),
    ] = False
    open_reflection: Annotated[
        bool, Field(description="Let server reflection be asked without a key.")
    ] = False
    key_rpm: Annotated[
        int,
        Field(
            ge=0,
            le=_PER_MINUTE,
            description="Calls of InferenceService a minute, for keys that say nothing else; 0: any number.",
        ),
    ] = 0
    key_tpm: Annotated[
        int,
        Field(
            ge=0,
            le=_PER_MINUTE,
            description="Prompt and new tokens a minute, for keys that say nothing else; 0: any number.",
        ),
    ] = 0
    key_concurrent: Annotated[
        int,
        Field(
            ge=0,
            le=1_000_000,
            description="Calls of InferenceService at once, for keys that say nothing else; 0: any number.",
        ),
    ] = 0
    share_prefix_cache: Annotated[
        bool,
        Field(
            description="Let prompts of one key be found in the prefix cache by others: faster for common prefixes, but "
            "cached_tokens then tells a caller what others have sent."
        ),
    ] = False
