"""TLS: the endpoint's certificate, renewed without a restart, and how https replicas' certificates are checked."""

import logging
import ssl
from pathlib import Path
from typing import NoReturn

from balancer.errors import ConfigError
from balancer.relay.file_watch import MOUNT_ITS_FOLDER, FileWatch

log = logging.getLogger("groundserve")

# For TLS 1.2: Mozilla's "intermediate" set without finite-field Diffie-Hellman. All those of TLS 1.3 are good.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


class Certificate:
    """The endpoint's certificate chain and private key, both PEM files. Raises ConfigError if they cannot be used.

    `own_context` is for requests from this process to its own endpoint: it trusts the certificate itself, for any name.
    """

    def __init__(self, chain: Path, key: Path) -> None:
        self._chain, self._key = chain, key
        self._watch = FileWatch(chain, key)
        self.context = self._loaded()
        self.own_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.own_context.check_hostname = False
        self.own_context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        self.own_context.load_verify_locations(chain)

    def reload(self) -> None:
        """Uses a renewed certificate for new connections; keeps the old one if the new pair cannot be used."""
        if not self._watch.has_changed():
            return
        if self._watch.is_cut_off:
            log.warning("--tls-cert %s or --tls-key %s: %s", self._chain, self._key, MOUNT_ITS_FOLDER)
            return
        try:
            self._loaded()  # tried on a separate context: a half-loaded pair would break every handshake
            self.context.load_cert_chain(self._chain, self._key, _no_password)
            self.own_context.load_verify_locations(self._chain)
        except (ConfigError, OSError) as error:
            log.warning("%s; the certificate stays as it was", error)
        else:
            log.info("%s: new certificate taken up", self._chain)

    def _loaded(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(CIPHERS)
        context.set_alpn_protocols(["http/1.1"])
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
        try:
            context.load_cert_chain(self._chain, self._key, _no_password)
        except ssl.SSLError as error:
            why = (error.reason or "not PEM").replace("_", " ").lower()
            raise ConfigError(f"--tls-cert {self._chain}, --tls-key {self._key}: {why}") from None
        except OSError as error:
            raise ConfigError(f"--tls-cert {self._chain}, --tls-key {self._key}: {error.strerror}") from None
        return context


def replica_context(authorities: Path | None) -> ssl.SSLContext:
    """Checks https replicas against the CA certificates in `authorities` (PEM), or against the machine's own."""
    try:
        return ssl.create_default_context(cafile=authorities)
    except ssl.SSLError:
        raise ConfigError(f"--replica-ca {authorities}: no PEM certificate in it") from None
    except OSError as error:
        raise ConfigError(f"--replica-ca {authorities}: {error.strerror}") from None


def _no_password() -> NoReturn:
    raise ConfigError("--tls-key: the key is encrypted; store it without a passphrase, readable by this user alone")
