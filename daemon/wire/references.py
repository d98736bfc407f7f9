"""Reference store: where each model version's reference is kept, in a folder or behind an fsspec URL."""

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any, Protocol

_PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ATTEMPTS = 20
_REMEDY = "write it again with a retraining, or delete the digest file so that the version is learned anew"


class ReferenceStoreError(Exception):
    """Base of what goes wrong here; the message says what, where and what to do."""

    exit_code = 1


class CorruptReference(ReferenceStoreError):
    """The bytes are not those that were written; nothing may be judged by them."""


class ReferencesUnavailable(ReferenceStoreError):
    """The storage could not be reached or refused us; trying again later may help."""


class _Files(Protocol):
    """What the store needs of a place: whole files, replaced at once."""

    def read(self, path: str) -> bytes | None: ...
    def replace(self, path: str, data: bytes) -> None: ...
    def delete(self, path: str) -> None: ...
    def url_of(self, path: str) -> str: ...


class ReferenceStore:
    """
    One data file per version, named by its digest, and beside it the digest file that points to it.

    The digest file is replaced last and at once, so a reader finds the old reference or the new one,
    never a half; `sha256sum --check` understands it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._files: _Files = (
            _RemoteFiles(url) if "://" in url and not url.startswith("file://") else _Folder(url)
        )

    def write(self, model: str, version: str, data: bytes) -> str:
        """Stores the bytes durably and returns their SHA-256; writing the same again changes nothing."""
        digest = hashlib.sha256(data).hexdigest()
        pointer = _digest_path(model, version)
        before = self._replaced(pointer)
        path = _data_path(model, version, digest)
        self._files.replace(path, data)
        self._files.replace(pointer, f"{digest}  {path.rsplit('/', 1)[-1]}\n".encode())
        if before is not None and before != digest:
            self._files.delete(_data_path(model, version, before))
        return digest

    def read(self, model: str, version: str) -> tuple[bytes, str] | None:
        """The bytes and their digest, or None for a version that has no reference."""
        pointer = _digest_path(model, version)
        digest = self._pointed_to(pointer)
        for _ in range(_ATTEMPTS):
            if digest is None:
                return None
            data = self._files.read(_data_path(model, version, digest))
            if data is not None:
                return self._verified(pointer, data, digest), digest
            # Gone, because somebody replaced the reference between our two reads, or for good.
            before, digest = digest, self._pointed_to(pointer)
            if digest == before:
                break
        raise CorruptReference(f"{self._files.url_of(pointer)} names a file that is not there: {_REMEDY}")

    def url_of(self, model: str, version: str) -> str:
        """Where the version's digest file is, for messages and links."""
        return self._files.url_of(_digest_path(model, version))

    def _verified(self, pointer: str, data: bytes, digest: str) -> bytes:
        if hashlib.sha256(data).hexdigest() == digest:
            return data
        shown = self._files.url_of(pointer)
        raise CorruptReference(f"{shown}: the reference is not what was written: {_REMEDY}")

    def _replaced(self, pointer: str) -> str | None:
        """A digest file that cannot be read is what this writing mends."""
        try:
            return self._pointed_to(pointer)
        except CorruptReference:
            return None

    def _pointed_to(self, pointer: str) -> str | None:
        content = self._files.read(pointer)
        if content is None:
            return None
        digest = content[:64].decode("ascii", "replace")
        if not _DIGEST.fullmatch(digest):
            raise CorruptReference(f"{self._files.url_of(pointer)} holds no SHA-256 digest: {_REMEDY}")
        return digest


def file_name_of(name: str) -> str:
    """
    A file name for any model or version name: itself if it is plain, else a likeness and a digest.

    >>> file_name_of("fraud"), file_name_of("../Fraud")
    ('fraud', 'fraud~ec96cafe5e7467d7')
    """
    if _PLAIN_NAME.fullmatch(name) and not name.endswith("."):
        return name
    likeness = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
    # A plain name has no tilde, and upper case is not plain: no two names meet, on any file system.
    return f"{likeness}~{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def _digest_path(model: str, version: str) -> str:
    return f"{file_name_of(model)}/{file_name_of(version)}.sha256"


def _data_path(model: str, version: str, digest: str) -> str:
    return f"{file_name_of(model)}/{file_name_of(version)}.{digest[:16]}.reference"


class _Folder:
    """A local folder: temporary file, fsync, rename."""

    def __init__(self, url: str) -> None:
        self._root = Path(url.removeprefix("file://")).absolute()

    def read(self, path: str) -> bytes | None:
        try:
            return (self._root / path).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unavailable(path, error) from error

    def replace(self, path: str, data: bytes) -> None:
        target = self._root / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=".writing-")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).chmod(0o644)
                Path(temporary).replace(target)
                _sync_folder(target.parent)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise self._unavailable(path, error) from error

    def delete(self, path: str) -> None:
        (self._root / path).unlink(missing_ok=True)

    def url_of(self, path: str) -> str:
        return (self._root / path).as_uri()

    def _unavailable(self, path: str, error: OSError) -> ReferencesUnavailable:
        return ReferencesUnavailable(
            f"{self._root / path}: {error.strerror or error}; may we write to registry.references_url?"
        )


def _sync_folder(folder: Path) -> None:
    """Without this a renamed file can be gone after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _RemoteFiles:
    """
    Anything that fsspec reaches. Object stores put a whole object or none; others get a rename.

    Each file system raises its own library's errors, so all of them become ours here.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._opened: tuple[Any, str] | None = None

    def _system(self) -> tuple[Any, str]:
        if self._opened is None:
            try:
                from fsspec.core import url_to_fs

                self._opened = url_to_fs(self._url)
            except (ImportError, ValueError, OSError) as error:
                scheme = self._url.split("://", 1)[0]
                raise ReferencesUnavailable(
                    f"registry.references_url {scheme}://...: {error}; install what fsspec needs for {scheme}"
                ) from error
        return self._opened

    def read(self, path: str) -> bytes | None:
        system, root = self._system()
        try:
            # A directory listing may be cached, and with it the answer of yesterday.
            system.invalidate_cache()
            return bytes(system.cat_file(f"{root}/{path}"))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._unavailable(path, error) from error

    def replace(self, path: str, data: bytes) -> None:
        system, root = self._system()
        target = f"{root}/{path}"
        temporary = f"{target}.writing-{os.urandom(8).hex()}"
        try:
            system.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            if _puts_whole_objects(system):
                system.pipe_file(target, data)
            else:
                system.pipe_file(temporary, data)
                system.mv(temporary, target)
        except Exception as error:
            raise self._unavailable(path, error) from error

    def delete(self, path: str) -> None:
        system, root = self._system()
        try:
            system.rm_file(f"{root}/{path}")
        except FileNotFoundError:
            return
        except Exception as error:
            raise self._unavailable(path, error) from error

    def url_of(self, path: str) -> str:
        # A URL may carry a password, and this one is shown.
        return re.sub(r"//[^/@]*@", "//", f"{self._url}/{path}")

    def _unavailable(self, path: str, error: Exception) -> ReferencesUnavailable:
        return ReferencesUnavailable(
            f"{self.url_of(path)}: {type(error).__name__}: {error}; are the credentials for this place in "
            "the environment, and may they read and write it?"
        )


def _puts_whole_objects(system: Any) -> bool:
    protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
    return bool(protocols & {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory"})
