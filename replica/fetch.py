"""Fetches the media of a request with SGLang's own session; replica/media.py must allow each connection."""

import os
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.auth import HTTPBasicAuth
from requests.utils import get_auth_from_url
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from replica.media import DOMAINS, MediaError, MediaPolicy, check_content


class Unfetchable(MediaError):
    """A client's URL that cannot be fetched."""


class Unreachable(Unfetchable, requests.exceptions.ConnectionError):
    """Nothing answers at the URL. A ConnectionError, so SGLang tries it a second time."""


def fetch(stock: Callable[..., bytes], url: str, *more: Any, **named: Any) -> bytes:
    """Wraps SGLang's download_remote_media: a URL that cannot be fetched is the client's mistake, not ours."""
    try:
        content = stock(url, *more, **named)
        check_content(content)
        return content
    except MediaError:
        raise
    except requests.exceptions.Timeout:
        raise Unreachable(f"{url[:100]!r} cannot be fetched: no answer in time") from None
    except requests.exceptions.ConnectionError:
        proxy = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"))
        hint = f" (the proxy is used only for hosts listed in {DOMAINS})" if proxy else ""
        raise Unreachable(f"{url[:100]!r} cannot be fetched: no connection{hint}") from None
    except (requests.exceptions.RequestException, OSError) as error:
        raise Unfetchable(f"{url[:100]!r} cannot be fetched: {error}") from None


def guarded(session: requests.Session, policy: MediaPolicy) -> requests.Session:
    """`session`, restricted to connections that `policy` allows. It ignores passwords in ~/.netrc."""
    if not isinstance(session.get_adapter("http://"), _Adapter):
        session.mount("http://", _Adapter(policy))
        session.mount("https://", _Adapter(policy))
        session.auth = _auth_from_url
    return session


def _auth_from_url(request: requests.PreparedRequest) -> requests.PreparedRequest:
    user, password = get_auth_from_url(str(request.url))
    return HTTPBasicAuth(user, password)(request) if user or password else request


class _Adapter(HTTPAdapter):
    def __init__(self, policy: MediaPolicy) -> None:
        self._policy = policy
        super().__init__()

    def init_poolmanager(self, *more: Any, **named: Any) -> None:
        super().init_poolmanager(*more, **named)
        self.poolmanager.pool_classes_by_scheme = {
            "http": _pool(HTTPConnectionPool, HTTPConnection, self._policy),
            "https": _pool(HTTPSConnectionPool, HTTPSConnection, self._policy),
        }

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: bool | str = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        url = str(request.url)
        self._policy.check_host(urlsplit(url).hostname or "", url)
        # A proxy hides which address is contacted, so use one only for hosts that the operator trusts.
        trusted = self._policy.domains or self._policy.private
        return super().send(request, stream, timeout, verify, cert, proxies if trusted else None)


def _pool(pool: Any, connection: Any, policy: MediaPolicy) -> Any:
    class Connection(connection):  # type: ignore[misc]
        def _new_conn(self) -> socket.socket:
            name: str = self._dns_host  # type: ignore[has-type]
            try:
                addresses = policy.addresses(name, self.port)
            except OSError as error:
                raise NameResolutionError(self.host, self, socket.gaierror(*error.args)) from error
            failure: Exception | None = None
            for address in addresses:
                self._dns_host = address
                try:
                    connected: socket.socket = super()._new_conn()
                except (NewConnectionError, ConnectTimeoutError) as error:
                    failure = error
                else:
                    return connected
                finally:
                    self._dns_host = name  # the certificate and the Host field are for this name
            assert failure is not None
            raise failure

    return type("Pool", (pool,), {"ConnectionCls": Connection})
