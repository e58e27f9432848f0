"""The cost of hostile clients, and shutdowns that complete every answer. Prints its figures."""

from __future__ import annotations

import contextlib
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.live_server import LiveServer, serve

DEMO = {"SIDECAR_DEMO": "true", "PRELOAD_MODELS": "true"}
PROMPT = {"prompt": "Long AAPL from 182.40, now 191.10, RSI 78 and overbought."}
MIB = 1 << 20
SILENT = 200
UNREAD = 50
SECONDS = 30.0
CLIENTS = 8
ROUNDS = 3
REQUESTS = 7_000
"""In each round, from all clients."""


def memory(server: LiveServer) -> float:
    """Memory of the API process, in MiB."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024


def connect(server: LiveServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def is_closed(client: socket.socket) -> bool:
    """Whether the server has ended a connection, whatever it sent before that."""
    client.setblocking(False)
    try:
        while client.recv(MIB):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def connections(server: LiveServer) -> int:
    """Connections that the kernel keeps for the server's port."""
    port = f":{int(server.url.rpartition(':')[2]):04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    established = [line.split() for line in lines if line.split()[3] == "01"]
    return sum(line[1].endswith(port) for line in established)


@contextlib.contextmanager
def probed(server: LiveServer) -> Iterator[list[float]]:
    """Milliseconds of probes all the time."""
    found: list[float] = []
    stop = threading.Event()

    def probe() -> None:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            while not stop.wait(0.02):
                began = time.perf_counter()
                client.get("/health/live").raise_for_status()
                found.append(1000 * (time.perf_counter() - began))

    with ThreadPoolExecutor(1) as pool:
        probing = pool.submit(probe)
        try:
            yield found
        finally:
            stop.set()
            probing.result(60)


def send_endless_headers(server: LiveServer) -> int:
    """How many of 64 MiB of headers were taken."""
    sent = 0
    with connect(server) as client, contextlib.suppress(OSError):
        client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n")
        while sent < 64 * MIB:
            sent += client.send(b"X-%d: " % sent + b"a" * 60_000 + b"\r\n")
    return sent


def test_clients_that_do_harm_cost_little_and_are_closed(tmp_path: Path) -> None:
    with serve(tmp_path, **DEMO) as server, contextlib.ExitStack() as stack:
        server.wait_until_ready()
        text = "The stop moves up, and the target stays. " * 100
        spoken = server.client.post("/speak", json={"text": text}).raise_for_status()
        size = len(spoken.content)
        text = text[: int(len(text) * 11 * MIB / size) + 1] if size > 11 * MIB else text
        while size < 11 * MIB:
            text += text
            size = len(server.client.post("/speak", json={"text": text}).content)
        body = httpx.Request("POST", server.url, json={"text": text}).content
        before, open_before = memory(server), connections(server)
        with probed(server) as latencies:
            taken = send_endless_headers(server)
            silent = [stack.enter_context(connect(server)) for _ in range(SILENT)]
            for client in silent[SILENT // 2 :]:
                client.sendall(b"GET /health/live HTTP/1.1\r\nHo")
            silent_at = time.monotonic()
            unread = [stack.enter_context(connect(server)) for _ in range(UNREAD)]
            head = b"POST /speak HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            for client in unread:
                client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            # An answer has begun to come on each.
            for client in unread:
                client.settimeout(600)
                assert client.recv(1, socket.MSG_PEEK) == b"H"
            unread_at = time.monotonic()
            most = memory(server)
            time.sleep(max(0.0, silent_at + SECONDS - time.monotonic()))
            silent_left = sum(not is_closed(client) for client in silent)
            # No task reads from these, so ask the kernel which the server has closed.
            time.sleep(max(0.0, unread_at + SECONDS - time.monotonic()))
            open_after, after = connections(server), memory(server)
            others = max(0, open_after - open_before - 1)
        percentiles = statistics.quantiles(latencies, n=100)
        print(
            f"\n{taken / MIB:.1f} of 64 MiB of headers taken; {silent_left} of {SILENT} silent "
            f"connections and {others} others open after {SECONDS:g} s; "
            f"{UNREAD} unread answers of {size / MIB:.1f} MiB; API process {before:.0f} MiB "
            f"before, {most:.0f} when the last answer began, {after:.0f} after {SECONDS:g} s; "
            f"{len(latencies)} probes, p50 {percentiles[49]:.1f} ms, p99 {percentiles[98]:.1f} ms, "
            f"most {max(latencies):.1f} ms"
        )
        assert taken < 20 * MIB
        assert silent_left == 0
        # The probing client has one of its own.
        assert others == 0
        assert after - before < 60
        assert percentiles[98] < 100


class Asking:
    """Clients that send requests until they can no longer connect."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.statuses: list[int] = []
        self.cut: list[str] = []
        self.kept: list[int] = []

    def has_many(self) -> bool:
        return len(self.statuses) >= REQUESTS

    def ask(self, number: int) -> None:
        paths = [("/generate/phi3/", PROMPT), ("/feedback/phi3/", {"no": "feedback"})]
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while True:
                # Most are answered at once, so that many meet the end.
                path, body = paths[number % CLIENTS > 0]
                try:
                    answer = client.post(path, json=body)
                except httpx.ConnectError:
                    return
                except httpx.TransportError as error:
                    self.cut.append(repr(error))
                    continue
                self.statuses.append(answer.status_code)
                if answer.status_code == 503 and answer.headers.get("Connection") != "close":
                    self.kept.append(answer.status_code)


def test_three_shutdowns_lose_no_request(tmp_path: Path) -> None:
    total = refused = 0
    cut: list[str] = []
    for number in range(ROUNDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        with serve(folder, SHUTDOWN_DRAIN_SECONDS="2", **DEMO) as server:
            server.wait_until_ready()
            asking = Asking(server.url)
            with ThreadPoolExecutor(CLIENTS) as pool:
                clients = [pool.submit(asking.ask, client) for client in range(CLIENTS)]
                server.wait_until(asking.has_many, 300)
                began = time.monotonic()
                server.process.send_signal(signal.SIGTERM)
                status = server.process.wait(60)
                seconds = time.monotonic() - began
                for client in clients:
                    client.result(60)
        assert status == 0
        assert set(asking.statuses) == {200, 422, 503}
        assert asking.kept == []
        cut += asking.cut
        total += len(asking.statuses)
        refused += asking.statuses.count(503)
        print(f"\nround {number + 1}: {len(asking.statuses)} answers, ended in {seconds:.1f} s")
    print(f"{total} requests, {refused} of them while the server drained, {len(cut)} cut")
    assert cut == []
    assert total >= 20_000
