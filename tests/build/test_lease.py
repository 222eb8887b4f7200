"""Leases: held, renewed, lost, given back."""

# ruff: noqa: PT012 (what a block ends with is what a lease makes of it)

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from time import monotonic

import pytest

from lance_dfaiss.build.lease import CLOCK_MARGIN, Lease, holds, is_leased, newest_terms, read_terms
from lance_dfaiss.errors import InvalidArgument, LeaseExpired, MissingFile, StorageError
from lance_dfaiss.storage import LocalStore

GENERATION = "00000000-0000-4000-8000-000000000000"


class Clock:
    """A time of day that goes by hand."""

    def __init__(self) -> None:
        self.now = datetime(2030, 1, 1, tzinfo=timezone.utc)

    def __call__(self) -> datetime:
        return self.now

    def forward(self, **time: float) -> None:
        self.now += timedelta(**time)


class Store(LocalStore):
    """A store whose writes can be made to fail, and tell that they were tried."""

    failure: Exception | None = None

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.tried = threading.Semaphore(0)

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        try:
            if self.failure is not None:
                raise self.failure
            with super().create(name) as path:
                yield path
        finally:
            self.tried.release()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let leases of ten minutes be renewed every tenth of a second."""
    monkeypatch.setattr("lance_dfaiss.build.lease._RENEWALS_PER_TERM", 6000)


def hold(store: Store, clock: Clock, seconds: float = 600) -> Lease:
    return Lease.hold(store, GENERATION, root="/data", seconds=seconds, clock=clock)


def names(store: Store) -> list[str]:
    return [file.name for file in store.list("")]


def test_a_lease_is_a_document_and_goes_with_success(store: Store, clock: Clock) -> None:
    with hold(store, clock) as lease:
        lease.check()
        assert names(store) == [f"{GENERATION}/lease-00000001-{lease.holder}.json"]
        (term,) = read_terms(store, names(store))
        assert (term.generation, term.holder, term.number, term.root) == (GENERATION, lease.holder, 1, "/data")
        assert (term.begins, term.ends) == (clock.now, clock.now + timedelta(minutes=10))
        assert is_leased(store, GENERATION, clock=clock)
    assert names(store) == []
    assert not is_leased(store, GENERATION, clock=clock)


def test_after_an_error_it_says_that_it_was_given_back(store: Store, clock: Clock) -> None:
    with pytest.raises(KeyError), hold(store, clock):
        raise KeyError("failed")
    assert names(store) == [], "there is nothing to be dated"
    LocalStore(Path(store.location)).write(f"{GENERATION}/plan.json", b"{}")
    with pytest.raises(KeyError), hold(store, clock) as lease:
        raise KeyError("failed")
    assert len(names(store)) == 3
    (newest,) = newest_terms(names(store))[GENERATION]
    (term,) = read_terms(store, [newest])
    assert (term.number, term.holder, term.given_back) == (2, lease.holder, True)
    assert not is_leased(store, GENERATION, clock=clock)


def test_renewed_by_hand_it_goes_on(store: Store, clock: Clock) -> None:
    with hold(store, clock) as lease:
        for number in (2, 3):
            clock.forward(minutes=9)
            lease.renew()
            lease.check()
            assert newest_terms(names(store))[GENERATION] == [f"{GENERATION}/lease-{number:08d}-{lease.holder}.json"]
    assert names(store) == []


@pytest.mark.usefixtures("eager")
def test_the_thread_renews_it(store: Store, clock: Clock) -> None:
    with hold(store, clock) as lease:
        for _ in range(4):
            assert store.tried.acquire(timeout=30)
        assert any("lease-00000003-" in name for name in names(store))
        assert "lance-dfaiss-lease" in {thread.name for thread in threading.enumerate()}
    assert "lance-dfaiss-lease" not in {thread.name for thread in threading.enumerate()}
    assert lease.generation == GENERATION
    assert names(store) == []


def test_run_out_it_is_lost_for_good(store: Store, clock: Clock) -> None:
    with pytest.raises(LeaseExpired) as caught, hold(store, clock) as lease:
        clock.forward(minutes=10)
        with pytest.raises(LeaseExpired):
            lease.check()
        clock.forward(minutes=-5)  # even if the time of day is put back
        with pytest.raises(LeaseExpired):
            lease.renew()
        lease.check()
    assert caught.value.generation == GENERATION
    assert caught.value.expired_at == "2030-01-01T00:10:00+00:00"
    assert isinstance(caught.value, TimeoutError)
    assert "resume=True" in caught.value.remedy


def test_a_time_of_day_that_was_put_back_does_not_prolong_it(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LeaseExpired), hold(store, clock) as lease:
        clock.forward(hours=-3)
        lease.check()
        ahead = monotonic() + 600
        monkeypatch.setattr("lance_dfaiss.build.lease.monotonic", lambda: ahead)
        lease.check()


@pytest.mark.usefixtures("eager")
def test_a_failed_renewal_is_the_cause_in_the_end(store: Store, clock: Clock) -> None:
    with pytest.raises(LeaseExpired) as caught, hold(store, clock) as lease:
        store.failure = StorageError("no room", location="here")
        assert store.tried.acquire(timeout=30)  # the first term
        assert store.tried.acquire(timeout=30)
        assert store.tried.acquire(timeout=30)  # by now the one before is noted
        lease.check()  # what is left of the first term still holds
        clock.forward(minutes=11)
        lease.check()
    assert caught.value.__cause__ is store.failure


@pytest.mark.usefixtures("eager")
def test_a_failed_renewal_is_tried_again(store: Store, clock: Clock) -> None:
    with hold(store, clock) as lease:
        assert store.tried.acquire(timeout=30)
        store.failure = StorageError("a moment", location="here")
        assert store.tried.acquire(timeout=30)
        store.failure = None
        while len(names(store)) < 2:
            assert store.tried.acquire(timeout=30)
        lease.check()


@pytest.mark.usefixtures("eager")
def test_a_fault_of_the_program_is_told_at_once(store: Store, clock: Clock) -> None:
    with pytest.raises(ZeroDivisionError), hold(store, clock) as lease:
        store.failure = ZeroDivisionError()
        assert store.tried.acquire(timeout=30)
        assert store.tried.acquire(timeout=30)
        store.failure = None
        while True:  # until the thread has noted it
            lease.check()


def test_missing_files_of_a_lost_lease_are_explained(store: Store, clock: Clock) -> None:
    gone = MissingFile("gone", location="here")
    with pytest.raises(LeaseExpired) as caught, hold(store, clock):
        clock.forward(hours=1)
        raise gone
    assert caught.value.__cause__ is gone
    with pytest.raises(MissingFile), hold(store, clock):
        raise gone


def test_it_cannot_begin_where_nothing_can_be_written(store: Store, clock: Clock) -> None:
    store.failure = StorageError("no room", location="here")
    with pytest.raises(StorageError, match="no room"), hold(store, clock):
        pytest.fail("must not begin")
    with pytest.raises(InvalidArgument):
        hold(store, clock, seconds=0)


def test_what_cannot_be_given_back_ends_by_itself(store: Store, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    LocalStore(Path(store.location)).write(f"{GENERATION}/plan.json", b"{}")
    with pytest.raises(KeyError), hold(store, clock):
        store.failure = StorageError("no room", location="here")
        raise KeyError("failed")
    assert "could not be given back" in caplog.text
    assert is_leased(store, GENERATION, clock=clock)
    clock.forward(minutes=16)
    assert not is_leased(store, GENERATION, clock=clock)


def test_two_may_hold_one_generation(store: Store, clock: Clock) -> None:
    with hold(store, clock) as one:
        with hold(store, clock) as two:
            assert one.holder != two.holder
            assert len(newest_terms(names(store))[GENERATION]) == 2
        one.check()
        assert is_leased(store, GENERATION, clock=clock)


def test_others_wait_for_clocks_that_are_behind(store: Store, clock: Clock) -> None:
    with hold(store, clock):
        (term,) = read_terms(store, names(store))
    assert holds(term, term.ends + CLOCK_MARGIN - timedelta(seconds=1))
    assert not holds(term, term.ends + CLOCK_MARGIN)


def test_other_files_are_no_terms() -> None:
    assert newest_terms([f"{GENERATION}/lease.json", f"{GENERATION}/lease-1-x.json", "lease-00000001-a.json"]) == {}
    assert newest_terms([f"{GENERATION}/lease-{n:08d}-ab.json" for n in (1, 99999999, 100000000)]) == {
        GENERATION: [f"{GENERATION}/lease-100000000-ab.json"]
    }


def test_terms_that_are_gone_were_given_back(store: Store) -> None:
    assert read_terms(store, [f"{GENERATION}/lease-00000001-ab.json"]) == []
