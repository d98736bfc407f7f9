"""The container files, as far as they can be held to the code without an engine to run them."""

import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from daemon import cli
from daemon.config import load

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = ROOT / "docker" / "compose.yaml"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(yaml.safe_load(COMPOSE.read_text())["services"])


def test_the_dockerfile_passes_its_linter() -> None:
    linter = Path(sysconfig.get_path("scripts")) / "hadolint"
    found = subprocess.run([linter, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_every_command_of_ours_is_one_that_the_command_line_knows(services: dict[str, Any]) -> None:
    commands = [service["command"] for service in services.values() if "command" in service]
    ours = [command[1:] for command in commands if command[0] == "retrain-daemon"]
    assert sorted(words[0] for words in ours) == ["deploy", "start"]
    for words in ours:
        cli._parser().parse_args(words)


def test_server_and_worker_are_started_as_the_tests_start_them(services: dict[str, Any]) -> None:
    """`LocalPrefectServer` and `LocalPrefectWorker` are what the integration tests run."""
    code = (ROOT / "daemon" / "wire" / "local_prefect.py").read_text()
    for service, words in (("prefect", ("server", "start")), ("worker", ("worker", "start", "--pool"))):
        command = services[service]["command"]
        assert command[0] == "prefect"
        assert tuple(command[1 : 1 + len(words)]) == words
        assert ", ".join(f'"{word}"' for word in words) in code


def test_the_mounted_configuration_is_valid_with_the_environment_of_the_services(
    services: dict[str, Any],
) -> None:
    environment = {**services["daemon"]["environment"], "RETRAIN_DAEMON_HTTP__HOST": "0.0.0.0"}
    config = load(ROOT / "docker" / "retrain-daemon.toml", environment)
    assert config.ledger.url.startswith("postgresql+psycopg://")
    assert config.prefect.api_url == environment["PREFECT_API_URL"]
    assert str(config.http.port) in DOCKERFILE.read_text()


def test_what_the_image_copies_exists() -> None:
    for line in DOCKERFILE.read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), name


def test_the_image_does_not_run_as_root_and_says_when_it_is_well() -> None:
    lines = DOCKERFILE.read_text().splitlines()
    assert lines.index("USER 10001") < next(i for i, line in enumerate(lines) if line.startswith("CMD"))
    assert any(line.startswith("HEALTHCHECK") for line in lines)


def test_dependencies_between_services_name_services(services: dict[str, Any]) -> None:
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)


def test_no_package_marker_hides_the_docker_sdk() -> None:
    assert not (ROOT / "docker" / "__init__.py").exists()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
