"""Arguments and options that commands share, written once; and their way into the library's option objects."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, Union, get_args, get_origin, get_type_hints

import typer

from ..errors import InvalidArgument
from .edge import in_command_words, usage_error
from .text import parse_bytes

if TYPE_CHECKING:
    from ..progress import Progress
    from ..spec import BuildOptions, IndexSpec

__all__ = [
    "Access",
    "BuildFlags",
    "ColumnArgument",
    "DatasetArgument",
    "DatasetOrTableArgument",
    "IndexNameArgument",
    "InvalidOption",
    "JsonFlag",
    "NamespaceFlags",
    "OptionalNameArgument",
    "RayFlags",
    "Reach",
    "TrustedAccess",
    "WorkFlags",
    "command",
    "option",
    "usage_errors",
]

_WHAT, _HOW, _WHO, _WHERE = "What to build", "How to build it", "Who builds it", "Where things are"

# In place of DATASET: the dataset is the table that --table-id names.
_TABLE = "-"


def option(name: str, text: str, panel: str | None = None, metavar: str | None = None, **more: Any) -> Any:
    """Return what `typer.Option` does, with what nearly every option has up front.

    Parameters
    ----------
    name : str
        With its dashes.
    text : str
        What it is for.
    panel : str, optional
        Heading that the help lists it under.
    metavar : str, optional
        What stands for its value in the help.
    **more
        As `typer.Option` takes them.
    """
    return typer.Option(name, help=text, rich_help_panel=panel, metavar=metavar, **more)


DatasetArgument: TypeAlias = Annotated[
    str, typer.Argument(metavar="DATASET", help="Path or URI of the Lance dataset; its newest version is used.")
]
DatasetOrTableArgument: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="DATASET",
        help="Path or URI of the Lance dataset, or - for the table that --table-id names; its newest version is used.",
    ),
]
ColumnArgument: TypeAlias = Annotated[
    str, typer.Argument(metavar="COLUMN", help="Vector column, dotted for a nested field.")
]
IndexNameArgument: TypeAlias = Annotated[str, typer.Argument(metavar="NAME", help="Name of the index.")]
OptionalNameArgument: TypeAlias = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="Name of the index; may be left out when the dataset has one."),
]
JsonFlag: TypeAlias = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
WorkersOption: TypeAlias = Annotated[int, option("--num-workers", "Shards encoded at the same time.", panel=_HOW)]
BudgetOption: TypeAlias = Annotated[
    str | None,
    option(
        "--memory-budget",
        "Per worker, like 16G or 512MiB; half of the machine over the workers if left out.",
        panel=_HOW,
        metavar="SIZE",
    ),
]
InvalidOption: TypeAlias = Annotated[
    str, option("--on-invalid", "Null, non-finite and zero vectors: skip or error.", panel=_HOW, metavar="ACTION")
]


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How the dataset is reached."""

    storage_option: Annotated[
        list[str],
        option(
            "--storage-option",
            "Setting of the object store that the dataset or index lies on; may be repeated.",
            panel=_WHERE,
            metavar="KEY=VALUE",
        ),
    ] = field(default_factory=list)

    def storage_options(self) -> dict[str, str] | None:
        """Return the settings by key, None without any; a usage error if one is malformed or said twice."""
        return _by_key("--storage-option", self.storage_option)


def _by_key(option: str, given: list[str]) -> dict[str, str] | None:
    found: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        # The text itself is not shown: it may hold a secret.
        if not equals or not key:
            raise usage_error(f"{option} must be KEY=VALUE")
        if key in found:
            raise usage_error(f"{option} {key} is given twice")
        found[key] = value
    return found or None


@dataclass(frozen=True, kw_only=True)
class Access(Reach):
    """The same, and where the index lies."""

    index_uri: Annotated[
        str | None,
        option("--index-uri", "Where the index lies when not in the dataset.", panel=_WHERE, metavar="URI"),
    ] = None

    def of_dataset(self) -> dict[str, Any]:
        """Return keyword arguments for the functions that take a dataset."""
        return {"index_uri": self.index_uri, "storage_options": self.storage_options()}


@dataclass(frozen=True, kw_only=True)
class TrustedAccess(Access):
    """The same, for commands that follow a pointer."""

    allow_index_uri: Annotated[
        list[str],
        option(
            "--allow-index-uri",
            "Place outside the dataset that its index may lie in; may be repeated.",
            panel=_WHERE,
            metavar="URI",
        ),
    ] = field(default_factory=list)

    def of_dataset(self) -> dict[str, Any]:
        """Return keyword arguments for the functions that open an index."""
        return {**Access.of_dataset(self), "allowed_index_uris": tuple(self.allow_index_uri)}


@dataclass(frozen=True, kw_only=True)
class NamespaceFlags:
    """The dataset as a table of a namespace."""

    namespace_impl: Annotated[
        str | None,
        option(
            "--namespace-impl", "Kind of namespace: dir, rest, or the name of a class.", panel=_WHERE, metavar="KIND"
        ),
    ] = None
    namespace_property: Annotated[
        list[str],
        option("--namespace-property", "Its setting; may be repeated.", panel=_WHERE, metavar="KEY=VALUE"),
    ] = field(default_factory=list)
    table_id: Annotated[
        list[str],
        option(
            "--table-id",
            "Name of the table in it, with DATASET given as -; repeated for each level of a nested name.",
            panel=_WHERE,
            metavar="NAME",
        ),
    ] = field(default_factory=list)

    def given(self, dataset: str) -> dict[str, Any]:
        """Return keyword arguments for the functions that take a namespace; a usage error if they mean nothing."""
        named = self.namespace_impl is not None or self.namespace_property or self.table_id
        if named and (self.namespace_impl is None or not self.table_id):
            raise usage_error("a table of a namespace needs --namespace-impl and --table-id")
        if bool(named) != (dataset == _TABLE):
            raise usage_error(f"DATASET is {_TABLE} with a table of a namespace, and only then")
        return {
            "namespace_impl": self.namespace_impl,
            "namespace_properties": _by_key("--namespace-property", self.namespace_property),
            "table_id": self.table_id or None,
        }

    @staticmethod
    def uri(dataset: str) -> str | None:
        """Return the dataset's path or URI, None for the table."""
        return None if dataset == _TABLE else dataset


@dataclass(frozen=True, kw_only=True)
class RayFlags:
    """Who does the work."""

    executor: Annotated[
        str,
        option(
            "--executor",
            "local for threads of this process, ray for workers of a Ray cluster; auto is ray where an option for it"
            " is given.",
            panel=_WHO,
            metavar="WHO",
        ),
    ] = "auto"
    address: Annotated[
        str | None,
        option(
            "--address",
            "Ray cluster to join; the one that RAY_ADDRESS names, or a new one on this machine, if left out.",
            panel=_WHO,
            metavar="ADDRESS",
        ),
    ] = None
    ray_remote_args: Annotated[
        str | None,
        option(
            "--ray-remote-args",
            'Options of every Ray worker, such as {"num_cpus": 4}.',
            panel=_WHO,
            metavar="JSON",
        ),
    ] = None
    task_deadline: Annotated[
        float | None,
        option(
            "--task-deadline",
            "A Ray task without progress for so long is run again elsewhere.",
            panel=_WHO,
            metavar="SECONDS",
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """Return keyword arguments for the functions that build; a usage error if a value cannot be used."""
        return {
            "executor": self.executor,
            "ray_address": self.address,
            "ray_remote_args": _json_object("--ray-remote-args", self.ray_remote_args),
            "task_deadline_seconds": self.task_deadline,
        }


def _json_object(option: str, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as exc:
        raise usage_error(f"{option} must be JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise usage_error(f"{option} must be a JSON object, such as {{}}")
    return found


@dataclass(frozen=True, kw_only=True)
class BuildFlags:
    """Everything that says what is built and how, for the commands that build and that plan."""

    index_type: Annotated[
        str,
        option(
            "--index-type",
            "AUTO, FLAT, IVF_FLAT, IVF_SQ, IVF_PQ, IVF_RQ, HNSW_FLAT or HNSW_SQ.",
            panel=_WHAT,
            metavar="TYPE",
        ),
    ] = "AUTO"
    name: Annotated[
        str | None, option("--name", "Name of the index; COLUMN_idx if left out.", panel=_WHAT, metavar="NAME")
    ] = None
    metric: Annotated[str, option("--metric", "l2, cosine or dot.", panel=_WHAT, metavar="METRIC")] = "l2"
    factory: Annotated[
        str | None, option("--factory", "FAISS factory string, instead of a type.", panel=_WHAT, metavar="STRING")
    ] = None
    num_partitions: Annotated[int | None, option("--num-partitions", "IVF lists.", panel=_WHAT)] = None
    num_sub_vectors: Annotated[int | None, option("--num-sub-vectors", "PQ codes per vector.", panel=_WHAT)] = None
    num_bits: Annotated[int | None, option("--num-bits", "Bits per PQ code: 4 or 8.", panel=_WHAT)] = None
    coarse: Annotated[
        str,
        option("--coarse", "How the nearest lists are found: flat or hnsw.", panel=_WHAT, metavar="KIND"),
    ] = "flat"
    refine: Annotated[
        str,
        option("--refine", "Finer codes to re-rank with: auto, sq8, fp16, flat or none.", panel=_WHAT, metavar="KIND"),
    ] = "auto"
    sample_rate: Annotated[int, option("--sample-rate", "Training rows per IVF list.", panel=_WHAT)] = 256
    seed: Annotated[int, option("--seed", "Of sampling and k-means.", panel=_WHAT)] = 1234
    num_shards: Annotated[
        int | None,
        option(
            "--num-shards", "Shards to write; if left out as few as memory allows, on Ray one a worker.", panel=_HOW
        ),
    ] = None
    num_workers: WorkersOption = 1
    memory_budget: BudgetOption = None
    on_invalid: InvalidOption = "skip"
    min_recall: Annotated[
        float | None, option("--min-recall", "Refuse an index that measures less recall@10.", panel=_HOW)
    ] = None
    replace: Annotated[bool, option("--replace", "Replace an index of the same name.", panel=_HOW)] = False
    resume: Annotated[bool, option("--resume", "Go on with an interrupted build.", panel=_HOW)] = False

    def spec(self, column: str) -> IndexSpec:
        """Return what to build; a usage error if a value cannot be used."""
        from ..spec import IndexSpec

        with usage_errors():
            return IndexSpec(
                name=f"{column}_idx" if self.name is None else self.name,
                column=column,
                index_type=self.index_type,  # type: ignore[arg-type]  # checked by IndexSpec, as the next ones
                metric=self.metric,  # type: ignore[arg-type]
                factory=self.factory,
                num_partitions=self.num_partitions,
                num_sub_vectors=self.num_sub_vectors,
                num_bits=self.num_bits,
                coarse=self.coarse,  # type: ignore[arg-type]
                refine=None if self.refine == "none" else self.refine,  # type: ignore[arg-type]
                sample_rate=self.sample_rate,
                seed=self.seed,
            )

    def options(self, index_uri: str | None, progress: Progress, **more: Any) -> BuildOptions:
        """Return how to build it; a usage error if a value cannot be used.

        Parameters
        ----------
        index_uri : str or None
            Where the index is to lie when not in the dataset.
        progress : Progress
            Listener.
        **more
            Other fields of `BuildOptions`.
        """
        from ..spec import BuildOptions

        with usage_errors():
            return BuildOptions(
                replace=self.replace,
                resume=self.resume,
                num_shards=self.num_shards,
                num_workers=self.num_workers,
                memory_budget_bytes=None if self.memory_budget is None else parse_bytes(self.memory_budget),
                on_invalid=self.on_invalid,  # type: ignore[arg-type]  # checked by BuildOptions
                min_recall=self.min_recall,
                index_uri=index_uri,
                progress=progress,
                **more,
            )


@dataclass(frozen=True, kw_only=True)
class WorkFlags:
    """With how much of the machine shards are encoded."""

    num_workers: WorkersOption = 1
    memory_budget: BudgetOption = None

    def given(self, **more: Any) -> dict[str, Any]:
        """Return keyword arguments for the functions that encode; a usage error if a value cannot be used.

        Parameters
        ----------
        **more
            Others that `BuildOptions` has.
        """
        from ..spec import BuildOptions

        with usage_errors():
            budget = None if self.memory_budget is None else parse_bytes(self.memory_budget)
            asked = {"num_workers": self.num_workers, "memory_budget_bytes": budget, **more}
            BuildOptions(**asked)
        return asked


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a value that cannot be used into a usage error: wrong before anything was touched."""
    try:
        yield
    except InvalidArgument as exc:
        raise usage_error(f"{exc.message}{'. ' if exc.remedy else ''}{in_command_words(exc.remedy)}") from exc
    except ValueError as exc:
        raise usage_error(str(exc)) from exc


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Return a function that typer can read, in whose signature option dataclasses are spread out.

    Parameters
    ----------
    function : callable
        Takes arguments that typer knows, and dataclasses whose fields are such.
    """
    hints = {name: _as_written(hint) for name, hint in get_type_hints(function, include_extras=True).items()}
    groups: dict[str, Any] = {
        name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)
    }
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in groups:
            parameters += _parameters(groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY))

    def call(**values: Any) -> None:
        for name, group in groups.items():
            # A repeatable option that was not given may arrive as None.
            given = {entry.name: values.pop(entry.name) for entry in fields(group)}
            values[name] = group(**{key: value for key, value in given.items() if value is not None})
        function(**values)

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def _as_written(hint: Any) -> Any:
    """Undo what Python 3.10 does where the default is None: it wraps the annotation, hiding what typer reads."""
    if get_origin(hint) is not Union:
        return hint
    return next((part for part in get_args(hint) if get_origin(part) is Annotated), hint)


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            entry.name, inspect.Parameter.KEYWORD_ONLY, default=_default(entry), annotation=hints[entry.name]
        )
        for entry in fields(group)
    ]


def _default(entry: Field[Any]) -> Any:
    if entry.default_factory is not MISSING:
        return entry.default_factory()
    return inspect.Parameter.empty if entry.default is MISSING else entry.default
