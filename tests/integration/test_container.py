"""The container: what docker-compose makes of the files, and what they promise to an operator.

Nothing here builds an image or starts a container; docs/operations.md says how that was tested.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, OutOfMemoryError
from redis.retry import Retry

from llm_sidecar.settings import DEFAULT_HERMES, DEFAULT_PHI3, Settings
from tests.live_server import ROOT
from tests.programs import require_program
from tests.redis_server import RedisServer, require_redis

DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROXY = (ROOT / "deploy" / "scale" / "haproxy.cfg").read_text()
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()
COMPOSE_FILES = tuple(sorted(path.name for path in ROOT.glob("docker-compose*.yml")))
ALIASES = {
    str(field.alias)
    for group in Settings.groups().values()
    for field in group.model_fields.values()
}
OVERRIDES = {
    "models": ["docker-compose.models.yml"],
    "cuda": ["docker-compose.cuda.yml"],
    "models-cuda": ["docker-compose.models.yml", "docker-compose.cuda.yml"],
}
PROFILES = [None, "speech", "observability", "scale"]
SIDECARS = ["llm-sidecar", "sidecar-a", "sidecar-b"]
HOST_FOLDERS = {"PHI3_HOST_DIR": "/srv/phi3", "HERMES_HOST_DIR": "/srv/hermes"}
WRITTEN_BY_THE_METRICS = ("prometheus.yml", "alerts.yml", "grafana")
"""Below deploy/observability, what the dashboards and rules bring."""


def compose_config(*files: str, profile: str | None = None, **environ: str) -> dict[str, Any]:
    """The configuration that docker-compose reads from the files, with only these variables set."""
    require_program("docker-compose")
    config: dict[str, Any] = yaml.safe_load(_config(files, profile, tuple(environ.items())))
    return config


@functools.cache
def _config(files: Sequence[str], profile: str | None, environ: Sequence[tuple[str, str]]) -> str:
    options = [word for name in ("docker-compose.yml", *files) for word in ("-f", name)]
    profiles = ["--profile", profile] if profile else []
    # An empty file in place of a developer's own .env.
    with tempfile.NamedTemporaryFile(suffix=".env") as empty:
        done = subprocess.run(
            ["docker-compose", "--env-file", empty.name, *options, *profiles, "config"],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **dict(environ)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def services_of(name: str) -> dict[str, dict[str, Any]]:
    """A compose file's services as they are written, before any variable is filled in."""
    services: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / name).read_text())["services"]
    return services


def seconds(duration: str) -> float:
    """The seconds of a duration as compose writes it: 40s, 1m30s."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(n) * units[unit] for n, unit in re.findall(r"([\d.]+)([hms])", duration))


@pytest.mark.parametrize("profile", PROFILES)
def test_the_compose_file_is_valid(profile: str | None) -> None:
    config = compose_config(profile=profile)
    assert {"redis", "llm-sidecar"} <= config["services"].keys()


@pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES.keys())
def test_the_overrides_are_valid(overrides: list[str]) -> None:
    compose_config(*overrides, **HOST_FOLDERS)


def test_only_redis_and_the_sidecar_start_without_a_profile() -> None:
    services = services_of("docker-compose.yml")
    assert {name for name, service in services.items() if "profiles" not in service} == {
        "redis",
        "llm-sidecar",
    }


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("service", [*SIDECARS, "chatterbox"])
def test_the_settings_take_what_compose_sets(service: str, profile: str | None) -> None:
    settings = Settings.from_environ(environment(compose_config(profile=profile), service))
    assert settings.events.url.get_secret_value() == "redis://redis:6379/0"


def environment(config: dict[str, Any], service: str) -> dict[str, str]:
    """What a service's container gets; a variable that is passed on and not set has no value."""
    variables = config["services"][service]["environment"]
    return {name: str(value) for name, value in variables.items() if value is not None}


@pytest.mark.parametrize("service", SIDECARS)
def test_the_demo_answers_unless_real_models_are_mounted(service: str) -> None:
    assert Settings.from_environ(environment(compose_config(), service)).models.demo
    real = compose_config("docker-compose.models.yml", SIDECAR_DEMO="true", **HOST_FOLDERS)
    assert not Settings.from_environ(environment(real, service)).models.demo


@pytest.mark.parametrize("service", SIDECARS)
def test_real_models_are_mounted_read_only_where_the_sidecar_looks(service: str) -> None:
    real = compose_config("docker-compose.models.yml", **HOST_FOLDERS)
    mounts = {
        mount["target"]: mount
        for mount in real["services"][service]["volumes"]
        if isinstance(mount, dict)
    }
    assert mounts[str(DEFAULT_PHI3.parent)]["source"] == "/srv/phi3"
    # The folder and not a file in it, so that the model file may have any name.
    settings = Settings.from_environ(environment(real, service))
    assert settings.models.phi3_path == DEFAULT_PHI3.parent
    assert mounts[str(DEFAULT_HERMES)]["source"] == "/srv/hermes"
    assert all(mount["read_only"] for mount in mounts.values())


@pytest.mark.parametrize("service", SIDECARS)
def test_the_container_is_not_killed_within_the_grace_period(service: str) -> None:
    config = compose_config(profile="scale")
    limits = Settings.from_environ(environment(config, service)).limits
    needed = limits.shutdown_drain + limits.shutdown_grace + 15
    assert seconds(config["services"][service]["stop_grace_period"]) > needed


def test_a_variable_without_a_value_does_not_take_away_one_of_the_image() -> None:
    in_the_image = set(re.findall(r"^ENV (\w+)=|^    (\w+)=\S+ ?\\?$", DOCKERFILE, re.MULTILINE))
    names = {name for pair in in_the_image for name in pair if name}
    assert {"PRELOAD_MODELS", "PATH"} <= names
    for service in services_of("docker-compose.yml").values():
        variables = service.get("environment", {})
        assert not {name for name in names & variables.keys() if variables[name] is None}


def test_every_setting_can_be_given_to_the_compose_file() -> None:
    variables = services_of("docker-compose.yml")["llm-sidecar"]["environment"].keys()
    # Paths inside the container stay as they are: what changes is what is mounted there.
    paths = {
        "MICRO_LLM_MODEL_PATH",
        "HERMES_MODEL_PATH",
        "PHI3_ADAPTER_DIR",
        "CHATTERBOX_MODEL_DIR",
        "LANCEDB_LOG_DIR",
    }
    assert variables >= ALIASES - paths


@pytest.mark.parametrize("name", ["Dockerfile", *COMPOSE_FILES])
def test_every_variable_is_a_setting_or_documented(name: str) -> None:
    text = (ROOT / name).read_text()
    used = set(re.findall(r"\$\{(\w+)", text)) | set(re.findall(r"^ARG (\w+)", text, re.MULTILINE))
    if name != "Dockerfile":
        for service, content in services_of(name).items():
            # The variables of Grafana, Redis and the object store are in their own documentation.
            if service not in ("grafana", "redis", "store"):
                used |= content.get("environment", {}).keys()
    unknown = {variable for variable in used - ALIASES if f"`{variable}`" not in CONFIGURATION}
    assert not unknown


def test_every_path_that_the_dockerfile_copies_is_there() -> None:
    copies = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+)$", DOCKERFILE, re.MULTILINE)
    sources = [source for line in copies for source in line.split()[:-1]]
    assert {"llm_sidecar", "osiris", "requirements.txt"} <= set(sources)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for source in sources:
        assert (ROOT / source).exists(), source
        # Everything is ignored but what is named.
        assert f"!{source}" in ignored


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_every_image_is_pinned(name: str) -> None:
    images = [service["image"] for service in services_of(name).values() if "image" in service]
    for image in images:
        tag = image.partition(":")[2].replace("${SIDECAR_TAG:-", "").replace("}", "")
        # Releases of SeaweedFS have two numbers.
        numbers = r"\d+\.\d+" if "seaweedfs" in image else r"v?\d+\.\d+\.\d+"
        assert re.match(numbers, tag), image


def test_the_base_image_is_pinned_and_the_same_everywhere() -> None:
    base = re.search(r"^ARG PYTHON_IMAGE=(.+)$", DOCKERFILE, re.MULTILINE)
    assert base is not None
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base[1])
    assert (
        base[1] in services_of("docker-compose.yml")["llm-sidecar"]["build"]["args"]["PYTHON_IMAGE"]
    )
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", DOCKERFILE, re.MULTILINE)
    known = {"${PYTHON_IMAGE}"} | {name for _, name in stages}
    assert {source for source, _ in stages} <= known


@pytest.mark.parametrize("service", ["llm-sidecar", "chatterbox"])
def test_the_build_takes_its_target_and_arguments(service: str) -> None:
    build = services_of("docker-compose.yml")[service]["build"]
    assert f" AS {build['target']}\n" in DOCKERFILE
    assert build["args"].keys() <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))


def test_no_service_can_do_more_than_it_needs() -> None:
    for name, config in services_of("docker-compose.yml").items():
        assert config["read_only"] is True, name
        assert config["cap_drop"] == ["ALL"], name
        assert config["security_opt"] == ["no-new-privileges:true"], name


def test_the_images_run_as_a_user_that_is_not_root() -> None:
    for stage in ("sidecar", "chatterbox"):
        body = re.split(rf"^FROM base AS {stage}$", DOCKERFILE, flags=re.MULTILINE)[1]
        assert "\nUSER 10001:10001\n" in re.split(r"^FROM ", body, flags=re.MULTILINE)[0]


def test_only_this_machine_reaches_the_published_ports() -> None:
    services: dict[str, Any] = {}
    for profile in PROFILES:
        services |= compose_config(profile=profile)["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 4
    for port in ports:
        text = port if isinstance(port, str) else port.get("host_ip", "")
        assert text.startswith("127.0.0.1"), port


def test_the_container_starts_the_server_without_a_shell() -> None:
    commands = re.findall(r"^CMD (.+)$", DOCKERFILE, re.MULTILINE)
    assert json.loads(commands[0]) == [
        *("python", "-m", "osiris"),
        *("--host", "0.0.0.0", "--port", "8000"),
    ]
    assert all(isinstance(json.loads(command), list) for command in commands)


def test_what_is_mounted_from_the_repository_is_there() -> None:
    mounted = set()
    for service in services_of("docker-compose.yml").values():
        for volume in service.get("volumes", []):
            if isinstance(volume, str) and volume.startswith("./"):
                mounted.add(Path(volume.partition(":")[0]))
    observability = Path("deploy/observability")
    assert mounted == {
        observability / "prometheus.yml",
        observability / "alerts.yml",
        observability / "otel-collector.yml",
        observability / "grafana" / "provisioning",
        observability / "grafana" / "dashboards",
        Path("deploy/scale/haproxy.cfg"),
    }
    missing = {path for path in mounted if not (ROOT / path).exists()}
    if missing and not any(
        (ROOT / observability / name).exists() for name in WRITTEN_BY_THE_METRICS
    ):
        pytest.skip("the dashboards and rules are not in the tree yet")
    assert not missing


def test_the_collectors_pipeline_names_parts_that_it_has() -> None:
    config = yaml.safe_load((ROOT / "deploy/observability/otel-collector.yml").read_text())
    for pipeline in config["service"]["pipelines"].values():
        for kind, names in pipeline.items():
            assert set(names) <= config[kind].keys()


# Two sidecars


def test_two_sidecars_share_redis_and_the_object_store_and_nothing_else() -> None:
    config = compose_config(profile="scale", SIDECAR_API_KEYS="desk=0123456789abcdef")
    both = [config["services"][name] for name in ("sidecar-a", "sidecar-b")]
    one, other = (dict(service) for service in both)
    assert (one.pop("volumes"), other.pop("volumes")) == (
        ["log-a:/app/lancedb_log:rw"],
        ["log-b:/app/lancedb_log:rw"],
    )
    assert one == other
    settings = Settings.from_environ(environment(config, "sidecar-a"))
    assert settings.database.uri == "s3://osiris/lancedb"
    assert settings.database.s3_endpoint == "http://store:8333"
    assert [key.name for key in settings.access.api_keys] == ["desk"]
    # Not another sidecar of the same Redis, with another database.
    assert one["depends_on"].keys() == {"redis", "store"}


def test_the_object_store_and_the_sidecars_have_the_same_secret(secrets: dict[str, str]) -> None:
    config = compose_config(profile="scale", **secrets)
    assert re.fullmatch("[0-9a-f]{48}", secrets["STORE_SECRET"])
    for service in ("store", "sidecar-a", "sidecar-b"):
        variables = environment(config, service)
        assert variables["AWS_ACCESS_KEY_ID"] == "osiris"
        assert variables["AWS_SECRET_ACCESS_KEY"] == secrets["STORE_SECRET"]


def test_only_the_sidecars_reach_the_object_store() -> None:
    config = compose_config(profile="scale")
    assert config["networks"]["store"] == {"internal": True}
    networks = {name: service.get("networks", {}) for name, service in config["services"].items()}
    assert {name for name, found in networks.items() if "store" in found} == {
        "sidecar-a",
        "sidecar-b",
        "store",
    }
    assert networks["store"].keys() == {"store"}


def test_an_ending_sidecar_is_noticed_by_the_proxy() -> None:
    settings = Settings.from_environ(environment(compose_config(profile="scale"), "sidecar-a"))
    found = re.search(r"check inter (\d+)s fall (\d+) ", PROXY)
    assert found is not None
    assert settings.limits.shutdown_drain > int(found[1]) * (int(found[2]) + 1)


def test_the_proxy_waits_longer_than_a_request_may_take() -> None:
    limits = Settings.from_environ({})
    longest = max(limits.limits.request_timeout, limits.speech.timeout)
    for side in ("client", "server"):
        found = re.search(rf"timeout {side} (\d+)s", PROXY)
        assert found is not None
        assert int(found[1]) >= longest + 10


def test_the_proxy_asks_the_sidecars_of_the_compose_file() -> None:
    services = services_of("docker-compose.yml")
    found = dict(re.findall(r'server (\w) "\$\{SIDECAR_\w-([\w-]+):8000\}"', PROXY))
    assert found == {"a": "sidecar-a", "b": "sidecar-b"}
    assert services.keys() >= set(found.values())
    assert services["proxy"]["ports"] == services["llm-sidecar"]["ports"]


# Redis


@pytest.fixture
def secrets(tmp_path: Path) -> dict[str, str]:
    """What `make .env` writes into an empty folder."""
    make_env(tmp_path)
    return dict(line.split("=", 1) for line in (tmp_path / ".env").read_text().split())


def make_env(folder: Path) -> str:
    command = ["make", "--silent", "-f", str(ROOT / "Makefile"), ".env"]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True, env={"PATH": os.defpath}
    ).stdout


def redis_of(config: dict[str, Any], folder: Path) -> RedisServer:
    """A Redis with exactly the options of the compose file, with its data in a folder."""
    require_redis()
    program, *options = config["services"]["redis"]["command"]
    assert program == "redis-server"
    folder.mkdir()
    return RedisServer(*options, "--dir", str(folder))


def healthcheck(config: dict[str, Any], redis: RedisServer, **environ: str) -> int:
    """The exit status of the health check, which a container runs in its own network."""
    kind, program, *words = config["services"]["redis"]["healthcheck"]["test"]
    assert kind == "CMD"
    command = [program, "-p", str(redis.port), *words]
    environ = {"PATH": os.defpath, **config["services"]["redis"]["environment"], **environ}
    return subprocess.run(command, env=environ, capture_output=True).returncode


def test_redis_keeps_what_it_has_acknowledged_over_a_kill(tmp_path: Path) -> None:
    with redis_of(compose_config(), tmp_path / "data") as redis:
        with Redis(port=redis.port, decode_responses=True) as client:
            added = client.xadd("osiris.events", {"data": "1"})
            kept = client.config_get("appendfsync", "maxmemory-policy", "save")
            limit = client.config_get("client-output-buffer-limit")
            assert kept == {"appendfsync": "always", "maxmemory-policy": "noeviction", "save": ""}
            assert f"pubsub {256 << 20} {64 << 20} 60" in limit["client-output-buffer-limit"]
        redis.kill()
        redis.start()
        with Redis(port=redis.port, decode_responses=True) as client:
            assert client.xrange("osiris.events") == [(added, {"data": "1"})]


def test_redis_writes_its_data_to_a_volume() -> None:
    config = compose_config()
    assert config["services"]["redis"]["volumes"] == ["redis-data:/data:rw"]
    assert "redis-data" in config["volumes"]


def test_a_full_redis_refuses_entries_and_keeps_those_that_it_has(tmp_path: Path) -> None:
    config = compose_config(REDIS_MAXMEMORY="3mb")
    with (
        redis_of(config, tmp_path / "data") as redis,
        Redis(port=redis.port, decode_responses=True) as client,
    ):
        added = []
        with pytest.raises(OutOfMemoryError):
            while True:
                added.append(client.xadd("osiris.events", {"data": "x" * 10_000}))
        assert [entry for entry, _ in client.xrange("osiris.events")] == added


def test_the_password_of_make_env_is_that_of_redis_and_of_the_services(
    secrets: dict[str, str], tmp_path: Path
) -> None:
    config = compose_config(profile="speech", **secrets)
    password = secrets["REDIS_PASSWORD"]
    assert re.fullmatch("[0-9a-f]{48}", password)
    for service in ("llm-sidecar", "chatterbox"):
        url = environment(config, service)["REDIS_URL"]
        assert url == f"redis://:{password}@redis:6379/0"
        Settings.from_environ({"REDIS_URL": url})
    with redis_of(config, tmp_path / "data") as redis:
        inside = url.replace("redis:6379", f"127.0.0.1:{redis.port}")
        with Redis.from_url(inside) as client:
            assert client.ping()
        once = Retry(NoBackoff(), 0)
        with Redis(port=redis.port, retry=once) as stranger, pytest.raises(AuthenticationError):
            stranger.ping()
        assert healthcheck(config, redis) == 0
        assert healthcheck(config, redis, REDISCLI_AUTH="wrong") != 0


def test_without_a_password_redis_has_none(tmp_path: Path) -> None:
    config = compose_config()
    assert environment(config, "llm-sidecar")["REDIS_URL"] == "redis://redis:6379/0"
    with (
        redis_of(config, tmp_path / "data") as redis,
        Redis(port=redis.port) as client,
    ):
        assert client.ping()
        assert healthcheck(config, redis) == 0


def test_make_env_keeps_what_the_file_has_and_is_private(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("SIDECAR_API_KEYS=desk=0123456789abcdef")
    make_env(tmp_path)
    written = file.read_text()
    assert written.startswith("SIDECAR_API_KEYS=desk=0123456789abcdef\n")
    assert re.findall("^([A-Z_]+)=", written, re.MULTILINE) == [
        "SIDECAR_API_KEYS",
        "REDIS_PASSWORD",
        "REDIS_URL",
        "STORE_SECRET",
    ]
    assert make_env(tmp_path) == ".env already names a Redis\n"
    assert file.read_text() == written
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    make_env(fresh)
    assert (fresh / ".env").stat().st_mode & 0o777 == 0o600


def test_neither_git_nor_an_image_takes_the_file_with_the_password() -> None:
    assert "/.env" in (ROOT / ".gitignore").read_text().splitlines()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert "!.env" not in ignored
