"""A secured broker: TLS by a certificate authority of our own, SASL, client certificates and ACLs."""

import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.wire.kafka_client import admin, ensure_topics, make_producer
from daemon.wire.local_kafka import LocalKafka, free_port, java_and_maven
from monitors.settings import KafkaSettings

_LOGIN = "org.apache.kafka.common.security"
# Values that nothing else is called, so that a search for them finds them or nothing.
PASSWORDS = {
    "root": "root-pw",
    "daemon": "s3cr3t'Daemon\\pass",
    "worker": "s3cr3t-Worker-pass",
    "operator": "s3cr3t-Operator-pass",
    "plain": "plain-pw",
}


class Authority:
    """A certificate authority in a folder, by openssl, and the certificates that it signs."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self.certificate = folder / f"{name}.crt"
        self._key = folder / f"{name}.key"
        self._openssl("req", "-x509", *self._new(self._key), "-out", self.certificate, "-subj", f"/CN={name}")

    def issue(self, name: str, alternative: str = "", days: int = 2) -> tuple[Path, Path]:
        """The certificate and the key of one who is called so, as PEM files."""
        key, request, certificate = (self._folder / f"{name}.{kind}" for kind in ("key", "csr", "crt"))
        self._openssl("req", *self._new(key), "-out", request, "-subj", f"/CN={name}")
        extensions = self._folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternative}\n" if alternative else "")
        signing = ("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial", "-days", days)
        self._openssl("x509", "-req", "-in", request, "-out", certificate, *signing, "-extfile", extensions)
        return certificate, key

    @staticmethod
    def _new(key: Path) -> tuple[object, ...]:
        return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key)

    @staticmethod
    def _openssl(*arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


class SecuredKafka:
    """
    A real broker where nothing is allowed that was not granted.

    `root` may do everything; `daemon`, `worker` and `operator` come by SCRAM-SHA-512, `plain` by PLAIN, and
    a client certificate opens the listener `ssl_servers`. The certificate names 127.0.0.1, and not localhost.
    """

    kind = LocalKafka.kind

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder, "our-authority")
        self.stranger = Authority(folder, "another-authority")
        certificate, key = self.authority.issue("broker", "IP:127.0.0.1")
        (folder / "broker.pem").write_text(key.read_text() + certificate.read_text())
        self.client_certificate, self.client_key = self.authority.issue("a-client")
        self._ssl_port = free_port()
        self.broker = LocalKafka(
            folder / "kafka",
            overrides=self._overrides(folder),
            format_arguments=[
                argument
                for user in ("daemon", "worker", "operator")
                for argument in ("--add-scram", f"SCRAM-SHA-512=[name={user},password={PASSWORDS[user]}]")
            ],
        )

    def _overrides(self, folder: Path) -> dict[str, str]:
        listeners = f"SASL_SSL://{{client}},SSL://127.0.0.1:{self._ssl_port},CONTROLLER://{{controller}}"
        users = " ".join(f'user_{name}="{PASSWORDS[name]}"' for name in ("root", "plain"))
        return {
            "listeners": listeners,
            "advertised.listeners": listeners,
            "listener.security.protocol.map": "SASL_SSL:SASL_SSL,SSL:SSL,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "SASL_SSL",
            "sasl.enabled.mechanisms": "SCRAM-SHA-512,PLAIN",
            "sasl.mechanism.inter.broker.protocol": "PLAIN",
            "listener.name.sasl_ssl.plain.sasl.jaas.config": (
                f"{_LOGIN}.plain.PlainLoginModule required "
                f'username="root" password="{PASSWORDS["root"]}" {users};'
            ),
            "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": (
                f"{_LOGIN}.scram.ScramLoginModule required;"
            ),
            "listener.name.ssl.ssl.client.auth": "required",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(folder / "broker.pem"),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.authority.certificate),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:root;User:ANONYMOUS;User:CN=a-client",
            "allow.everyone.if.no.acl.found": "false",
        }

    @property
    def ssl_servers(self) -> str:
        return f"127.0.0.1:{self._ssl_port}"

    def settings(self, user: str = "root", **fields: Any) -> KafkaSettings:
        """How this user comes in."""
        own = {
            "bootstrap_servers": self.broker.bootstrap_servers,
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": "PLAIN" if user in ("root", "plain") else "SCRAM-SHA-512",
            "sasl_username": user,
            "sasl_password": PASSWORDS[user],
            "ssl_cafile": str(self.authority.certificate),
            "start": "earliest",
            "session_timeout_seconds": 6.0,
        }
        return KafkaSettings(**(own | fields))

    def name(self, stem: str) -> str:
        return f"{stem}-{uuid.uuid4().hex[:8]}"

    def topic(self, stem: str = "topic") -> str:
        name = self.name(stem)
        ensure_topics(self.settings(), {name: 1})
        return name

    def produce(self, topic: str, values: list[bytes]) -> None:
        producer = make_producer(self.settings())
        for value in values:
            producer.send(topic, value=value, partition=0)
        producer.flush(timeout=30)
        producer.close(timeout=5)

    def grant(self, user: str, operation: str, kind: str, name: str) -> None:
        """Let the user do this with this topic or group."""
        with admin(self.settings()) as client:
            granted = client.create_acls([self._acl(user, operation, kind, name)])
        assert not granted["failed"]

    def revoke(self, user: str, operation: str, kind: str, name: str) -> None:
        from kafka.admin import ACLFilter

        acl = self._acl(user, operation, kind, name)
        pattern = acl.resource_pattern
        chosen = ACLFilter(acl.principal, acl.host, acl.operation, acl.permission_type, pattern)
        with admin(self.settings()) as client:
            ((_, gone, _),) = client.delete_acls([chosen])
        assert gone

    @staticmethod
    def _acl(user: str, operation: str, kind: str, name: str) -> Any:
        from kafka.admin import ACL, ACLOperation, ACLPermissionType, ResourcePattern, ResourceType

        pattern = ResourcePattern(ResourceType[kind.upper()], name)
        return ACL(f"User:{user}", "*", ACLOperation[operation.upper()], ACLPermissionType.ALLOW, pattern)


@pytest.fixture(scope="session")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    """The secured broker for the session."""
    if not java_and_maven():
        pytest.skip("needs Java and Maven")
    kafka = SecuredKafka(tmp_path_factory.mktemp("secured"))
    with kafka.broker:
        yield kafka
