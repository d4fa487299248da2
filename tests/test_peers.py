"""Processes join where there are several, and only there."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jax
import pytest

import rljax.peers
from rljax.config import ConfigError
from rljax.peers import DEAD_PEER_S, FAREWELL_S, join_peers

SLURM = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-4]"}
SAYS = (*SLURM, "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES", "GCE_METADATA_IP")
LIMITS = {"heartbeat_timeout_seconds": DEAD_PEER_S, "shutdown_timeout_seconds": FAREWELL_S}


@pytest.fixture
def joined(monkeypatch) -> list[Any]:
    """The calls of ``jax.distributed.initialize`` on a machine that says nothing of itself."""
    calls: list[Any] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **limits: calls.append((args, limits)))
    monkeypatch.setattr(rljax.peers, "glob", lambda pattern: [])
    for name in SAYS:
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("", {}, None),
        ("host:1234,2,1", {}, ("host:1234", 2, 1)),
        ("host:1234,1,0", SLURM, None),
        ("", SLURM, ()),
        ("", {"SLURM_NTASKS": "4"}, None),  # an allocation, and in it one process that srun did not start
        ("", {**SLURM, "SLURM_NTASKS": "1"}, None),
        ("", {"TPU_WORKER_HOSTNAMES": "a,b"}, ()),
        ("", {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "1"}, None),
        ("", {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, ()),
    ],
)
def test_join_where_there_are_several_with_time_limits(monkeypatch, joined, text, environment, expected):
    for name, value in {"GCE_METADATA_IP": "localhost:1", **environment}.items():
        monkeypatch.setenv(name, value)
    join_peers(text)
    assert joined == ([] if expected is None else [(expected, LIMITS)])


@pytest.fixture
def metadata_server(monkeypatch) -> Iterator[dict[str, str]]:
    """Answers as that of a TPU VM would, with the attributes that the test puts in."""
    attributes: dict[str, str] = {}

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            value = attributes.get(self.path.rpartition("/")[2])
            known = value is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write((value if known and value else "").encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("localhost", 0), Answer)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
    yield attributes
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("attributes", "joins"),
    [
        ({"worker-network-endpoints": "10.0.0.1,10.0.0.2"}, True),
        ({"worker-network-endpoints": "10.0.0.1", "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\n"}, False),
        ({"worker-network-endpoints": "10.0.0.1", "tpu-env": "A: 'b'\nMEGASCALE_NUM_SLICES: '2'\n"}, True),
        ({}, False),
    ],
)
def test_a_tpu_vm_asks_its_metadata_server(monkeypatch, joined, metadata_server, attributes, joins):
    metadata_server.update(attributes)
    join_peers("")
    assert joined == []  # no chips, no question
    monkeypatch.setattr(rljax.peers, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    join_peers("")
    assert joined == ([((), LIMITS)] if joins else [])


@pytest.mark.parametrize("text", ["host,2,0", "host:1234,2", "host:1234,2,2", "host:1234,two,0"])
def test_a_malformed_meeting_place_is_refused(text):
    with pytest.raises(ConfigError, match=r"config\.distributed is "):
        join_peers(text)
