"""Tables of a namespace: opened here and in other processes, recognised, and refused in clear words."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lance
import lance_namespace
import pyarrow as pa
import pytest

from lance_dfaiss.errors import InvalidArgument, StorageError
from lance_dfaiss.lance_io import DatasetPlace, Namespace, PinnedDataset, open_dataset
from lance_dfaiss.lance_io.namespaces import namespace_of
from tests.lance_io.vending import IMPL


def write(folder: Path, name: str = "t", rows: int = 3) -> lance.LanceDataset:
    return lance.write_dataset(pa.table({"i": range(rows)}), folder / f"{name}.lance")


def vending(folder: Path, *table: str) -> Namespace:
    return Namespace(impl=IMPL, properties={"root": str(folder)}, table_id=table or ("t",))


def token_of(pinned: PinnedDataset) -> str:
    return (pinned.storage_options or {})["aws_session_token"]


@pytest.mark.parametrize(
    "table", [("t",), ("outer", "inner")], ids=["in the root of the namespace", "in a namespace within it"]
)
def test_a_table_is_opened_by_its_name(tmp_path: Path, table: tuple[str, ...]) -> None:
    lance.write_dataset(pa.table({"i": range(3)}), tmp_path.joinpath(*table).with_suffix(".lance"))
    handle = open_dataset(None, namespace=vending(tmp_path, *table))
    assert (handle.count_rows(), handle.version) == (3, 1)


def test_lances_own_directory_namespace(tmp_path: Path) -> None:
    client = lance_namespace.connect("dir", {"root": str(tmp_path)})
    lance.write_dataset(pa.table({"i": range(5)}), namespace_client=client, table_id=["words"])
    namespace = Namespace(impl="dir", properties={"root": str(tmp_path)}, table_id=("words",))
    place = DatasetPlace.of(PinnedDataset(open_dataset(None, namespace=namespace)))
    assert place.namespace == namespace
    assert place.uri == str(tmp_path / "words.lance")
    assert pickle.loads(pickle.dumps(place)).open().lance.count_rows() == 5


def test_the_namespace_of_a_handle_is_known_wherever_it_moves(tmp_path: Path) -> None:
    written = write(tmp_path)
    namespace = vending(tmp_path)
    handle = open_dataset(None, namespace=namespace)
    pinned = PinnedDataset(handle)
    written.delete("i = 0")
    assert namespace_of(handle) == namespace
    assert DatasetPlace.of(pinned).namespace == namespace
    latest = DatasetPlace.of(pinned.latest())
    assert (latest.namespace, latest.version) == (namespace, 2)
    assert DatasetPlace.of(pinned.latest().at_version(1)).namespace == namespace


def test_a_clients_own_namespace_cannot_be_asked_for(tmp_path: Path) -> None:
    write(tmp_path)
    client = lance_namespace.connect(IMPL, {"root": str(tmp_path)})
    handle = lance.dataset(namespace_client=client, table_id=["t"])
    # What the client was made from is not in it: only what it vends goes to other processes.
    place = DatasetPlace.of(PinnedDataset(handle))
    assert place.namespace is None
    assert set(place.storage_options or {}) == {"aws_session_token"}
    # Unless the caller says it.
    assert DatasetPlace.of(PinnedDataset(handle), vending(tmp_path)).namespace == vending(tmp_path)
    assert open_dataset(handle, namespace=vending(tmp_path)) is handle


@pytest.mark.parametrize("branch", [None, "side/ways"])
def test_another_process_is_given_credentials_of_its_own(tmp_path: Path, branch: str | None) -> None:
    written = write(tmp_path)
    namespace = vending(tmp_path)
    handle: Any = open_dataset(None, namespace=namespace)
    if branch is not None:
        handle = handle.create_branch(branch, 1)
    written.delete("i = 0")
    pinned = PinnedDataset(handle)
    place = pickle.loads(pickle.dumps(DatasetPlace.of(pinned)))
    there = place.open()
    assert (there.version, there.lance.count_rows(), there.root) == (pinned.version, 3, pinned.root)
    assert token_of(there) != token_of(pinned)
    assert namespace_of(there.lance) == namespace


def test_options_beside_the_namespaces(tmp_path: Path) -> None:
    write(tmp_path)
    given = {"aws_session_token": "mine", "aws_region": "here"}
    pinned = PinnedDataset(open_dataset(None, storage_options=given, namespace=vending(tmp_path)))
    assert pinned.storage_options == {"aws_region": "here", "aws_session_token": token_of(pinned)}
    assert token_of(pinned) != "mine"


def test_nothing_secret_is_shown(tmp_path: Path) -> None:
    namespace = Namespace(impl="dir", properties={"root": str(tmp_path), "storage.key": "sesame"}, table_id=("t",))
    place = DatasetPlace(uri="s3://b/t", version=1, storage_options={"secret": "sesame"}, namespace=namespace)
    assert "sesame" not in repr(namespace)
    assert "sesame" not in repr(place)


@pytest.mark.parametrize(
    ("impl", "properties", "table", "expected"),
    [
        (IMPL, {}, "nowhere", "cannot open table ['nowhere'] of a namespace of kind 'tests.lance_io.vending"),
        (IMPL, {"password": "wrong"}, "t", "the password is wrong"),
        (IMPL, {"colour": "red"}, "t", "unexpected keyword argument 'colour'"),
        ("no.such.Class", {}, "t", "cannot connect to a namespace of kind 'no.such.Class'"),
        ("dir", {"root": "/nonexistent"}, "t", "Table not found"),
    ],
)
def test_a_table_that_cannot_be_opened(
    tmp_path: Path, impl: str, properties: dict[str, str], table: str, expected: str
) -> None:
    write(tmp_path)
    namespace = Namespace(impl=impl, properties={"root": str(tmp_path), **properties}, table_id=(table,))
    with pytest.raises(InvalidArgument) as raised:
        open_dataset(None, namespace=namespace)
    assert expected in raised.value.message
    assert "where its namespace says" not in raised.value.message
    assert raised.value.remedy


@pytest.mark.parametrize(
    ("impl", "properties", "table"),
    [
        ("rest", {"uri": "http://127.0.0.1:9"}, "t"),  # the port that discards: nobody listens
        (IMPL, {"root": "/"}, "busy"),
    ],
    ids=["that cannot be reached", "that is busy"],
)
def test_a_namespace_that_does_not_answer(impl: str, properties: dict[str, str], table: str) -> None:
    namespace = Namespace(impl=impl, properties=properties, table_id=(table,))
    with pytest.raises(StorageError, match=f"a namespace of kind '{impl}' could not be asked for table"):
        open_dataset(None, namespace=namespace)
    with pytest.raises(StorageError, match="could not be asked"):
        DatasetPlace(uri="s3://b/t", version=1, namespace=namespace).open()


def test_a_table_whose_files_are_gone(tmp_path: Path) -> None:
    (tmp_path / "t.lance").mkdir()
    with pytest.raises(InvalidArgument, match=r"cannot open table \['t'\] where its namespace says that it lies"):
        open_dataset(None, namespace=vending(tmp_path))


def test_the_table_of_another_dataset(tmp_path: Path) -> None:
    handle, _ = write(tmp_path), write(tmp_path, "other")
    with pytest.raises(InvalidArgument, match=r"lies at .*other\.lance, but the handle is of .*t\.lance"):
        open_dataset(handle, namespace=vending(tmp_path, "other"))


def test_one_way_to_say_which_dataset(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(InvalidArgument, match="a URI was given together with table"):
        open_dataset(tmp_path / "t.lance", namespace=vending(tmp_path))
    with pytest.raises(InvalidArgument, match="not NoneType") as raised:
        open_dataset(None)
    assert "namespace_impl" in raised.value.remedy


@pytest.mark.parametrize(
    ("given", "parameter"),
    [
        ((None, {"root": "/"}, None), "namespace_impl"),
        ((None, None, ["t"]), "namespace_impl"),
        (("dir", {"root": "/"}, None), "table_id"),
        (("", {}, ["t"]), "namespace_impl"),
        ((7, {}, ["t"]), "namespace_impl"),
        (("dir", ["root"], ["t"]), "namespace_properties"),
        (("dir", {"root": 1}, ["t"]), "namespace_properties"),
        (("dir", {}, "t"), "table_id"),
        (("dir", {}, []), "table_id"),
        (("dir", {}, ["a", ""]), "table_id"),
        (("dir", {}, [1]), "table_id"),
    ],
)
def test_half_a_namespace(given: Any, parameter: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        Namespace.of_parameters(*given)
    assert raised.value.parameter == parameter


def test_no_namespace_at_all(tmp_path: Path) -> None:
    assert Namespace.of_parameters(None, None, None) is None
    assert namespace_of(write(tmp_path)) is None
