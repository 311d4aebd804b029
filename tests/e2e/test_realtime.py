"""/v1/realtime through the balancer on a real replica: SGLang opens it, and says that its model hears nothing."""

import json

import pytest
from websockets.exceptions import ConnectionClosedOK
from websockets.sync.client import connect


def test_a_model_without_ears_says_so_and_closes(endpoint: str) -> None:
    with connect(endpoint.replace("http", "ws") + "/v1/realtime?intent=transcription", proxy=None) as client:
        assert client.response is not None
        assert client.response.headers["X-Replica-Id"]
        error = json.loads(client.recv(30))
        assert (error["type"], error["error"]["code"]) == ("error", "not_supported")
        with pytest.raises(ConnectionClosedOK) as end:
            client.recv(30)
    assert end.value.rcvd is not None
    assert end.value.rcvd.code == 1000
