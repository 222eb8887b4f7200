"""A cluster whose servers are processes of this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType

import msgspec

from ..errors import CannotServe, DfaissError, InvalidArgument
from ..serve.cluster import (
    ClusterFile,
    ServedIndex,
    ServerEntry,
    existing_cluster,
    plan_cluster,
    read_cluster,
    write_cluster,
)
from ..serve.security import check_listen
from .notices import Notice, NoticeSocket
from .options import ServeOptions
from .restarts import Life, RestartPolicy, State
from .sockets import listen

__all__ = ["LocalCluster"]

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.05
"""How often it is looked at whether a process has ended."""

_CONNECT_SECONDS = 0.5
_LAST_WORDS_SECONDS = 0.2
_ALL_ADDRESSES = ("", "0.0.0.0", "::")
_KEPT_LINES = 20
_SHOWN_LINES = 5

# A server must find the packages that this process finds, and nothing in the folder it happens to stand in.
_BOOT = "import sys; sys.path[:] = sys.argv[3:]; from lance_dfaiss.launch.process import main; main()"


@dataclass(slots=True, eq=False)
class _Member:
    """One server: its sockets, which it keeps, and its process, which may be another one later."""

    entry: ServerEntry
    sock: socket.socket
    http: socket.socket | None
    life: Life
    process: subprocess.Popen[bytes] | None = None
    reader: threading.Thread | None = None
    epoch: int = 0
    reason: str = ""
    failure: DfaissError | None = None
    status: int = 0
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))

    @property
    def ready(self) -> bool:
        return self.life.state is State.READY and self.epoch > 0

    def signal(self, number: int) -> None:
        if self.process is not None:
            # Popen looks first whether the process is still there: the number may be another's by now.
            self.process.send_signal(number)

    def listen_again(self, host: str) -> None:
        """Take the ports back that were given up."""
        self.sock = listen(host, self.entry.port)
        if self.entry.http_port is not None:
            self.http = listen(host, self.entry.http_port)

    def hang_up(self) -> None:
        """Close the sockets: who connects is refused, once no process has them either."""
        self.sock.close()
        if self.http is not None:
            self.http.close()


class LocalCluster:
    """Server processes on this machine, started, watched and stopped.

    A context manager: entering it writes the cluster file, starts the servers and waits until each is ready; leaving
    it stops them. A server that crashes is started again at the same address, for the sockets belong to this process.
    If this process ends, in whatever way, its servers end too.

    Parameters
    ----------
    indexes : sequence of ServedIndex
        What is served.
    servers : int
        Processes.
    replicas : int
        Servers that hold the same shards.
    cluster_file : str or path
        Where to write the layout, a local path or an fsspec URL. A file that is there is replaced, unless its servers
        answer.
    options : ServeOptions
        How to serve.
    host : str
        Where to listen; the cluster file names it to clients, or this machine's name where it stands for all
        addresses. Others than this machine can connect only with TLS, see `ServeOptions`.
    port, http_port : int or None
        Of the first server; the next ones have the next numbers. None for any that are free.
    http : bool
        Whether servers have a port for health, metrics and the status page.
    refresh_seconds : float
        Servers move to the newest dataset version before each multiple of it; 0 for only when told to.
    ready_seconds : float
        How long a server may take until it is ready.
    stop_seconds : float
        How long a server that was told to stop may take, before it is killed.
    policy : RestartPolicy
        When a server that crashed is started again.
    write_line : callable, optional
        Takes the lines that servers write to stderr; the default writes them to that of this process.

    Examples
    --------
    ::

        index = ServedIndex(name="words", dataset="words.lance", index="vector_idx")
        with LocalCluster([index], servers=4, replicas=2, cluster_file="cluster.json"):
            client = lance_dfaiss.connect("cluster.json")
    """

    def __init__(
        self,
        indexes: Sequence[ServedIndex],
        *,
        cluster_file: str | os.PathLike[str],
        servers: int = 1,
        replicas: int = 1,
        options: ServeOptions | None = None,
        host: str = "127.0.0.1",
        port: int | None = None,
        http_port: int | None = None,
        http: bool = True,
        refresh_seconds: float = 10.0,
        ready_seconds: float = 600.0,
        stop_seconds: float = 30.0,
        policy: RestartPolicy | None = None,
        write_line: Callable[[str], None] | None = None,
    ) -> None:
        if servers < 1:
            raise InvalidArgument(f"servers must be at least 1, got {servers}", parameter="servers", value=servers)
        self.cluster_file = os.fspath(cluster_file)
        self._indexes = tuple(indexes)
        self._servers = servers
        self._replicas = replicas
        self._options = (options or ServeOptions()).shared_by(servers)
        self._host = host
        self._public_host = socket.getfqdn() if host in _ALL_ADDRESSES else host
        self._port = port
        self._http_port = http_port
        self._http = http
        self._refresh_seconds = refresh_seconds
        self._ready_seconds = ready_seconds
        self._stop_seconds = stop_seconds
        self._policy = policy or RestartPolicy()
        self._write_line = write_line or _to_stderr
        self._members: dict[int, _Member] = {}
        self._cluster: ClusterFile | None = None
        self._notices: NoticeSocket | None = None
        self._watcher: threading.Thread | None = None
        self._closing = False
        self._starting = False
        self._stopped = False
        # Of the members and all that is in them; notified whenever one changes.
        self._changed = threading.Condition()
        # Held by whoever changes the layout or restarts servers: one after the other.
        self._one_change = threading.Lock()

    def __enter__(self) -> LocalCluster:
        """Start."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()

    @property
    def cluster(self) -> ClusterFile:
        """The layout now."""
        if self._cluster is None:
            raise CannotServe("the cluster was not started", remedy="Use it as a context manager, or call start()")
        return self._cluster

    @property
    def pids(self) -> dict[int, int]:
        """Process numbers by server id, of those that run now."""
        with self._changed:
            return {
                server: member.process.pid
                for server, member in self._members.items()
                if member.process is not None and member.life.runs
            }

    @property
    def states(self) -> dict[int, State]:
        """What each server is doing."""
        with self._changed:
            return {server: member.life.state for server, member in self._members.items()}

    @property
    def failed(self) -> list[int]:
        """Servers that were given up."""
        return [server for server, state in self.states.items() if state is State.FAILED]

    def start(self) -> None:
        """Write the cluster file, start the servers, and wait until each is ready.

        Raises
        ------
        CannotServe
            If a port is taken, the cluster file is that of a running cluster, or a server does not get ready.
        DfaissError
            What kept a server from starting.
        """
        if self._members:
            raise CannotServe("the cluster was started already")
        before = _check_unused(self.cluster_file, self._options)
        check_listen(self._host, self._options.access(), self._options.tls())
        try:
            self._lay_out(epoch=before + 1)
            self._notices = NoticeSocket()
            self._closing, self._starting, self._stopped = False, True, False
            self._watcher = threading.Thread(target=self._watch, name="lance-dfaiss-launcher", daemon=True)
            self._watcher.start()
            with self._changed:
                self._check_goes_on()
                for member in self._members.values():
                    self._spawn(member)
            self._wait_ready(list(self._members))
        except BaseException:
            self.stop()
            raise
        finally:
            self._starting = False

    def stop(self) -> None:
        """Stop all servers: each drains first, and is killed if it does not end in time. Can be called again."""
        with self._changed:
            self._stopped = True
            for member in self._members.values():
                runs = member.life.runs
                member.life = member.life.told_to_stop(time.monotonic())
                member.hang_up()
                if runs:
                    member.signal(signal.SIGTERM)
            ended = self._watcher is None or self._changed.wait_for(self._none_runs, self._stop_seconds)
            if not ended:
                self._kill_late()
        self._end_watching()

    def kill(self) -> None:
        """End all servers at once, without waiting for that; safe to call from a signal handler."""
        with self._changed:
            self._stopped = True
            for member in self._members.values():
                member.life = member.life.told_to_stop(time.monotonic())
                member.signal(signal.SIGKILL)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until no server runs and none will, and tell whether that is so.

        Parameters
        ----------
        seconds : float, optional
            The longest to wait; for ever without.
        """
        with self._changed:
            return self._changed.wait_for(lambda: all(each.life.over for each in self._members.values()), seconds)

    def wait_ready(self, seconds: float | None = None) -> bool:
        """Wait until every server is ready in the present layout, and tell whether that is so.

        Parameters
        ----------
        seconds : float, optional
            The longest to wait; for ever without.
        """
        with self._changed:
            return self._changed.wait_for(
                lambda: all(each.ready and each.epoch >= self.cluster.epoch for each in self._members.values()), seconds
            )

    def add_server(self, *, weight: float = 1.0) -> ServerEntry:
        """Start one more server, let the others take up the new layout, and return the new one.

        Until all are ready, clients are answered by the old layout.

        Parameters
        ----------
        weight : float
            How much it holds, relative to the others.

        Raises
        ------
        DfaissError
            What kept it from starting; the layout is then without it again.
        """
        with self._change(), contextlib.ExitStack() as undo:
            sock = undo.enter_context(listen(self._host, 0))
            http = undo.enter_context(listen(self._host, 0)) if self._http else None
            cluster, entry = self._newest().with_server(
                self._public_host, _port_of(sock), http_port=None if http is None else _port_of(http), weight=weight
            )
            self._write(cluster)
            undo.pop_all()
            member = _Member(entry, sock, http, Life(State.STOPPED, time.monotonic()))
            try:
                with self._changed:
                    self._members[entry.id] = member
                    self._check_goes_on()
                    self._spawn(member)
                self.reload()
                self._wait_ready([entry.id])
                self._wait_epoch(cluster.epoch)
            except BaseException:
                self._remove(entry.id)
                raise
            return entry

    def remove_server(self, server_id: int) -> None:
        """Take a server out of the layout; it ends once the others have taken over what it held.

        Parameters
        ----------
        server_id : int
            Which.

        Raises
        ------
        ClusterFileInvalid
            If there is none of that id.
        InvalidArgument
            If it is the only one.
        """
        with self._change():
            self._remove(server_id)

    def restart(self, server_id: int) -> None:
        """Drain a server, start it again, and wait until it is ready.

        Parameters
        ----------
        server_id : int
            Which.

        Raises
        ------
        DfaissError
            What kept it from starting.
        """
        with self._change():
            self._restart(server_id)

    def rolling_restart(self) -> None:
        """Restart all servers, one after the other: with two replicas or more, no query fails.

        Raises
        ------
        DfaissError
            What kept a server from starting; the rest are not restarted then.
        """
        with self._change():
            for server_id in list(self._members):
                self._restart(server_id)

    def reload(self) -> None:
        """Have all servers look for a new layout and new versions now, and not only at the next refresh."""
        with self._changed:
            for member in self._members.values():
                if member.life.state is State.READY:  # a signal would end one that is not that far
                    member.signal(signal.SIGHUP)

    # What is done with the condition held, by whoever holds it.

    def _spawn(self, member: _Member) -> None:
        member.epoch, member.reason, member.failure = 0, "", None
        member.last_lines.clear()
        descriptors = [sock.fileno() for sock in (member.sock, member.http) if sock is not None]
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, f"server-{member.entry.id}", self.cluster_file, *sys.path],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=descriptors,
            env=self._environment(),
            # Ctrl-C in a terminal is for this process, which then stops its servers in order.
            start_new_session=True,
        )
        member.process = process
        member.life = member.life.started(time.monotonic())
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already, and that will be noticed
            process.stdin.write(self._orders(member) + b"\n")
            process.stdin.flush()
        member.reader = threading.Thread(
            target=self._read_lines, args=(member, process), name="lance-dfaiss-stderr", daemon=True
        )
        member.reader.start()

    def _orders(self, member: _Member) -> bytes:
        return msgspec.json.encode(
            {
                "server_id": member.entry.id,
                "cluster_file": self.cluster_file,
                "listen_fd": member.sock.fileno(),
                "http_fd": None if member.http is None else member.http.fileno(),
                "options": self._options,
            }
        )

    def _environment(self) -> dict[str, str]:
        assert self._notices is not None
        found = {name: value for name, value in os.environ.items() if not name.startswith("LISTEN_")}
        found["NOTIFY_SOCKET"] = self._notices.address
        found["OMP_NUM_THREADS"] = str(self._options.threads)
        # Threads that spin while they wait would take the cores from the event loops.
        found.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        found.setdefault("LANCE_LOG", "error")
        return found

    def _none_runs(self) -> bool:
        return not any(member.life.runs for member in self._members.values())

    def _kill_late(self) -> None:
        for member in self._members.values():
            if member.life.runs:
                _log.warning("server %d did not stop in time, and is killed", member.entry.id)
                member.signal(signal.SIGKILL)
        self._changed.wait_for(self._none_runs)

    # What runs on the watching thread.

    def _watch(self) -> None:
        assert self._notices is not None
        notices = select.poll()  # not `select.select`, which fails in a process with a thousand files open
        notices.register(self._notices, select.POLLIN)
        while not self._closing:
            notices.poll(_LOOK_SECONDS * 1000)
            with self._changed:
                try:
                    self._read_notices()
                    for member in self._members.values():
                        self._look_after(member)
                except Exception:  # an edge: nobody else would start servers again, or notice that they have ended
                    _log.exception("the launcher failed to look after its servers, and goes on")
                self._changed.notify_all()

    def _read_notices(self) -> None:
        assert self._notices is not None
        for notice in self._notices.read():
            self._take(notice)

    def _take(self, notice: Notice) -> None:
        fields = notice.fields
        for member in self._members.values():
            if member.process is None or member.process.pid != notice.pid:
                continue
            if "READY" in fields:
                member.epoch, member.reason = int(fields["X_EPOCH"]), ""
                member.life = member.life.ready(time.monotonic())
            elif "X_REASON" in fields:
                member.epoch, member.reason = 0, fields["X_REASON"]
            elif "X_FAILURE" in fields:
                member.failure = _failure(fields["X_FAILURE"])

    def _look_after(self, member: _Member) -> None:
        now, process = time.monotonic(), member.process
        if process is not None and member.life.runs and process.poll() is not None:
            self._bury(member, process, now)
        if member.life.state is State.WAITING and now >= member.life.due and not self._closing:
            try:
                self._spawn(member)
            except OSError as exc:
                member.life = member.life.not_started(now, self._policy)
                pause = member.life.due - now
                _log.error("server %d cannot be started, next try in %.1f s: %s", member.entry.id, pause, exc)

    def _bury(self, member: _Member, process: subprocess.Popen[bytes], now: float) -> None:
        self._read_notices()  # its last words may have come since
        if member.reader is not None:
            member.reader.join(_LAST_WORDS_SECONDS)
        status = process.returncode
        member.process, member.status, member.epoch, member.reason = None, status, 0, ""
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        policy = replace(self._policy, early_ends=1) if self._starting else self._policy
        expected = member.life.state in (State.STOPPING, State.RESTARTING)
        member.life = member.life.ended(status, now, policy)
        server, life = member.entry.id, member.life
        if life.over:
            member.hang_up()  # who connects shall be refused, not wait
        if expected or life.state is State.STOPPED:
            _log.info("server %d has ended", server)
        elif life.state is State.WAITING:
            _log.warning("server %d %s, and is started again in %.1f s", server, _how(status), life.due - now)
        elif not self._starting:
            what = _how(status)
            _log.error("server %d %s before it was ready, again, and is given up%s", server, what, _said(member))

    def _read_lines(self, member: _Member, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        with process.stderr as stream:
            for line in stream:
                text = line.decode("utf-8", "backslashreplace").rstrip("\n")
                member.last_lines.append(text)
                self._write_line(text)

    # The steps of what is asked for.

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """Be the only one who changes something, in a cluster that was not stopped."""
        with self._one_change:
            self._check_goes_on()
            yield

    def _check_goes_on(self) -> None:
        """Raise if the cluster was told to stop: nobody would look after what is started."""
        if self._stopped:
            raise CannotServe("the cluster was stopped", remedy="Make another one")

    def _lay_out(self, *, epoch: int) -> None:
        """Listen, and write the cluster file that says where."""
        with contextlib.ExitStack() as undo:
            sockets = []
            for number in range(self._servers):
                sock = undo.enter_context(listen(self._host, 0 if self._port is None else self._port + number))
                http = None
                if self._http:
                    http_port = 0 if self._http_port is None else self._http_port + number
                    http = undo.enter_context(listen(self._host, http_port))
                sockets.append((sock, http))
            cluster = plan_cluster(
                self._indexes,
                [
                    (self._public_host, _port_of(sock), None if http is None else _port_of(http))
                    for sock, http in sockets
                ],
                replicas=self._replicas,
                refresh_seconds=self._refresh_seconds,
                tls=self._options.tls_cert is not None,
            )
            self._cluster = replace(cluster, epoch=epoch)
            write_cluster(self.cluster_file, self._cluster, storage_options=self._options.storage_options)
            undo.pop_all()
        now = time.monotonic()
        self._members = {
            entry.id: _Member(entry, sock, http, Life(State.STOPPED, now))
            for entry, (sock, http) in zip(cluster.servers, sockets, strict=True)
        }

    def _newest(self) -> ClusterFile:
        """Return the layout as the file has it: versions to start at are written there by others."""
        found = read_cluster(self.cluster_file, self._options.storage_options)
        return found if found.epoch == self.cluster.epoch else self.cluster

    def _write(self, cluster: ClusterFile) -> None:
        write_cluster(
            self.cluster_file,
            cluster,
            expected_epoch=self.cluster.epoch,
            storage_options=self._options.storage_options,
        )
        self._cluster = cluster

    def _wait_ready(self, servers: Sequence[int]) -> None:
        """Wait until servers are ready.

        Raises
        ------
        DfaissError
            What keeps one of them from it.
        """
        members = [self._members[server] for server in servers]

        def decided() -> bool:
            return all(each.ready for each in members) or any(each.life.over or each.reason for each in members)

        with self._changed:
            self._changed.wait_for(decided, self._ready_seconds)
            for member in members:
                if not member.ready:
                    _raise_unready(member, self._ready_seconds)

    def _wait_epoch(self, epoch: int) -> None:
        """Wait until every server that runs serves a layout; one that cannot yet goes on by itself, later."""

        def taken_up() -> bool:
            members = [each for each in self._members.values() if each.life.state is State.READY]
            return all(each.epoch >= epoch or each.reason for each in members)

        with self._changed:
            if not self._changed.wait_for(taken_up, self._ready_seconds):
                behind = [str(each.entry.id) for each in self._members.values() if each.epoch < epoch]
                _log.warning("servers %s have not taken up layout %d yet", ", ".join(behind), epoch)

    def _remove(self, server_id: int) -> None:
        cluster = self._newest().without_server(server_id)
        member = self._members[server_id]
        self._write(cluster)
        with self._changed:
            others = [each for each in self._members.values() if each is not member]
            for other in others:
                if other.life.state is State.READY:
                    other.signal(signal.SIGHUP)
            self._changed.wait_for(
                lambda: all(each.epoch >= cluster.epoch or each.reason or not each.life.runs for each in others),
                self._ready_seconds,
            )
            self._stop_one(member, Life.told_to_stop)
            self._changed.wait_for(lambda: member.life.over)
            del self._members[server_id]
            member.hang_up()

    def _restart(self, server_id: int) -> None:
        member = self._members[self.cluster.server(server_id).id]
        with self._changed:
            self._check_goes_on()
            if member.life.over:
                member.listen_again(self._host)
            self._stop_one(member, Life.told_to_restart)
        self._wait_ready([server_id])

    def _stop_one(self, member: _Member, told: Callable[[Life, float], Life]) -> None:
        """Drain a server, and wait until its process has ended; with the condition held."""
        process, runs = member.process, member.life.runs
        member.life = told(member.life, time.monotonic())
        if not runs:
            return
        member.signal(signal.SIGTERM)
        if not self._changed.wait_for(lambda: member.process is not process, self._stop_seconds):
            _log.warning("server %d did not stop in time, and is killed", member.entry.id)
            member.signal(signal.SIGKILL)
            self._changed.wait_for(lambda: member.process is not process)

    def _end_watching(self) -> None:
        self._closing = True
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        if self._notices is not None:
            self._notices.close()
            self._notices = None


def _check_unused(location: str, options: ServeOptions) -> int:
    """Return the epoch of the cluster file that is there, 0 without.

    Raises
    ------
    CannotServe
        If one of its servers answers.
    ClusterFileInvalid
        If it is something else: it will not be overwritten.
    """
    cluster = existing_cluster(location, options.storage_options)
    if cluster is None:
        return 0
    for entry in cluster.servers:
        if _answers(entry):
            raise CannotServe(
                f"{location} is the file of a cluster that runs: {entry.host}:{entry.port} answers",
                remedy="Stop that cluster first, or name another cluster file",
            )
    return cluster.epoch


def _answers(entry: ServerEntry) -> bool:
    try:
        socket.create_connection((entry.host, entry.port), _CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _raise_unready(member: _Member, seconds: float) -> None:
    server = member.entry.id
    if member.failure is not None:
        raise member.failure
    if member.life.over:
        raise CannotServe(f"server {server} {_how(member.status)} before it was ready{_said(member)}")
    if member.reason:
        raise CannotServe(f"server {server} cannot serve: {member.reason}")
    raise CannotServe(
        f"server {server} was not ready after {seconds:.0f} s",
        remedy="Give it more time, or see with --log-level info what it does",
    )


def _failure(text: str) -> DfaissError:
    from ..serve.wire import Failure, error_of

    return error_of(msgspec.json.decode(text, type=Failure))


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _said(member: _Member) -> str:
    lines = [line for line in member.last_lines if line.strip()][-_SHOWN_LINES:]
    return f"; the last it said was: {' | '.join(lines)}" if lines else ""


def _port_of(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
