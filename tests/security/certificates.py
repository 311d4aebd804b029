"""Certificates for a test, made by the openssl command: an authority, and what it signs."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

DAYS = "2"


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, PEM files."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates; `pair.cert` is what its believers trust."""

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        self._folder = folder
        self.pair = self._files(name)
        _openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", DAYS),
            *("-subj", f"/CN={name}", "-keyout", str(self.pair.key), "-out", str(self.pair.cert)),
            *("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"),
        )

    def sign(self, name: str, *addresses: str) -> Pair:
        """A certificate for these subject alternative names, as `DNS:localhost` or `IP:127.0.0.1`."""
        pair = self._files(name)
        ask, extra = pair.cert.with_suffix(".csr"), pair.cert.with_suffix(".ext")
        extra.write_text(f"subjectAltName={','.join(addresses)}\nbasicConstraints=CA:FALSE\n")
        _openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-subj", f"/CN={name}", "-keyout", str(pair.key), "-out", str(ask)),
        )
        _openssl(
            *("x509", "-req", "-in", str(ask), "-days", DAYS, "-extfile", str(extra), "-out", str(pair.cert)),
            *("-CA", str(self.pair.cert), "-CAkey", str(self.pair.key), "-CAcreateserial"),
        )
        return pair

    def _files(self, name: str) -> Pair:
        stem = name.replace(" ", "-")
        return Pair(self._folder / f"{stem}.crt", self._folder / f"{stem}.key")


def encrypted(pair: Pair, folder: Path) -> Pair:
    """The same key behind a passphrase."""
    key = folder / "encrypted.key"
    _openssl("ec", "-in", str(pair.key), "-aes256", "-passout", "pass:secret", "-out", str(key))
    return Pair(pair.cert, key)


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
