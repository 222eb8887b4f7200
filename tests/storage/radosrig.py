"""Ceph's object gateway on loopback: a second S3 server, which nobody here wrote, and one that is fast.

A monitor, one store that keeps everything in memory, and the gateway, each a process of its own, all in a temporary
folder and on free ports. Needs the Debian packages radosgw, ceph-mon and ceph-osd. Imports no test library, as the
benchmarks use it too.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

__all__ = ["ACCESS_KEY", "INSTALL", "SECRET_KEY", "missing_programs", "rados_gateway", "version"]

ACCESS_KEY, SECRET_KEY = "test-key", "test-secret"

INSTALL: Final = "apt-get install --no-install-recommends radosgw ceph-mon ceph-osd"

_PROGRAMS: Final = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
_START_SECONDS: Final = 120
_STOP_SECONDS: Final = 20

# Nobody proves who they are, one copy of everything, and pools of few parts: a cluster of one in memory.
_CONFIGURATION: Final = """\
[global]
fsid = {fsid}
mon_initial_members = a
mon_host = v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
osd_objectstore = memstore
osd_max_object_name_len = 2048
memstore_device_bytes = {memory_bytes}
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data = {folder}/mon
osd_data = {folder}/osd
rgw_data = {folder}/rgw
run_dir = {folder}/run
crash_dir = {folder}/run
admin_socket = {folder}/run/$name.asok
pid_file = {folder}/run/$name.pid
log_file = {folder}/log/$name.log

[client.rgw.a]
# Without the second option small answers wait 40 ms for an acknowledgement.
rgw_frontends = beast endpoint=127.0.0.1:{http} tcp_nodelay=1
# The gateway otherwise insists on an encrypted link to the monitor, which there is none of without keys.
ms_mon_client_mode = crc secure
"""


def missing_programs() -> list[str]:
    """Return the names of programs that are not installed."""
    return [name for name in _PROGRAMS if shutil.which(name) is None]


def version() -> str:
    """Return which release of Ceph it is, such as ``"16.2.15"``."""
    said = subprocess.run(["radosgw", "--version"], capture_output=True, text=True, check=True).stdout
    return said.split()[2]


@contextmanager
def rados_gateway(memory_bytes: int = 4 * 1024**3) -> Iterator[str]:
    """Run the gateway; its URL. One user may do everything: `ACCESS_KEY` with `SECRET_KEY`.

    Parameters
    ----------
    memory_bytes : int
        What the store says that it has room for; it takes what is stored.

    Raises
    ------
    RuntimeError
        A process ended or did not answer in time; says what its log ends with.
    """
    # A short path: the names of sockets in it are limited to a hundred characters.
    with tempfile.TemporaryDirectory(prefix="rados", dir="/tmp") as name, ExitStack() as stack:
        folder = Path(name)
        for below in ("mon", "osd", "rgw", "run", "log"):
            (folder / below).mkdir()
        fsid, (v2, v1, http) = str(uuid.uuid4()), _free_ports(3)
        configuration = folder / "ceph.conf"
        configuration.write_text(
            _CONFIGURATION.format(fsid=fsid, v2=v2, v1=v1, http=http, memory_bytes=memory_bytes, folder=folder)
        )
        rig = _Rig(folder, {**os.environ, "CEPH_CONF": str(configuration), "CEPH_ARGS": ""}, stack)

        address = f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]"
        rig.run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, str(folder / "monmap"))
        rig.run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(folder / "monmap"))
        rig.start("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        rig.run("ceph", "osd", "new", osd)  # waits for the monitor
        rig.run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", osd)
        rig.start("ceph-osd", "-i", "0")
        rig.wait(lambda: "1 up" in rig.run("ceph", "osd", "stat"), "the store is not up")
        keys = ("--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY)
        rig.run("radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test", *keys)
        rig.start("radosgw", "-n", "client.rgw.a")
        rig.wait(lambda: _listens(http), "the gateway does not listen")
        yield f"http://127.0.0.1:{http}"


class _Rig:
    """The processes, ended last one first."""

    def __init__(self, folder: Path, environment: Mapping[str, str], stack: ExitStack) -> None:
        self._folder, self._environment, self._stack = folder, environment, stack
        self._started: list[tuple[str, subprocess.Popen[bytes]]] = []

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=_START_SECONDS, cwd=self._folder
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def start(self, program: str, *arguments: str) -> None:
        with (self._folder / "log" / f"{program}.out").open("wb") as out:
            process = subprocess.Popen(
                [program, "--foreground", *arguments],
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for whoever uses it, who then stops these in order
            )
        self._stack.callback(_stop, process)
        self._started.append((program, process))

    def wait(self, condition: Callable[[], bool], otherwise: str) -> None:
        pause = threading.Event()
        for _ in range(_START_SECONDS * 10):
            if condition():
                return
            for program, process in self._started:
                if process.poll() is not None:
                    raise RuntimeError(f"{program} ended with {process.returncode}: {self._end_of_log(program)}")
            pause.wait(0.1)
        raise RuntimeError(f"{otherwise} after {_START_SECONDS} s: {self._end_of_log(self._started[-1][0])}")

    def _end_of_log(self, program: str) -> str:
        return (self._folder / "log" / f"{program}.out").read_text(errors="replace")[-2000:]


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # nothing of it is to last
        process.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def _free_ports(count: int) -> Sequence[int]:
    """Choose ports below those that clients' ends are given; none of the servers can be asked to take any."""
    found: set[int] = set()
    while len(found) < count:
        port = random.randint(15_000, 32_000)
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.add(port)
    return sorted(found)
