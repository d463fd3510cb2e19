"""All of the security of our own listener, put together from the settings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc

from sparserve.api.addresses import is_loopback
from sparserve.api.security.auth import AuthInterceptor
from sparserve.api.security.keys import key_files
from sparserve.api.security.limits import Limits
from sparserve.api.security.reloading import ReloadedFiles
from sparserve.api.security.tls import certificate_files, server_credentials
from sparserve.config import ServerSettings
from sparserve.errors import ConfigError
from sparserve.metrics import Metrics

log = logging.getLogger(__name__)

# Files are looked at so often.
RELOAD_SECONDS = 1.0


class Guard:
    """`credentials` and `interceptors` of a listener; between `start` and `stop` its files are followed.

    Raises ConfigError where a file cannot be used, or keys would travel in plain text unasked.
    """

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        check_exposure(settings)
        self._metrics = metrics
        self._certificate = certificate_files(settings)
        self._keys = key_files(settings)
        self._watch: asyncio.Task[None] | None = None
        self.credentials: grpc.ServerCredentials | None = None
        self.interceptors: list[AuthInterceptor] = []
        if self._certificate is not None:
            self.credentials = server_credentials(self._certificate)
            self._tell_certificate()
        if self._keys is not None:
            defaults = Limits(
                settings.key_rpm,
                settings.key_tpm,
                settings.key_concurrent,
            )
            auth = AuthInterceptor(
                self._keys,
                defaults,
                metrics,
                open_reflection=settings.open_reflection,
                share_prefix_cache=settings.share_prefix_cache,
            )
            self.interceptors = [auth]

    def start(self) -> None:
        if self._certificate is not None or self._keys is not None:
            self._watch = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    async def _follow(self) -> None:
        metrics = self._metrics
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            try:
                await _reload(self._certificate, metrics.tls_reloads, self._tell_certificate)
                await _reload(self._keys, metrics.key_reloads, self._tell_keys)
            except Exception:
                log.exception("the files of TLS and API keys were not read again")

    def _tell_certificate(self) -> None:
        if self._certificate is not None:
            certificate = self._certificate.value
            self._metrics.tls_expiry.set(certificate.expires.timestamp())
            for warning in certificate.warnings:
                log.warning("%s", warning)

    def _tell_keys(self) -> None:
        for interceptor in self.interceptors:
            interceptor.reloaded()


async def _reload(
    files: ReloadedFiles[Any] | None, outcomes: Any, on_change: Callable[[], None]
) -> None:
    if files is None:
        return
    in_use = await asyncio.to_thread(files.poll)
    if in_use is None:
        return
    outcomes.labels(outcome="ok" if in_use else "failed").inc()
    if in_use:
        on_change()


def check_security(settings: ServerSettings) -> None:
    """Raises what a `Guard` would."""
    check_exposure(settings)
    certificate_files(settings)
    key_files(settings)


def check_exposure(settings: ServerSettings) -> None:
    """Raises ConfigError where keys would travel in plain text over a network unasked."""
    public = not is_loopback(settings.host)
    if public and settings.api_keys and not (settings.tls_cert or settings.allow_insecure_keys):
        raise ConfigError(
            f"API keys would travel in plain text to --host {settings.host}, which others can reach: give --tls-cert and "
            "--tls-key, or behind a proxy that ends TLS --allow-insecure-keys"
        )


def exposure(settings: ServerSettings) -> str | None:
    """What an operator should be warned of; None: nothing."""
    if is_loopback(settings.host):
        return None
    authenticated = settings.api_keys or settings.tls_client_ca
    if settings.tls_cert and authenticated:
        return None
    lacking = "without encryption or authentication"
    if settings.tls_cert:
        lacking = "without authentication (--api-keys or --tls-client-ca)"
    elif authenticated:
        lacking = "without encryption (--tls-cert), and API keys travel in plain text"
    return (
        f"{settings.host} is open to the network, {lacking}: keep it in a private network or behind a proxy "
        "that has both"
    )
