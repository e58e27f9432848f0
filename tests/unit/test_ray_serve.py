"""The options of the application on Ray, the ports that it may open, and its request ids."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from starlette.datastructures import Headers

from llm_sidecar.errors import SettingsError
from llm_sidecar.settings import Settings
from osiris.ray_serve import ports
from osiris.ray_serve.options import Options, check, parse
from osiris.ray_serve.request_id import WithoutRequestId, in_proxy
from tests.live_server import ROOT
from tests.unit.asgi import Inner, client


def test_the_defaults_are_one_replica_of_each() -> None:
    options, port = parse("serve", [])
    assert port == 8000
    assert options == Options()
    assert (options.phi3_min, options.hermes_min, options.sidecars, options.replicas) == (
        1,
        1,
        1,
        2,
    )


def test_options_are_read_from_the_command_line() -> None:
    options, port = parse("serve", ["--port", "8001", "--phi3-max", "4", "--gpus", "0.5"])
    assert port == 8001
    assert options == Options(phi3_max=4, gpus=0.5)
    assert options.replicas == 5


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--phi3-min", "0"], "phi3_min: Input should be greater than or equal to 1"),
        (["--hermes-min", "two"], "hermes_min: Input should be a valid integer"),
        (["--phi3-min", "3", "--phi3-max", "2"], "phi3_max is less than phi3_min"),
    ],
)
def test_a_bad_option_is_named(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("serve", argv)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_the_configuration_of_a_cluster_has_valid_options_and_listens_on_loopback() -> None:
    config = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text())
    (application,) = config["applications"]
    assert application["name"] == "osiris"
    assert application["import_path"] == "osiris.ray_serve.app:build"
    assert Options(**application["args"]).release == "1"
    assert config["http_options"]["host"] == "127.0.0.1"


@pytest.mark.parametrize("variable", ["PHI3_URL", "HERMES_URL"])
def test_a_remote_model_is_refused(variable: str) -> None:
    settings = Settings.from_environ({variable: "http://gpu-1:8000/v1"})
    with pytest.raises(SettingsError, match=r"^PHI3_URL and HERMES_URL do not go with Ray"):
        check(settings, Options())


def test_two_sidecars_need_a_redis() -> None:
    alone = Settings.from_environ({"REDIS_URL": "memory://"})
    check(alone, Options())
    with pytest.raises(SettingsError, match=r"^With REDIS_URL=memory:// there can be one"):
        check(alone, Options(sidecars=2))
    check(Settings.from_environ({"REDIS_URL": "redis://redis:6379/0"}), Options(sidecars=2))


# The columns of /proc/net/tcp up to the inode.
TABLE = "  sl  local_address rem_address   st tx_queue tr tm->when retrnsmt   uid  timeout inode\n"
ANY, LOOPBACK = "00000000:1F40", "0100007F:1F41"
ANY_6, LOOPBACK_6 = "0" * 32 + ":1F42", "0" * 24 + "01000000:1F43"
MAPPED = "0000000000000000FFFF00000100007F:1F44"
OTHER = "0202000A:1F45"


def entry(address: str, state: str, inode: int) -> str:
    queues = "00000000:00000000 00:00000000 00000000"
    return f"   0: {address} 00000000:0000 {state} {queues} 0 0 {inode}\n"


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /proc."""
    monkeypatch.setattr(ports, "_PROC", tmp_path)
    (tmp_path / "net").mkdir()
    for name in ("tcp", "tcp6"):
        (tmp_path / "net" / name).write_text(TABLE)
    return tmp_path


def listen(proc: Path, table: str, address: str, inode: int, state: str = "0A") -> None:
    with (proc / "net" / table).open("a") as file:
        file.write(entry(address, state, inode))


def process(proc: Path, pid: int, parent: int, *inodes: int) -> None:
    (proc / str(pid) / "fd").mkdir(parents=True)
    (proc / str(pid) / "stat").write_text(f"{pid} (a) name)) S {parent} 1 1")
    (proc / str(pid) / "fd" / "0").symlink_to("/dev/null")
    for number, inode in enumerate(inodes, 3):
        (proc / str(pid) / "fd" / str(number)).symlink_to(f"socket:[{inode}]")


def test_ports_of_descendants_beyond_loopback_are_exposed(proc: Path) -> None:
    process(proc, 10, 1, 100, 101)
    process(proc, 11, 10, 102, 103)
    process(proc, 12, 11, 104, 105)
    listen(proc, "tcp", ANY, 100)
    listen(proc, "tcp", LOOPBACK, 101)
    listen(proc, "tcp6", ANY_6, 102)
    listen(proc, "tcp6", LOOPBACK_6, 103)
    listen(proc, "tcp6", MAPPED, 104)
    listen(proc, "tcp", OTHER, 105)
    assert ports.exposed(10) == [
        "0.0.0.0:8000 (process 10)",
        "10.0.2.2:8005 (process 12)",
        ":::8002 (process 11)",
    ]


def test_ports_of_other_processes_and_connections_are_not_exposed(proc: Path) -> None:
    process(proc, 10, 1, 101)
    process(proc, 20, 1, 100)
    listen(proc, "tcp", ANY, 100)
    listen(proc, "tcp", ANY, 101, state="01")
    assert ports.exposed(10) == []


def test_serve_opens_its_port_on_the_address_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def add_port_to_grpc_server(server: object, address: str) -> int:
        opened.append(address)
        return 7

    replica, util = ModuleType("replica"), ModuleType("util")
    replica.add_port_to_grpc_server = add_port_to_grpc_server  # type: ignore[attr-defined]
    util.get_node_ip_address = lambda: "127.0.0.1"  # type: ignore[attr-defined]
    private = ModuleType("private")
    private.replica = replica  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray.serve._private", private)
    monkeypatch.setitem(sys.modules, "ray.util", util)
    for _ in range(2):
        ports.listen_on_this_node_only()
        assert replica.add_port_to_grpc_server(None, "[::]:0") == 7
    assert opened == ["127.0.0.1:0"] * 2


async def test_only_the_proxy_adds_the_request_id() -> None:
    sent = []

    async def app(scope: object, receive: object, send: object) -> None:
        headers = [(b"x-request-id", b"abc"), (b"x-model", b"phi3/demo")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"ok"})  # type: ignore[operator]

    async def send(message: object) -> None:
        sent.append(message)

    await WithoutRequestId(app)({"type": "http"}, None, send)  # type: ignore[arg-type]
    assert sent == [
        {"type": "http.response.start", "status": 200, "headers": [(b"x-model", b"phi3/demo")]},
        {"type": "http.response.body", "body": b"ok"},
    ]


@pytest.mark.parametrize(
    ("sent", "left"), [("order-77", "order-77"), ("", None), ("a b", None), ("x" * 129, None)]
)
async def test_a_bad_request_id_does_not_reach_the_proxy(sent: str, left: str | None) -> None:
    inner = Inner()
    (middleware,) = in_proxy()
    inside: Any = middleware.cls
    async with client(inside(inner)) as asking:
        await asking.get("/health", headers={"X-Request-ID": sent, "Accept": "text/plain"})
    headers = Headers(scope=inner.scopes[0])
    assert (headers.get("x-request-id"), headers["accept"]) == (left, "text/plain")
