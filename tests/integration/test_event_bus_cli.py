"""`python -m llm_sidecar.event_bus` with a real Redis."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from llm_sidecar.event_bus.__main__ import main
from tests.redis_server import RedisServer, entries, free_port, require_redis

EVENTS, INBOX, DEAD = "osiris.events", "osiris.inbox", "osiris.inbox.dead"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    require_redis()
    with RedisServer() as running:
        yield running


@pytest.fixture
def probe(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    monkeypatch.setenv("REDIS_URL", server.url)
    with redis.Redis(port=server.port, decode_responses=True) as client:
        client.flushall()
        yield client


def add_event(probe: redis.Redis, entry: str, data: str) -> None:
    probe.xadd(EVENTS, {"time": "t", "type": "phi3.test", "data": data}, id=entry)


def add_letter(probe: redis.Redis, entry: str, data: str) -> None:
    fields = json.dumps({"id": "x", "data": data})
    letter: dict[Any, Any] = {"time": "t", "reason": "it is invalid", "entry": "5-0"}
    probe.xadd(DEAD, letter | {"deliveries": "1", "fields": fields}, id=entry)


def test_replay_shows_what_the_stream_has(
    probe: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(1, 1003):
        add_event(probe, f"{number}-0", f"\x1b{number}")
    assert main(["replay"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{n}-0  t  phi3.test  \\x1b{n}" for n in range(1, 1003)]
    assert main(["replay", "1001-0", "--json"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "entry": "1002-0",
        "time": "t",
        "type": "phi3.test",
        "data": "\x1b1002",
    }


def test_replay_since_a_time(probe: redis.Redis, capsys: pytest.CaptureFixture[str]) -> None:
    for entry in ("1769850000999-0", "1769850001000-0", "1769850001000-1"):
        add_event(probe, entry, "x")
    assert main(["replay", "--since", "2026-01-31T09:00:01Z"]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["1769850001000-0", "1769850001000-1"]
    assert main(["replay", "1769850001000-0", "--since", "2026-01-31T09:00:01Z"]) == 0
    assert capsys.readouterr().out.split()[0] == "1769850001000-1"
    assert main(["replay", "--since", "1m"]) == 0
    assert capsys.readouterr().out == ""


def test_replay_says_that_events_after_the_id_may_be_missing(
    probe: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(1, 4):
        add_event(probe, f"{number}-0", "x")
    probe.xtrim(EVENTS, 1, approximate=False)
    assert main(["replay", "1-0"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "3-0  t  phi3.test  x\n"
    assert shown.err == "Redis may have removed events between 1-0 and 3-0.\n"
    assert main(["replay"]) == 0
    assert capsys.readouterr() == (shown.out, "")


def test_replay_of_an_empty_stream_shows_nothing(
    probe: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay"]) == 0
    assert capsys.readouterr().out == ""


def test_tail_shows_new_events_until_it_is_interrupted(
    server: RedisServer, probe: redis.Redis
) -> None:
    add_event(probe, "1-0", "old")
    command = [sys.executable, "-m", "llm_sidecar.event_bus", "tail"]
    with subprocess.Popen(
        command, env=os.environ | {"REDIS_URL": server.url}, stdout=subprocess.PIPE, text=True
    ) as tail:
        try:
            end = time.monotonic() + 30
            while not probe.info("clients")["blocked_clients"]:
                assert tail.poll() is None and time.monotonic() < end
                time.sleep(0.02)
            add_event(probe, "2-0", "new")
            assert tail.stdout is not None
            assert tail.stdout.readline() == "2-0  t  phi3.test  new\n"
            tail.send_signal(signal.SIGINT)
            assert tail.wait(10) == 130
        finally:
            tail.kill()


def test_dead_letters_are_shown_newest_first_and_shortened(
    probe: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dead"]) == 0
    assert capsys.readouterr().out == "There are no dead letters.\n"
    add_letter(probe, "1-0", "short")
    add_letter(probe, "2-0", "x" * 100)
    assert main(["dead"]) == 0
    long = json.dumps({"id": "x", "data": "x" * 80 + "…"}, ensure_ascii=False)
    assert capsys.readouterr().out.splitlines() == [
        f"2-0  t  it is invalid  {long}",
        '1-0  t  it is invalid  {"id": "x", "data": "short"}',
    ]
    assert main(["dead", "--last", "1", "--full", "--json"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "id": "2-0",
        "time": "t",
        "reason": "it is invalid",
        "entry": "5-0",
        "deliveries": 1,
        "fields": {"id": "x", "data": "x" * 100},
    }


def test_requeue_puts_one_or_all_back(
    probe: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2, 3):
        add_letter(probe, f"{number}-0", str(number))
    assert main(["requeue", "2-0"]) == 0
    [(entry, fields)] = entries(probe, INBOX)
    assert capsys.readouterr().out == f"2-0 is back in the inbox as {entry}\n"
    assert fields == {"id": "x", "data": "2"}
    assert main(["requeue", "all"]) == 0
    assert [fields["data"] for _, fields in entries(probe, INBOX)] == ["2", "1", "3"]
    assert probe.xlen(DEAD) == 0
    capsys.readouterr()
    assert main(["requeue", "all"]) == 0
    assert capsys.readouterr().out == "There are no dead letters.\n"
    assert main(["requeue", "2-0"]) == 1
    assert capsys.readouterr().err == "There is no dead letter with this id.\n"


@pytest.mark.parametrize("command", ["tail", "replay", "dead", "requeue all"])
def test_without_redis_each_says_so_in_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("REDIS_URL", f"redis://:hunter2@{address}/0")
    assert main(command.split()) == 1
    message = capsys.readouterr().err
    start = f"Redis at redis://:***@{address}/0 cannot be used: Error 111 connecting to {address}."
    assert message.startswith(start)
    assert message.count("\n") == 1


def test_bad_settings_and_arguments_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://h/0?timeout=5")
    assert main(["dead"]) == 1
    assert capsys.readouterr().err.startswith("REDIS_URL=*** is not valid")
    monkeypatch.setenv("REDIS_URL", "memory://")
    assert main(["dead"]) == 1
    assert "memory://" in capsys.readouterr().err
    assert main(["replay", "x"]) == 2
    assert "'x' is not an id such as" in capsys.readouterr().err
    assert main(["replay", "--since", "x"]) == 2
    assert "'x' is not a time such as 2026-01-31 or 7d." in capsys.readouterr().err
    assert main([]) == 0
    assert "tail" in capsys.readouterr().out
