"""Multi-process setup: how processes find each other, and how long they wait for one that is gone."""

import os
import re
import urllib.request
from collections.abc import Callable
from functools import partial
from glob import glob

import jax

from rljax.config import ConfigError

# Seconds. A process that died is missed after the first, and its peers end themselves. One that left with an error of
# its own is waited for at the farewell until the second, and then all end.
DEAD_PEER_S, FAREWELL_S = 30, 60

METADATA_S = 5


def join_peers(text: str) -> None:
    """``host:port,count,index``, or automatic where Slurm or a TPU slice says that there are several processes.

    A single process needs no coordinator: in ``salloc`` without ``srun``, on a TPU with one host, and where ``count``
    is 1, there is none. Comes before anything that makes JAX look at its devices.
    """
    join: Callable[..., None] = partial(
        jax.distributed.initialize, heartbeat_timeout_seconds=DEAD_PEER_S, shutdown_timeout_seconds=FAREWELL_S
    )
    if text:
        address, count, index = _parse(text)
        if count > 1:
            join(address, count, index)
    elif _slurm_processes() > 1 or _tpu_processes() > 1:
        join()


def _parse(text: str) -> tuple[str, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or ":" not in parts[0] or not parts[1].isdigit() or not parts[2].isdigit():
        raise ConfigError(
            f"config.distributed is {text!r}; it is like 10.0.0.1:8476,4,0 (coordinator, processes, index)"
        )
    if int(parts[2]) >= int(parts[1]):
        raise ConfigError(f"config.distributed is {text!r}; the index counts from 0 to {int(parts[1]) - 1}")
    return parts[0], int(parts[1]), int(parts[2])


def _slurm_processes() -> int:
    return int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_STEP_NODELIST" in os.environ else 1


def _tpu_processes() -> int:
    """Hosts of all slices: Kubernetes tells them in the environment, a TPU VM asks its metadata server."""
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    slices = os.environ.get("MEGASCALE_NUM_SLICES")
    if not hosts and not (glob("/dev/accel*") or glob("/dev/vfio/[0-9]*")):
        return 1
    hosts = hosts or _metadata("worker-network-endpoints")
    if slices is None:
        said = re.search(r"MEGASCALE_NUM_SLICES: *'?(\d+)", _metadata("tpu-env"))
        slices = said[1] if said else "1"
    return len(hosts.split(",")) * int(slices)


def _metadata(attribute: str) -> str:
    """What Google's metadata server says of this machine; empty where there is none or it does not know."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{attribute}"
    try:
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=METADATA_S) as reply:
            return reply.read().decode()
    except OSError:
        return ""
