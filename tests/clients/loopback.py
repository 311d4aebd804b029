"""Variables that keep a client on this machine: whatever goes elsewhere goes to a proxy that nobody answers at."""

_NOWHERE = "http://127.0.0.1:9"
ENVIRON = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"), _NOWHERE)
ENVIRON |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
ENVIRON |= {"DO_NOT_TRACK": "1", "LANGSMITH_TRACING": "false"}
