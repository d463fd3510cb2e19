"""The server's certificate, checked before gRPC gets it: gRPC itself only says that a handshake failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from sparserve.api.security.reloading import ReloadedFiles
from sparserve.config.security import SecuritySettings
from sparserve.errors import ConfigError

_CURVES = (ec.SECP256R1, ec.SECP384R1)


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """All in PEM; `client_ca` None: clients need no certificate."""

    chain: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None
    expires: datetime
    warnings: tuple[str, ...]  # one for each certificate that is not valid now

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(self.key, self.chain)], root_certificates=self.client_ca
        )


def certificate_files(settings: SecuritySettings) -> ReloadedFiles[ServerCertificate] | None:
    """None without TLS. Raises ConfigError that names file and reason."""
    _check_complete(settings)
    if not settings.tls_cert:
        return None
    names = [settings.tls_cert, settings.tls_key, settings.tls_client_ca]
    paths = [Path(name).expanduser() for name in names if name]
    return ReloadedFiles("the TLS certificate", paths, partial(_certificate, paths))


def _check_complete(settings: SecuritySettings) -> None:
    if bool(settings.tls_cert) != bool(settings.tls_key):
        given, missing = ("cert", "key") if settings.tls_cert else ("key", "cert")
        raise ConfigError(f"--tls-{given} is given without --tls-{missing}; TLS needs both")
    if settings.tls_client_ca and not settings.tls_cert:
        raise ConfigError(
            "--tls-client-ca is given without --tls-cert and --tls-key; mTLS needs them"
        )


def server_credentials(files: ReloadedFiles[ServerCertificate]) -> grpc.ServerCredentials:
    """New connections get what `files` say then; those that are open keep what they began with."""
    given = files.value

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """gRPC asks at every handshake, on a thread of its own."""
        nonlocal given
        if files.value is given:
            return None
        given = files.value
        return given.configuration()

    return grpc.dynamic_ssl_server_credentials(
        given.configuration(),
        changed,  # type: ignore[arg-type]  # the stubs know no None
        require_client_authentication=given.client_ca is not None,
    )


def _certificate(paths: Sequence[Path], contents: Sequence[bytes]) -> ServerCertificate:
    chain = _certificates(paths[0], contents[0])
    key = _private_key(paths[1], contents[1])
    _check_pair(paths, chain, key)
    client_ca = contents[2] if len(contents) > 2 else None
    authorities = [] if client_ca is None else _certificates(paths[2], client_ca)
    dated = [(paths[0], chain[0]), *((paths[2], authority) for authority in authorities)]
    warnings = tuple(text for each in dated if (text := _out_of_time(*each)))
    expires = chain[0].not_valid_after_utc
    return ServerCertificate(contents[0], contents[1], client_ca, expires, warnings)


def _certificates(path: Path, content: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise ConfigError(f"{path} holds no certificates in PEM that can be read") from error


def _private_key(path: Path, content: bytes) -> PrivateKeyTypes:
    try:
        key = load_pem_private_key(content, password=None)
    except TypeError as error:
        raise ConfigError(
            f"{path} is encrypted; write it without a password: openssl pkey -in {path} -out FILE"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} holds no private key in PEM that can be read") from error
    usable = isinstance(key, rsa.RSAPrivateKey) or (
        isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, _CURVES)
    )
    if not usable:
        kind = key.curve.name if isinstance(key, ec.EllipticCurvePrivateKey) else type(key).__name__
        raise ConfigError(
            f"{path} is a key of the kind {kind}, which gRPC does not serve with; use RSA, P-256 or P-384"
        )
    return key


def _check_pair(
    paths: Sequence[Path], chain: Sequence[x509.Certificate], key: PrivateKeyTypes
) -> None:
    try:
        public = [each.public_key() for each in chain]
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{paths[0]} has a certificate whose key cannot be read") from error
    owners = [number for number, each in enumerate(public) if each == key.public_key()]
    if not owners:
        subject = chain[0].subject.rfc4514_string()
        raise ConfigError(f"{paths[1]} is not the key of the certificate in {paths[0]} ({subject})")
    if owners[0] != 0:
        raise ConfigError(
            f"{paths[0]} begins with another certificate than that of {paths[1]}; put the server's first"
        )


def _out_of_time(path: Path, certificate: x509.Certificate) -> str | None:
    """None: it is valid now."""
    now, who = (
        datetime.now(UTC),
        f"{path}: the certificate of {certificate.subject.rfc4514_string()}",
    )
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if ends < now:
        return f"{who} expired on {ends.isoformat()}"
    return f"{who} is not valid before {begins.isoformat()}" if begins > now else None
