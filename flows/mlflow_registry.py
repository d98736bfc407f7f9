"""The registry's MLflow form: the lock, the audit and the trust that MLflow itself does not have."""

import fcntl
import hashlib
import importlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from flows.audit import AuditRecord, Move, already_done, require_expected
from flows.registry import (
    CHAMPION,
    TAG,
    LoadedModel,
    ModelUnloadable,
    ModelVersion,
    NewModel,
    RegistryUnavailable,
    UntrustedTypes,
    audit_record,
)
from flows.schema import Schema
from monitors.settings import RegistrySettings

# What our default trainer's models hold beyond what skops trusts by itself, and nothing else.
TRUSTED_TYPES = frozenset(
    {
        "functools.partial",
        "numpy.dtype",
        "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
        "sklearn.utils.validation.check_array",
    }
)
_AUDIT = f"{TAG}audit."
_COMMITTED = f"{_AUDIT}seq"
_ARTIFACT = "model"
_FILE = "model.skops"
_SQLITE = "sqlite:///"
_DESCRIPTION = "What retrain-daemon trained, and which version is the champion."


class MlflowRegistry:
    """
    One registered model on a tracking server or in a SQLite file, whose folder is made.

    MLflow's aliases know no compare-and-set, so moves are made under a file lock. It holds between
    the processes of one host; on several hosts the deployment's concurrency limit of 1 has to.
    """

    def __init__(self, settings: RegistrySettings, model: str, trusted: Collection[str] = ()) -> None:
        self._uri = located(settings.tracking_uri)
        self.name = registered_name(model)
        self._version_tag = settings.model_version_tag
        self._trusted = TRUSTED_TYPES | frozenset(trusted)
        with self._translated():
            self._client = _client(self._uri)

    def register(self, new: NewModel) -> ModelVersion:
        """Add a version, or return the one that this request has already made."""
        from skops.io import dumps

        data = dumps(new.estimator)
        self._require_trusted(data, f"the new model of {self.name}")
        with self._locked(), self._translated():
            self._ensure_model()
            known = self.find_request(new.request)
            return known or self._registered(new, data)

    def find(self, version: str) -> ModelVersion | None:
        """The version, if it exists."""
        with self._translated(absent=True):
            return self._read(self._client.get_model_version(self.name, version))
        return None

    def find_request(self, request: str) -> ModelVersion | None:
        """The version that a request has made, if it has."""
        with self._translated():
            found = self._client.search_model_versions(
                f"name='{self.name}' and tags.`{TAG}request`='{_quoted(request)}'"
            )
        return self._read(found[0]) if found else None

    def load(self, version: str) -> LoadedModel:
        """The model, once its files are those that were registered and its types are allowed."""
        made = self.find(version)
        if made is None:
            raise ModelUnloadable(f"version {version} of {self.name} does not exist (any more)")
        if not {"artifact_digest", "schema"} <= made.tags.keys():
            raise ModelUnloadable(
                f"version {version} of {self.name} was not registered by retrain-daemon, nothing tells"
                " whether its files are the right ones: register it with flows.registry.bootstrap_champion"
            )
        with tempfile.TemporaryDirectory() as folder:
            data = self._verified(made, Path(folder))
        return LoadedModel(version, made.model_version, _loads(data), Schema.decode(made.tags["schema"]))

    def describe(self, version: str, tags: Mapping[str, str], card: str = "") -> None:
        """Add tags, and set the card."""
        with self._translated():
            for key, value in tags.items():
                self._client.set_model_version_tag(self.name, version, TAG + key, value)
            if card:
                self._client.update_model_version(self.name, version, card)

    def champion_version(self) -> str:
        """The champion's number, empty if there is none."""
        with self._translated(absent=True):
            return str(self._client.get_registered_model(self.name).aliases.get(CHAMPION, ""))
        return ""

    def audit(self) -> tuple[AuditRecord, ...]:
        """Every move that took place, the first one first; one cut short after the commit counts."""
        with self._translated(absent=True):
            return _records(self._client.get_registered_model(self.name))
        return ()

    def move(self, move: Move, fence: Callable[[], None]) -> AuditRecord:
        """Intent, alias, committed: the alias is the commit point."""
        with self._locked(), self._translated():
            model = self._client.get_registered_model(self.name)
            records = _records(model)
            if records:
                self._commit(records[-1])
            if done := already_done(records, move):
                return done
            require_expected(move, str(model.aliases.get(CHAMPION, "")))
            record = audit_record(self, len(records) + 1, move)
            text = msgspec.json.encode(record).decode()
            self._client.set_registered_model_tag(self.name, f"{_AUDIT}{record.sequence:06d}", text)
            fence()
            self._client.set_registered_model_alias(self.name, CHAMPION, move.version)
            self._commit(record)
            return record

    def _commit(self, record: AuditRecord) -> None:
        self._client.set_registered_model_tag(self.name, _COMMITTED, str(record.sequence))

    # Registering

    def _ensure_model(self) -> None:
        with self._translated(absent=True):
            self._client.get_registered_model(self.name)
            return
        self._client.create_registered_model(self.name, description=_DESCRIPTION)

    def _registered(self, new: NewModel, data: bytes) -> ModelVersion:
        run = self._started_run(new)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / _ARTIFACT
            _save(new.estimator, data, path, sorted(self._trusted))
            digest = _digest(path)
            self._client.log_artifacts(run, str(path), _ARTIFACT)
        tags = {**new.tags, "request": new.request, "run": new.run, "schema": new.schema.encode()}
        version_tags = {TAG + key: value for key, value in tags.items()} | {TAG + "artifact_digest": digest}
        if new.model_version:
            version_tags[self._version_tag] = new.model_version
        made = self._client.create_model_version(
            self.name, source=f"runs:/{run}/{_ARTIFACT}", run_id=run, tags=version_tags
        )
        if not new.model_version:
            # Only now is the number known. Without the tag the number is what is read anyway.
            number = str(made.version)
            self._client.set_model_version_tag(self.name, number, self._version_tag, new.naming(number))
        self._client.set_terminated(run)
        return self._read(self._client.get_model_version(self.name, str(made.version)))

    def _started_run(self, new: NewModel) -> str:
        experiment = self._experiment()
        mine = f"tags.`{TAG}request` = '{_quoted(new.request)}' and attributes.status = 'RUNNING'"
        for orphan in self._client.search_runs([experiment], mine):
            # Left by a run that died before there was a version; nobody would ever end it.
            self._client.set_terminated(orphan.info.run_id, "KILLED")
        tags = {TAG + "request": new.request, "prefect.flow_run_id": new.run}
        run_id = str(self._client.create_run(experiment, tags=tags).info.run_id)
        for key, value in new.parameters.items():
            self._client.log_param(run_id, key, value)
        return run_id

    def _experiment(self) -> str:
        name = f"retrain-daemon/{self.name}"
        if found := self._client.get_experiment_by_name(name):
            return str(found.experiment_id)
        location = None
        if file := sqlite_file(self._uri):
            # MLflow's own default is a folder in whatever the working folder happens to be.
            location = (file.parent / "mlflow-artifacts" / self.name).as_uri()
        return str(self._client.create_experiment(name, artifact_location=location))

    # Reading

    def _read(self, made: Any) -> ModelVersion:
        # Numbers are int on SQL stores and str over REST.
        number = str(made.version)
        tags = {key.removeprefix(TAG): value for key, value in made.tags.items() if key.startswith(TAG)}
        return ModelVersion(number, made.tags.get(self._version_tag) or number, tags)

    def _verified(self, made: ModelVersion, folder: Path) -> bytes:
        """The model's bytes, from a copy that nobody else can touch between check and use."""
        from mlflow.exceptions import MlflowException

        try:
            source = self._client.get_model_version(self.name, made.version)
            copied = Path(self._client.download_artifacts(source.run_id, _ARTIFACT, str(folder)))
            if copied.parent != folder:
                copied = Path(shutil.copytree(copied, folder / "copy"))
        except (MlflowException, OSError) as error:
            raise ModelUnloadable(
                f"the files of version {made.version} of {self.name} can't be read: {error}"
            ) from error
        if _digest(copied) != made.tags["artifact_digest"]:
            raise ModelUnloadable(
                f"the files of version {made.version} of {self.name} are not those that were registered:"
                " restore them from a backup, or roll back"
            )
        data = (copied / _FILE).read_bytes()
        self._require_trusted(data, f"version {made.version} of {self.name}")
        return data

    def _require_trusted(self, data: bytes, what: str) -> None:
        from skops.io import get_untrusted_types

        if unknown := sorted(set(get_untrusted_types(data=data)) - self._trusted):
            raise UntrustedTypes(
                f"{what} holds types that are not allowed to be loaded: {', '.join(unknown)}; if they're"
                " yours, name them in training.trusted_types"
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time; the kernel frees the lock of one that dies."""
        if file := sqlite_file(self._uri):
            path = file.parent / f".{self.name}.lock"
        else:
            digest = hashlib.sha256(f"{self._uri}|{self.name}".encode()).hexdigest()[:16]
            path = Path(tempfile.gettempdir()) / f"retrain-daemon-{os.getuid()}-{digest}.lock"
        with path.open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _translated(self, absent: bool = False) -> Iterator[None]:
        """MLflow's errors as ours; with `absent`, what is not there ends the block quietly."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except MlflowException as error:
            if absent and error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return
            raise RegistryUnavailable(f"the registry at {public(self._uri)}: {error}") from error
        except SQLAlchemyError as error:
            raise RegistryUnavailable(
                f"the registry at {public(self._uri)} has no usable database"
                f" ({type(error).__name__}): is registry.tracking_uri right?"
            ) from error


def located(uri: str) -> str:
    """The URI with a SQLite file's path made absolute, and its folder made."""
    if not uri.startswith(_SQLITE) or uri == _SQLITE:
        return uri
    path = Path(uri.removeprefix(_SQLITE)).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"{_SQLITE}{path}"


def registered_name(model: str) -> str:
    """The model's name without what MLflow forbids in one."""
    return model.replace("/", "-").replace(":", "-").replace("'", "-")


def public(uri: str) -> str:
    """The URI without a password that it may carry."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(uri).render_as_string(hide_password=True)
    except ArgumentError:
        return uri


@lru_cache(maxsize=8)
def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("mlflow.store", "mlflow.utils.environment", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Of MLflow's import and set-up, about MLflow's own code: nobody here can act on them.
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

        for name in ("mlflow.pyfunc", "mlflow.sklearn"):
            importlib.import_module(name)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def sqlite_file(uri: str) -> Path | None:
    """The file that a SQLite URI names; None of any other URI."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def _quoted(text: str) -> str:
    return text.replace("'", "")


def _records(model: Any) -> tuple[AuditRecord, ...]:
    """The committed records; an intent whose version is champion died between alias and commit."""
    committed = int(model.tags.get(_COMMITTED, "0"))
    texts = [model.tags[f"{_AUDIT}{sequence:06d}"] for sequence in range(1, committed + 1)]
    records = [msgspec.json.decode(text, type=AuditRecord) for text in texts]
    if text := model.tags.get(f"{_AUDIT}{committed + 1:06d}"):
        intent = msgspec.json.decode(text, type=AuditRecord)
        if intent.move.version == str(model.aliases.get(CHAMPION, "")):
            records.append(intent)
    return tuple(records)


def _save(estimator: Any, data: bytes, path: Path, trusted: list[str]) -> None:
    """MLflow's model folder, so that MLflow alone can load it too; the bytes are the ones we checked."""
    from importlib.metadata import version

    import mlflow.sklearn
    from skops.io import get_untrusted_types

    names = ("scikit-learn", "skops", "numpy", "pandas")
    mlflow.sklearn.save_model(
        estimator,
        str(path),
        serialization_format="skops",
        skops_trusted_types=sorted(set(get_untrusted_types(data=data)) & set(trusted)),
        pip_requirements=[f"{name}=={version(name)}" for name in names],
    )
    (path / _FILE).write_bytes(data)


def _digest(folder: Path) -> str:
    """SHA-256 over every file's name and content."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        # MLflow itself puts this one beside a model that it downloads.
        if file.is_file() and file.name != "registered_model_meta":
            digest.update(f"{file.relative_to(folder).as_posix()}\n".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _loads(data: bytes) -> Any:
    from skops.io import get_untrusted_types, loads

    return loads(data, trusted=get_untrusted_types(data=data))
