"""The wheel: what is in it, and that it runs from a folder whose packages have our packages' names."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest

from daemon.wire.local_kafka import free_port
from daemon.wire.local_prefect import LocalPrefectServer

ROOT = Path(__file__).parents[2]
BUILD = "import sys, setuptools.build_meta as build; print(build.build_wheel(sys.argv[1]))"
# What pip writes for `[project.scripts]`.
SCRIPT = "import sys\nfrom daemon.cli import main\nsys.exit(main())\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of what git has, unpacked as an installer would."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", BUILD, str(target)], cwd=source, check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    (target / "bin").mkdir()
    (target / "bin" / "retrain-daemon").write_text(SCRIPT)
    return target


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    for package in ("daemon", "flows", "monitors", "docker"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    return tmp_path


def environment(installed: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(installed), **more}


def test_every_package_and_schema_is_in_it(installed: Path) -> None:
    modules = [path for package in ("daemon", "flows", "monitors") for path in (ROOT / package).rglob("*.py")]
    schemas = list((ROOT / "monitors" / "schema").glob("*.json"))
    assert len(modules) > 50 and len(schemas) == 2
    for path in modules + schemas:
        assert (installed / path.relative_to(ROOT)).is_file(), path
    assert not (installed / "tests").exists()


@pytest.mark.kafka
@pytest.mark.prefect
def test_the_installed_daemon_runs_whatever_lies_in_its_folder(
    installed: Path, hostile_folder: Path, kafka: Any, prefect_server: LocalPrefectServer
) -> None:
    port, command = free_port(), [sys.executable, str(installed / "bin" / "retrain-daemon")]
    env = environment(
        installed,
        **prefect_server.environment,
        RETRAIN_DAEMON_HTTP__PORT=str(port),
        RETRAIN_DAEMON_KAFKA__DEAD_LETTER_TOPIC=kafka.topic(),
        RETRAIN_DAEMON_KAFKA__GROUP=kafka.name("group"),
    )
    asked = ["init", "--model", "fraud", "--topic", kafka.topic()]
    asked += ["--bootstrap-servers", kafka.bootstrap_servers]
    subprocess.run([*command, *asked], cwd=hostile_folder, env=env, check=True, capture_output=True)
    with (hostile_folder / "daemon.log").open("wb") as log:
        daemon = subprocess.Popen([*command, "start"], cwd=hostile_folder, env=env, stdout=log, stderr=log)
    try:
        assert answers(f"http://127.0.0.1:{port}/readyz"), (hostile_folder / "daemon.log").read_text()
        running = Path(f"/proc/{daemon.pid}/cmdline")
        assert not running.exists() or str(installed) in running.read_text()
    finally:
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(120) == 0


def answers(url: str, seconds: float = 180.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2) as response:
                return bool(response.status == 200)
        except OSError:  # nobody there yet, or not answering yet
            time.sleep(0.2)
    return False
