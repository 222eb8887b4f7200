"""What may go is decided without looking at anything: properties of the decision."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.manage.garbage import Collection, Folder, References, is_document, plan_gc

NOW = datetime(2030, 1, 1, 12, tzinfo=timezone.utc)
AGE = timedelta(hours=1)
MARGIN = timedelta(minutes=5)
ROOT, OTHER = "/data/a", "/data/b"
BASES = (
    "manifest.json", "manifest-1.json", "plan.json", "model-1.faiss", "model-1.json", "queries-1.npz", "notes.txt",
    "shard-00000-1.faiss", "shard-00000-1.json", "shard-00000-2.json", "lease-00000001-1.json",
)  # fmt: skip

times = st.none() | st.integers(-200, 200).map(lambda minutes: NOW + timedelta(minutes=minutes))


@st.composite
def folders(draw: st.DrawFn) -> Folder:
    generation = draw(st.sampled_from("abcdef"))
    bases = draw(st.lists(st.sampled_from(BASES), unique=True))
    return Folder(
        generation=generation,
        files={f"{generation}/{base}": draw(st.none() | st.integers(0, 100)) for base in bases},
        names=frozenset(draw(st.sets(st.sampled_from(("idx", "other")), max_size=1))),
        roots=frozenset(draw(st.sets(st.sampled_from((ROOT, OTHER)), max_size=2))),
        newest=draw(times),
        held_until=draw(times),
        unreadable=draw(st.sampled_from(("", "", "of a newer format"))),
    )


stores = st.lists(folders(), unique_by=lambda folder: folder.generation)
references = st.builds(
    References,
    files=st.dictionaries(
        st.tuples(st.sampled_from("abcdef"), st.sampled_from(BASES)).map("/".join), st.just("needed"), max_size=12
    ),
    doubtful=st.dictionaries(st.sampled_from(("idx", "third")), st.just("damaged"), max_size=1),
)
roots = st.sampled_from((None, ROOT))


def plan(found: list[Folder], needed: References, root: str | None = None) -> Collection:
    return plan_gc(found, needed, now=NOW, min_age=AGE, margin=MARGIN, root=root)


@given(stores, references, roots)
def test_nothing_that_is_needed_goes(found: list[Folder], needed: References, root: str | None) -> None:
    decided = plan(found, needed, root)
    assert not set(decided.files) & set(needed.files)
    for folder in found:
        if set(folder.files) & set(needed.files):
            assert folder.generation not in decided.generations


@given(stores, references, roots)
def test_what_is_protected_is_not_touched(found: list[Folder], needed: References, root: str | None) -> None:
    decided = plan(found, needed, root)
    for folder in found:
        young = folder.newest is None or NOW - folder.newest < AGE
        held = folder.held_until is not None and folder.held_until + MARGIN > NOW
        foreign = root is not None and folder.roots != {root}
        doubtful = bool(needed.doubtful) and (not folder.names or bool(folder.names & set(needed.doubtful)))
        if young or held or foreign or doubtful or folder.unreadable:
            assert not set(decided.files) & set(folder.files)
            assert folder.generation in decided.kept
            assert folder.generation not in decided.swept


@given(stores, references, roots)
def test_all_is_accounted_for(found: list[Folder], needed: References, root: str | None) -> None:
    decided = plan(found, needed, root)
    everything = {name for folder in found for name in folder.files}
    assert set(decided.files) <= everything
    assert len(decided.files) == len(set(decided.files))
    assert sorted((*decided.generations, *decided.kept)) == sorted(folder.generation for folder in found)
    assert all(decided.kept.values())
    for folder in found:
        gone = set(decided.files) & set(folder.files)
        if folder.generation in decided.generations:
            assert gone == set(folder.files)


@given(stores, references)
def test_what_is_free_goes(found: list[Folder], needed: References) -> None:
    decided = plan(found, References(files=needed.files, doubtful={}))
    for folder in found:
        free = folder.newest is not None and NOW - folder.newest >= AGE and folder.held_until is None
        if free and not folder.unreadable:
            left = set(folder.files) - set(decided.files)
            assert {name.rpartition("/")[2] for name in left - set(needed.files)} <= {"plan.json", "notes.txt"}


@given(stores, references, st.integers(0, 20))
def test_a_collector_may_be_killed_anywhere(found: list[Folder], needed: References, steps: int) -> None:
    decided = plan(found, needed)
    gone = set(decided.files[:steps])
    rest = [
        Folder(
            generation=folder.generation,
            files={name: length for name, length in folder.files.items() if name not in gone},
            names=folder.names,
            roots=folder.roots,
            newest=folder.newest,
            held_until=folder.held_until,
            unreadable=folder.unreadable,
        )
        for folder in found
    ]
    assert plan(rest, needed).files == decided.files[steps:]
    for folder in found:
        own = [name for name in decided.files if name in folder.files]
        flags = [is_document(name) for name in own]
        assert flags == sorted(flags), "documents go last"


@given(stores, references, st.sampled_from("abcdef"), st.sampled_from(BASES))
def test_one_reference_more_never_frees_anything(
    found: list[Folder], needed: References, generation: str, base: str
) -> None:
    more = References(files={**needed.files, f"{generation}/{base}": "new"}, doubtful=needed.doubtful)
    assert set(plan(found, more).files) <= set(plan(found, needed).files)
