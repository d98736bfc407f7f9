"""The reference store keeps the same promises in a folder and behind fsspec URLs."""

import hashlib
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.wire.references import CorruptReference, ReferenceStore, ReferencesUnavailable, file_name_of


@pytest.fixture(params=["folder", "file-url", "memory", "rename"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield {
        "folder": str(tmp_path / "references"),
        "file-url": (tmp_path / "references").as_uri(),
        "memory": "memory://references",
        # fsspec's own view of a folder has no whole-object writes, so here files are renamed.
        "rename": f"local://{tmp_path}/references",
    }[request.param]
    fsspec.filesystem("memory").store.clear()


def files(url: str) -> dict[str, bytes]:
    system, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(root).lstrip("/"): system.cat_file(path) for path in system.find(root)}


def damage(url: str, ending: str, data: bytes) -> None:
    system, root = fsspec.core.url_to_fs(url)
    (path,) = [path for path in system.find(root) if path.endswith(ending)]
    system.pipe_file(path, data)


def test_what_was_written_is_read_with_its_digest(url: str) -> None:
    store = ReferenceStore(url)
    assert store.read("fraud", "7") is None
    digest = store.write("fraud", "7", b"rows")
    assert digest == hashlib.sha256(b"rows").hexdigest()
    assert ReferenceStore(url).read("fraud", "7") == (b"rows", digest)
    assert store.read("fraud", "8") is None and store.read("Fraud", "7") is None


def test_writing_again_replaces_and_leaves_nothing_behind(url: str) -> None:
    store = ReferenceStore(url)
    store.write("fraud", "7", b"first")
    digest = store.write("fraud", "7", b"second")
    before = files(url)
    assert store.write("fraud", "7", b"second") == digest
    assert store.read("fraud", "7") == (b"second", digest)
    assert files(url) == before and set(before) == {
        "fraud/7.sha256",
        f"fraud/7.{digest[:16]}.reference",
    }


def test_changed_bytes_are_refused_and_mended_by_writing(url: str) -> None:
    store = ReferenceStore(url)
    store.write("fraud", "7", b"rows")
    for ending in (".reference", ".sha256"):
        damage(url, ending, b"damaged")
        with pytest.raises(CorruptReference, match=r"fraud/7\.sha256.*write it again"):
            store.read("fraud", "7")
        store.write("fraud", "7", b"rows")
        assert store.read("fraud", "7") is not None


def test_a_lost_data_file_is_no_missing_reference(url: str) -> None:
    store = ReferenceStore(url)
    store.write("fraud", "7", b"rows")
    system, root = fsspec.core.url_to_fs(url)
    system.rm_file(next(path for path in system.find(root) if path.endswith(".reference")))
    with pytest.raises(CorruptReference, match="a file that is not there"):
        store.read("fraud", "7")


def test_readers_beside_a_writer_see_the_old_or_the_new(url: str) -> None:
    store = ReferenceStore(url)
    store.write("fraud", "7", b"0" * 10_000)

    def read(_: int) -> bytes:
        found = ReferenceStore(url).read("fraud", "7")
        assert found is not None
        return found[0]

    with ThreadPoolExecutor(3) as pool:
        reads = pool.map(read, range(150))
        for number in range(30):
            store.write("fraud", "7", str(number % 10).encode() * 10_000)
        assert all(len(set(data)) == 1 and len(data) == 10_000 for data in reads)


def test_sha256sum_understands_the_digest_file(tmp_path: Path) -> None:
    ReferenceStore(str(tmp_path)).write("fraud", "7", b"rows")
    checked = subprocess.run(
        ["sha256sum", "--check", "7.sha256"],
        cwd=tmp_path / "fraud",
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_a_folder_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ReferencesUnavailable, match=r"registry\.references_url"):
        ReferenceStore(str(tmp_path / "file")).write("fraud", "7", b"rows")


def test_an_unknown_scheme_says_what_is_missing() -> None:
    with pytest.raises(ReferencesUnavailable, match=r"registry\.references_url nowhere://"):
        ReferenceStore("nowhere://bucket").read("fraud", "7")


def test_a_password_in_the_url_is_not_shown() -> None:
    assert (
        ReferenceStore("sftp://me:hush@host/folder").url_of("fraud", "7")
        == "sftp://host/folder/fraud/7.sha256"
    )


@given(st.lists(st.text(), unique=True, min_size=2, max_size=8))
def test_file_names_are_plain_short_and_never_meet(names: list[str]) -> None:
    made = [file_name_of(name) for name in names]
    assert len({name.casefold() for name in made}) == len(names)
    assert all(name.isascii() and "/" not in name and 0 < len(name) <= 100 for name in made)
    assert not {"", ".", ".."} & set(made)


@pytest.mark.parametrize(
    "pair", [("fraud", "Fraud"), ("a/b", "a-b"), ("..", "."), ("\u00e9", "e\u0301"), ("v1", "v1 ")]
)
def test_names_that_look_alike_stay_apart(pair: tuple[str, str]) -> None:
    assert file_name_of(pair[0]).casefold() != file_name_of(pair[1]).casefold()
