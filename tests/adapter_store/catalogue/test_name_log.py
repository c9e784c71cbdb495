"""Names in the catalogue under the races that two servers can run into."""

from pathlib import Path

import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.catalogue.bucket import Bucket
from loraplex_adapter_store.catalogue.catalogue import Catalogue
from loraplex_adapter_store.catalogue.name_log import BURY_S, GRACE_S, NameLog
from loraplex_adapter_store.errors import RevisionConflict, StoredAdapterDamaged, UnknownAdapter
from loraplex_adapter_store.names.name_record import Content
from loraplex_adapter_store.names.name_state import NameState
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.plan import Family
from tests.adapter_store.catalogue.test_contents import age


def content(digit: str) -> Content:
    return Content(digit * 64, Family.LORA, (4,), 1, 1, "base", "0" * 64, None, f"upload-{digit}")


def put(state: NameState, digit: str, *, new: bool = False) -> NameState:
    return state.put(content(digit), PutOptions(replace=not new), n_kept=1)


def digits(state: NameState) -> str:
    return "".join(revision.content.digest[0] for revision in state.revisions)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "catalogue"


@pytest.fixture
def catalogue(folder: Path, base: BaseSpec) -> Catalogue:
    return Catalogue.open(f"file://{folder}", base)


@pytest.fixture
def names(catalogue: Catalogue) -> NameLog:
    return catalogue.names


def test_a_writer_whose_answer_was_lost_finds_that_it_won(
    names: NameLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client repeats a request without an answer, and meets its own object."""
    create = Bucket.create

    def repeated(self: Bucket, key: str, data: bytes) -> bool:
        create(self, key, data)
        return create(self, key, data)

    monkeypatch.setattr(Bucket, "create", repeated)
    _, after = names.change("x", lambda state: put(state, "1", new=True))
    assert after.number == 1
    assert names.read("x") == after


def test_a_writer_that_was_overtaken_begins_with_what_the_other_wrote(names: NameLog) -> None:
    seen: list[str] = []

    def slow(state: NameState) -> NameState:
        seen.append(digits(state))
        if len(seen) == 1:
            names.change("x", lambda other: put(other, "1"))
        return put(state, "2")

    before, after = names.change("x", slow)
    assert seen == ["", "1"]
    assert (digits(before), digits(after), after.number) == ("1", "21", 2)


def test_who_makes_a_name_anew_while_its_last_state_is_buried_overwrites_nobody(
    names: NameLog, catalogue: Catalogue, folder: Path
) -> None:
    names.change("x", lambda state: put(state, "1"))
    names.change("x", lambda state: state.deleted(None, None))
    age(folder, GRACE_S + 1)
    assert [digits(state) for state in names.states("x", catalogue.now())] == [""]
    age(folder, BURY_S + 1)
    seen: list[int] = []

    def slow(state: NameState) -> NameState:
        seen.append(state.number)
        if len(seen) == 1:
            assert names.states("x", catalogue.now()) == []
            names.change("x", lambda other: put(other, "2", new=True))
        return put(state, "3", new=True)

    with pytest.raises(RevisionConflict):
        names.change("x", slow)
    assert seen == [2, 1]
    assert digits(names.read("x")) == "2"
    assert names.newest_numbers() == {"x": 1}


def test_old_states_go_when_their_successor_is_old_and_the_newest_never(
    names: NameLog, folder: Path
) -> None:
    for digit in "123":
        names.change("x", lambda state, digit=digit: put(state, digit))  # type: ignore[misc]
    assert len(list(folder.rglob("names/_/x/*.json"))) == 3
    age(folder, GRACE_S + 1)
    names.change("x", lambda state: put(state, "4"))
    left = sorted(path.stem for path in folder.rglob("names/_/x/*.json"))
    assert left == ["0000000003", "0000000004"]  # 3 was the newest a moment ago
    assert names.read("x").last_revision == 4
    assert [told[0] for told in names.read("x").history] == [1, 2, 3, 4]


def test_names_with_slashes_and_tenants_are_kept_apart(names: NameLog) -> None:
    for name, digit in (("a", "1"), ("a/b", "2"), ("t:a", "3"), ("t:a/b", "4"), ("a.b", "5")):
        names.change(name, lambda state, digit=digit: put(state, digit))  # type: ignore[misc]
    numbers = names.newest_numbers()
    assert set(numbers) == {"a", "a/b", "t:a", "t:a/b", "a.b"}
    assert [digits(names.read(name)) for name in sorted(numbers)] == ["1", "5", "2", "3", "4"]
    assert set(names.newest_numbers("t")) == {"t:a", "t:a/b"}
    assert set(names.newest_numbers("")) == {"a", "a/b", "a.b"}


def test_a_state_of_another_name_or_with_a_flipped_bit_is_refused(
    names: NameLog, folder: Path
) -> None:
    _, state = names.change("x", lambda state: put(state, "1"))
    data = state.to_json()
    assert NameState.from_json(data, "x", 1) == state
    for name, number in (("y", 1), ("x", 2)):
        with pytest.raises(StoredAdapterDamaged):
            NameState.from_json(data, name, number)
    for at in range(len(data)):
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        try:
            read = NameState.from_json(flipped, "x", 1)
        except StoredAdapterDamaged:
            continue
        assert read == state, at  # a blank between values


def test_an_expiry_that_was_renewed_deletes_nothing(names: NameLog) -> None:
    names.change("x", lambda state: put(state, "1"))
    names.change("x", lambda state: state.expiring(100.0))
    with pytest.raises(UnknownAdapter):
        names.change("x", lambda state: state.deleted(None, 99.0))
    names.change("x", lambda state: state.expiring(200.0))
    with pytest.raises(UnknownAdapter):
        names.change("x", lambda state: state.deleted(None, 100.0))
    assert digits(names.read("x")) == "1"
    names.change("x", lambda state: state.deleted(None, 200.0))
    assert names.read("x").current is None
    assert names.read("x").last_revision == 1
