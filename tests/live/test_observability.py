"""What an operator deploys, against a real Prometheus that scrapes a real server under load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml

from llm_sidecar.db import Store
from tests.docs_pages import PAGES, blocks
from tests.live_server import ROOT, LiveServer, free_port, serve

DEPLOYED = ROOT / "deploy" / "observability"
DASHBOARD = DEPLOYED / "grafana" / "dashboards" / "sidecar.json"
RATE_INTERVAL: Final = "10s"
"""Grafana's value of `$__rate_interval`, at this test's scrape interval of a second."""
PROMPT = {"prompt": "Long ABC from 100, now 112.5, RSI 81.", "max_length": 256}
LOAD: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("/propose_trade_adjustments", PROMPT),
    ("/generate/hermes/", PROMPT | {"max_length": 60}),
    ("/score/hermes", {"proposal": {"ticker": "ABC"}}),
    ("/speak", {"text": "Filled."}),
    ("/nowhere", {}),
)

pytestmark = [
    pytest.mark.usefixtures("_prometheus_is_installed"),
    pytest.mark.own_process("Prometheus scrapes each process"),
]


@pytest.fixture(scope="module")
def _prometheus_is_installed() -> None:
    """Skips where Debian's package is missing; CI has to have it."""
    missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
    if missing:
        reason = f"not installed: {', '.join(missing)} (apt-get install prometheus)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


def promtool(*arguments: str, given: bytes = b"") -> None:
    """Runs it; whatever it complains of, if only as a warning, fails."""
    done = subprocess.run(
        ["promtool", *arguments], cwd=DEPLOYED, input=given, capture_output=True, check=False
    )
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    assert not re.search(r"warn|lint|duplicate", said, re.IGNORECASE), said


class Prometheus:
    """One that scrapes a target every second and has loaded our rules."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def is_ready(self) -> bool:
        return self._client.get("/-/ready").status_code == 200

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query that have a value."""
        response = self._client.get("/api/v1/query", params={"query": expression})
        assert response.status_code == 200, f"{expression}: {response.text}"
        found: list[dict[str, Any]] = response.json()["data"]["result"]
        return [sample for sample in found if sample["value"][1] != "NaN"]

    def get(self, path: str) -> Any:
        """What its API has under a path."""
        return self._client.get(f"/api/v1{path}").json()["data"]


@pytest.fixture(scope="module")
def measured(
    random_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server on a database that was compacted before."""
    folder = tmp_path_factory.mktemp("observed")
    asyncio.run(compacted(folder / "lancedb"))
    # Healthy, which random weights are of themselves not.
    environ = {"PRELOAD_MODELS": "true", "ENABLE_METRICS": "true", "GROUNDING": "retry"}
    with serve(folder, **environ, **random_models) as running:
        running.wait_until_ready()
        yield running


async def compacted(uri: Path) -> None:
    store = await Store.open(uri)
    await store.compact()
    await store.close()


@contextlib.contextmanager
def under_load(server: LiveServer) -> Iterator[None]:
    """Asks for everything, over and over."""
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=60.0) as client:
            while not stop.is_set():
                for path, body in LOAD:
                    client.post(path, json=body)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.fixture(scope="module")
def prometheus(
    measured: LiveServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Prometheus and a server under load."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DEPLOYED / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOYED / name) for name in config["rule_files"]]
    target = measured.url.removeprefix("http://")
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10.0) as client:
            running = Prometheus(client)
            measured.wait_until(running.is_ready)
            measured.wait_until(lambda: running.query('up{job="llm-sidecar"} == 1'))
            # Not before: Prometheus first looks for its targets for five seconds.
            with under_load(measured):
                yield running
    finally:
        process.terminate()
        process.wait(30)


def dashboard_queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOYED / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def names_in(expressions: list[str]) -> set[str]:
    return set(re.findall(r"\b(?:sidecar|http)_\w+", " ".join(expressions)))


# With promtool alone


def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "alerts.yml")


def test_each_alert_fires_on_its_series_and_alone() -> None:
    promtool("test", "rules", "alerts_test.yml")
    tested = yaml.safe_load((DEPLOYED / "alerts_test.yml").read_text())["tests"]
    assert {test["name"] for test in tested} == {"healthy", *(rule["alert"] for rule in alerts())}


def test_each_alert_waits_and_says_how_bad_it_is_and_what_to_do() -> None:
    for rule in alerts():
        assert rule["for"]
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]
        anchor = f"/operations/#{rule['alert'].lower()}"
        assert rule["annotations"]["runbook_url"].endswith(anchor)


def test_grafana_finds_the_datasource_and_the_dashboard() -> None:
    provisioning = DEPLOYED / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())
    uid = sources["datasources"][0]["uid"]
    dashboard = json.loads(DASHBOARD.read_text())
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"] if "targets" in panel} == {
        uid
    }
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


# With a server, and Prometheus


@pytest.mark.usefixtures("prometheus")
def test_promtool_finds_nothing_to_complain_of_in_the_metrics(measured: LiveServer) -> None:
    promtool("check", "metrics", given=measured.client.get("/metrics").content)


def test_every_metric_that_a_rule_or_the_dashboard_names_exists(prometheus: Prometheus) -> None:
    names = names_in([*dashboard_queries(), *(rule["expr"] for rule in alerts())])
    wait(lambda: names <= set(prometheus.get("/label/__name__/values")))


@pytest.mark.usefixtures("prometheus")
def test_every_metric_of_the_sidecar_is_documented(measured: LiveServer) -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    documented = set(re.findall(r"^\| `((?:sidecar|http)_\w+)", text, re.MULTILINE))

    def exposed() -> set[str]:
        text = measured.client.get("/metrics").text
        return set(re.findall(r"^# TYPE ((?:sidecar|http)_\w+)", text, re.MULTILINE))

    # Some are there once the database is open.
    wait(lambda: documented == exposed(), lambda: f"differ: {documented ^ exposed()}")


def test_every_query_of_the_dashboard_returns_data(prometheus: Prometheus) -> None:
    waiting = [
        query.replace("$instance", ".*").replace("$__rate_interval", RATE_INTERVAL)
        for query in dashboard_queries()
    ]
    assert waiting

    def all_answered() -> bool:
        waiting[:] = [query for query in waiting if not prometheus.query(query)]
        return not waiting

    wait(all_answered, lambda: "no data for:\n" + "\n".join(waiting))


def test_prometheus_reads_every_query_of_the_documentation(prometheus: Prometheus) -> None:
    queries = [block.text for page in PAGES for block in blocks(page) if block.language == "promql"]
    assert queries
    for query in queries:
        prometheus.query(query)


def test_a_healthy_sidecar_under_load_raises_no_alert_and_every_rule_is_evaluated(
    prometheus: Prometheus,
) -> None:
    def rules() -> list[dict[str, Any]]:
        groups = prometheus.get("/rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    wait(lambda: rules() and all(rule["health"] == "ok" for rule in rules()))
    assert len(rules()) == len(alerts())
    # Not even one that waits for its time to be over.
    assert [rule["name"] for rule in rules() if rule["state"] != "inactive"] == []


def wait(condition: Any, otherwise: Any = lambda: "it did not come true") -> None:
    """Waits for a condition on Prometheus, which scrapes and evaluates once a second."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, otherwise()
        time.sleep(0.1)
