"""A server that wants an auth string and CSRF tokens: the profile opens it, others are told why not."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.ledger import Ledger
from daemon.outbox import Outbox
from daemon.wire.local_prefect import LocalPrefectServer
from daemon.wire.prefect import PrefectApi, PrefectRefused
from monitors.events import Event, Kind

pytestmark = pytest.mark.prefect


@pytest.fixture(scope="module")
def guarded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPrefectServer]:
    environment = {
        "PREFECT_SERVER_API_AUTH_STRING": "admin:right-secret",
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
    }
    with LocalPrefectServer(tmp_path_factory.mktemp("guarded"), environment=environment) as server:
        yield server


def test_the_auth_string_and_csrf_tokens_of_the_profile_apply(
    guarded_server: LocalPrefectServer, patient_api: Callable[..., PrefectApi]
) -> None:
    from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

    with (
        temporary_settings({PREFECT_API_AUTH_STRING: "admin:right-secret"}),
        patient_api(guarded_server.url) as api,
    ):
        assert api.create_variable("opened", 1)
        assert api.read_variable("opened") == 1


@pytest.mark.parametrize("auth", ["admin:wrong-secret", None])
def test_a_wrong_auth_string_is_refused_and_never_shown(
    guarded_server: LocalPrefectServer, auth: str | None
) -> None:
    from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

    with (
        temporary_settings({PREFECT_API_AUTH_STRING: auth}),
        PrefectApi(guarded_server.url) as api,
        pytest.raises(PrefectRefused, match="PREFECT_API_AUTH_STRING") as caught,
    ):
        api.create_variable("closed", 1)
    assert caught.value.status == 401
    assert "secret" not in str(caught.value)


def test_without_csrf_support_the_server_refuses(guarded_server: LocalPrefectServer) -> None:
    """So that the first test is known to have needed its tokens."""
    from prefect.settings import (
        PREFECT_API_AUTH_STRING,
        PREFECT_CLIENT_CSRF_SUPPORT_ENABLED,
        temporary_settings,
    )

    settings = {PREFECT_API_AUTH_STRING: "admin:right-secret", PREFECT_CLIENT_CSRF_SUPPORT_ENABLED: False}
    with (
        temporary_settings(settings),
        PrefectApi(guarded_server.url) as api,
        pytest.raises(PrefectRefused, match="CSRF"),
    ):
        api.create_variable("closed", 1)


def test_events_wait_for_the_right_auth_string(
    guarded_server: LocalPrefectServer, patient_api: Callable[..., PrefectApi], tmp_path: Path
) -> None:
    from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    ledger.take_over("g", "m")
    ledger.add_events([Event(kind=Kind.DATA_LOST, model="fraud", subject="here", payload={})])
    for auth, posted in (("admin:wrong-secret", 0), ("admin:right-secret", 1)):
        with (
            temporary_settings({PREFECT_API_AUTH_STRING: auth}),
            patient_api(guarded_server.url) as api,
        ):
            assert Outbox(ledger, api.post_event).deliver() == posted
        assert (ledger.waiting_count(), ledger.refused_count()) == (1 - posted, 0)
    ledger.close()
