"""The status page as HTML: a function of a status and the time.

No script, one style sheet in the page, nothing fetched. Everything that comes from outside goes through `fill`, which
escapes it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import resources
from typing import Literal, TypeAlias
from urllib.parse import quote

from .metrics import OK
from .status import IndexStatus, KindTraffic, ServerStatus, ServerSummary, SnapshotStatus, StageTraffic, SwapStatus

__all__ = ["CONTENT_POLICY", "Note", "notes_of", "status_page"]

REFRESH_SECONDS = 5
TAIL_SHARE = 0.05
"""Share of a server's rows without an entry from which the page says so: each search reads them all."""

TAIL_ROWS = 1_000
"""Fewer than these are read in no time, whatever their share."""

FULL_SHARE = 0.9
"""Share of the memory limit, or of the queue, from which the page says so."""

_STYLE = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

CONTENT_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_DIGEST}'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What a browser may load for the page: this style sheet, and an icon that is part of it."""

Level: TypeAlias = Literal["info", "warn", "bad"]

_LONGEST = 400
_LINKABLE = re.compile(r"([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}", re.ASCII)
_COLOURS = {"good": "#1a9c5b", "warn": "#d48a00", "bad": "#d63a45"}
_NOTHING = "–"


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def fill(template: str, **values: object) -> Html:
    """Put values into a template of HTML; whatever is not `Html` is escaped."""
    return Html(template.format(**{name: _escaped(value) for name, value in values.items()}))


def joined(parts: Iterable[Html]) -> Html:
    """Return pieces of HTML one after the other."""
    return Html("".join(parts))


def _escaped(value: object) -> str:
    if isinstance(value, Html):
        return value
    text = str(value)
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "…"
    # A character that cannot be seen, or turns the direction of what follows, is shown by its number.
    return html.escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


@dataclass(frozen=True, slots=True)
class Note:
    """Something that the person on call should know.

    Parameters
    ----------
    level : {"info", "warn", "bad"}
        ``bad`` where answers are missing or an index does not follow its dataset any more.
    about : str
        Name of the index, or what part of the server.
    text : str
    """

    level: Level
    about: str
    text: str


def notes_of(status: ServerStatus) -> list[Note]:
    """Return what is worth a look, worst first."""
    notes = [note for index in status["indexes"] for note in _index_notes(index)]
    limit, queue = status["ram_limit_bytes"], status["queue_limit"]
    if limit and status["ram_bytes"] >= FULL_SHARE * limit:
        used = f"{_size(status['ram_bytes'])} of {_size(limit)}"
        notes.append(Note("warn", "Memory", f"{used} in use: the next swap may be refused."))
    if queue and status["waiting"] >= FULL_SHARE * queue:
        notes.append(Note("warn", "Queue", "Nearly full: what does not fit is answered with Overloaded."))
    if status["filter_restarts"]:
        times = f"{status['filter_restarts']:,} time{'s' if status['filter_restarts'] > 1 else ''}"
        notes.append(Note("warn", "Filters", f"The process that evaluates them was replaced {times} since the start."))
    if not status["indexes"]:
        notes.append(Note("info", "Indexes", "None is served."))
    return sorted(notes, key=lambda note: ("bad", "warn", "info").index(note.level))


def _index_notes(index: IndexStatus) -> list[Note]:
    name, swap, notes = index["name"], index["last_swap"], []
    if index["problem"] is not None:
        notes.append(Note("bad", name, index["problem"]))
    if swap is not None and swap["outcome"] != OK and swap["detail"] != index["problem"]:
        notes.append(Note("bad", name, f"The last swap failed: {swap['detail'] or swap['outcome']}"))
    if index["loading"] is not None:
        notes.append(Note("info", name, f"Loading {index['loading']}"))
    if not index["snapshots"]:
        return notes
    newest = index["snapshots"][0]
    if newest["unsaved_rows"]:
        rows = f"{newest['unsaved_rows']:,} rows were moved by a compaction that is not written down"
        notes.append(Note("warn", name, f"{rows}: run lance-dfaiss sync before old versions are cleaned up."))
    if newest["tail_rows"] >= max(TAIL_ROWS, TAIL_SHARE * index["coverage"] * newest["rows"]):
        rows = f"{newest['tail_rows']:,} rows have no entry and are read by every search"
        notes.append(Note("warn", name, f"{rows}: run lance-dfaiss update."))
    return notes


def status_page(status: ServerStatus, now: float) -> Html:
    """Return the whole page.

    Parameters
    ----------
    status : ServerStatus
        What to show.
    now : float
        In seconds since 1970.
    """
    notes = notes_of(status)
    level, word = _state(status)
    return fill(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="refresh" content="{seconds}">\n'
        '<title>{word} · server {id} · lance-dfaiss</title>\n<link rel="icon" href="{icon}">\n'
        "<style>{style}</style>\n</head>\n<body>\n"
        "{header}\n"
        '<main class="wrap">\n{notes}{tiles}{indexes}{traffic}{cluster}</main>\n{footer}\n</body>\n</html>\n',
        seconds=REFRESH_SECONDS,
        word=word,
        id=status["server"],
        icon=Html(_icon(level)),
        style=Html(_STYLE),
        header=_header(status, notes, now),
        notes=_notes(notes),
        tiles=_tiles(status),
        indexes=joined(_index(index, status["group"], now) for index in status["indexes"]),
        traffic=_traffic(status["traffic"]["kinds"], status["traffic"]["stages"]),
        cluster=_cluster(status),
        footer=_footer(now),
    )


def _state(status: ServerStatus) -> tuple[str, str]:
    if status["draining"]:
        return "warn", "Draining"
    return ("good", "Ready") if status["ready"] else ("bad", "Not ready")


def _icon(level: str) -> str:
    circle = f'<circle cx="4" cy="4" r="4" fill="{_COLOURS[level]}"/>'
    return "data:image/svg+xml," + quote(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">{circle}</svg>')


def _header(status: ServerStatus, notes: Sequence[Note], now: float) -> Html:
    level, word = _state(status)
    worth = sum(note.level != "info" for note in notes)
    facts = (
        status["address"],
        f"group {status['group']}",
        f"layout {status['epoch']}",
        f"up {_duration(now - status['started_at'])}",
        f"pid {status['pid']}",
    )
    return fill(
        '<header class="{level}"><div class="wrap"><p class="kicker">lance-dfaiss {version}</p>'
        '<h1>Server {id} <span class="pill {level}">{word}</span>{count}</h1>'
        '<p class="line">{facts}</p>{reason}</div></header>',
        level=level,
        version=status["version"],
        id=status["server"],
        word=word,
        count=fill(
            '<span class="pill {level}">{n} warning{s}</span>',
            level="bad" if any(note.level == "bad" for note in notes) else "warn",
            n=worth,
            s="" if worth == 1 else "s",
        )
        if worth
        else Html(""),
        facts=joined(fill("<span>{fact}</span>", fact=fact) for fact in facts),
        reason=fill('<p class="reason">{text}</p>', text=status["reason"]) if status["reason"] else Html(""),
    )


def _notes(notes: Sequence[Note]) -> Html:
    if not notes:
        return Html("")
    items = joined(
        fill('<li class="{level}"><b>{about}</b>{text}</li>', level=note.level, about=note.about, text=note.text)
        for note in notes
    )
    return fill('<ul class="notes">{items}</ul>\n', items=items)


def _tiles(status: ServerStatus) -> Html:
    traffic = status["traffic"]
    knn = next((kind for kind in traffic["kinds"] if kind["kind"] == "knn"), None)
    failed = fill(' · <span class="failed">{n} failed</span>', n=f"{traffic['failed_60s']:,}")
    limit, queue = status["ram_limit_bytes"], status["queue_limit"]
    return fill(
        '<section class="tiles">{rate}{latency}{queue}{memory}</section>\n',
        rate=_tile(
            "Queries per second",
            _rate(traffic["qps_10s"]),
            "",
            fill(
                "{rate} over a minute{failed}",
                rate=_rate(traffic["qps_60s"]),
                failed=failed if traffic["failed_60s"] else Html(""),
            ),
            _spark(traffic["history"]),
        ),
        latency=_tile(
            "Median search time",
            _seconds(knn["p50"]) if knn else _NOTHING,
            "",
            f"p90 {_seconds(knn['p90'])} · p99 {_seconds(knn['p99'])}" if knn else "none in the last minute",
            _latency_bar(knn),
        ),
        queue=_tile(
            "Queue",
            f"{status['waiting']:,}",
            f"of {queue:,}" if queue else "",
            f"{_plural(status['connections'], 'connection')} · {_plural(status['threads'], 'search thread')}",
            _bar(status["waiting"], queue, "queries wait"),
        ),
        memory=_tile(
            "Memory",
            _size(status["ram_bytes"]),
            f"of {_size(limit)}" if limit else "",
            f"{status['ram_bytes'] / limit:.0%} of the limit" if limit else "no limit",
            _bar(status["ram_bytes"], limit, "of memory used"),
        ),
    )


def _tile(title: str, big: str, small: str, under: str, foot: Html) -> Html:
    return fill(
        '<div class="card tile"><h2>{title}</h2><p class="big">{big} <small>{small}</small></p>'
        '<p class="under">{under}</p><div class="foot">{foot}</div></div>',
        title=title,
        big=big,
        small=small,
        under=under,
        foot=foot,
    )


def _bar(value: float, limit: float, what: str) -> Html:
    if not limit:
        return Html("")
    share = min(max(value / limit, 0.0), 1.0)
    level = "bad" if share >= FULL_SHARE else "warn" if share >= 0.75 else "good"
    return fill(
        '<svg class="bar {level}" role="img" aria-label="{share} {what}"><rect class="back" width="100%" '
        'height="100%"/><rect class="part" width="{width}%" height="100%"/></svg>',
        level=level,
        share=f"{share:.0%}",
        what=what,
        width=f"{100 * share:.2f}",
    )


def _latency_bar(knn: KindTraffic | None) -> Html:
    """Median, 90th and 99th percentile as one bar, so that a long tail is seen."""
    if knn is None or not knn["p99"]:
        return Html("")
    return fill(
        '<svg class="bar" role="img" aria-label="p50 and p90 as parts of p99"><rect class="back" width="100%" '
        'height="100%"/><rect class="other" width="{p90}%" height="100%"/><rect class="part" width="{p50}%" '
        'height="100%"/></svg>',
        p50=f"{100 * knn['p50'] / knn['p99']:.2f}",
        p90=f"{100 * knn['p90'] / knn['p99']:.2f}",
    )


def _spark(history: Sequence[int]) -> Html:
    top = max(history, default=0)
    bars = joined(
        fill(
            '<rect x="{x}" y="{y}" width="0.75" height="{height}"/>',
            x=x,
            y=f"{20 - 20 * count / top:.2f}",
            height=f"{20 * count / top:.2f}",
        )
        for x, count in enumerate(history)
        if count
    )
    return fill(
        '<svg class="spark" viewBox="0 0 {n} 20" preserveAspectRatio="none" role="img" '
        'aria-label="Queries in each second of the last minute, at most {top}">'
        '<line x1="0" y1="20" x2="{n}" y2="20"/>{bars}</svg>',
        n=max(len(history), 1),
        top=f"{top:,}",
        bars=bars,
    )


def _index(index: IndexStatus, group: int, now: float) -> Html:
    newest = index["snapshots"][0] if index["snapshots"] else None
    pills = []
    if index["problem"] is not None:
        pills.append(("bad", "Problem"))
    if index["loading"] is not None:
        pills.append(("info", "Loading"))
    if newest is None:
        pills.append(("bad", "Not served"))
    return fill(
        '<section class="card index"><div class="head"><h2>{name}</h2>{pills}</div>'
        '<dl class="facts">{facts}</dl>{snapshots}</section>\n',
        name=index["name"],
        pills=joined(fill('<span class="pill {level}">{text}</span>', level=lv, text=text) for lv, text in pills),
        facts=_index_facts(index, newest, group, now),
        snapshots=_snapshots(index["snapshots"], now),
    )


def _index_facts(index: IndexStatus, newest: SnapshotStatus | None, group: int, now: float) -> Html:
    columns = ", ".join(index["payload"])
    dim = f"{index['dim']:,} dimensions" if index["dim"] else ""
    kind = " · ".join(filter(None, (index["index"], index["index_type"], index["metric"], dim)))
    facts = [
        _fact("Dataset", fill('<span class="mono">{uri}</span>', uri=index["dataset"]), wide=True),
        _fact("Index", kind, wide=True),
    ]
    if newest is not None:
        facts += [
            _fact("Version", fill("<b>{version}</b>", version=f"{newest['version']:,}")),
            _fact("Committed", _ago(newest["committed_at"], now)),
            _fact("Generation", _generation(newest["generation"])),
            _fact("Last swap", _swap(index["last_swap"], now)),
            _fact("Rows", fill("<b>{rows}</b>", rows=f"{newest['rows']:,}")),
            _fact("Indexed here · deleted since", f"{newest['indexed_rows']:,} · {newest['masked_rows']:,}"),
            _fact("Not indexed, here", f"{newest['tail_rows']:,}"),
            _fact("Held here", _coverage(index["coverage"], newest["group_rows"], group)),
            _fact("Shards here", f"{index['shards']:,}"),
            _fact("Columns in memory", f"{columns} · {_size(index['payload_bytes'])}" if columns else "none"),
            _fact("Factory", fill('<span class="mono">{text}</span>', text=index["factory"]), wide=True),
        ]
    return joined(facts)


def _fact(name: str, value: object, *, wide: bool = False) -> Html:
    kind = Html(' class="wide"' if wide else "")
    return fill("<div{kind}><dt>{name}</dt><dd>{value}</dd></div>", kind=kind, name=name, value=value)


def _coverage(coverage: float, group_rows: Sequence[int], group: int) -> Html:
    total = sum(group_rows)
    parts, start = [], 0.0
    for number, rows in enumerate(group_rows):
        width = 100 * rows / total if total else 0.0
        parts.append(
            fill(
                '<rect class="{kind}" x="{x}%" width="{width}%" height="100%"/>',
                kind="part" if number == group else "other",
                x=f"{start:.2f}",
                width=f"{max(width - 0.8, 0.0):.2f}",  # a gap between groups
            )
        )
        start += width
    return fill(
        '{share} of all rows<svg class="bar" role="img" aria-label="Rows by group: {rows}">{parts}</svg>',
        share=_percent(coverage),
        rows=", ".join(f"{rows:,}" for rows in group_rows),
        parts=joined(parts),
    )


def _swap(swap: SwapStatus | None, now: float) -> Html:
    if swap is None:
        return Html(_NOTHING)
    good = swap["outcome"] == OK
    return fill(
        '<span class="pill {level}">{outcome}</span> {ago}<small>took {seconds}, {size} read</small>',
        level="good" if good else "bad",
        outcome=swap["outcome"],
        ago=_ago(swap["at"], now),
        seconds=_seconds(swap["seconds"]),
        size=_size(swap["read_bytes"]),
    )


def _generation(generation: str) -> Html:
    return fill('<code title="{full}">{short}</code>', full=generation, short=generation[:8])


def _snapshots(snapshots: Sequence[SnapshotStatus], now: float) -> Html:
    if not snapshots:
        return Html('<p class="empty">No snapshot is served yet.</p>')
    rows = joined(
        fill(
            '<tr><td><code>{at}</code></td><td class="left">{ago}</td><td>{version}</td><td><code>{generation}</code>'
            "</td><td>{rows}</td><td>{tail}</td><td>{unsaved}</td><td>{ram}</td></tr>",
            at=snapshot["at"],
            ago=_ago(snapshot["committed_at"], now),
            version=f"{snapshot['version']:,}",
            generation=snapshot["generation"][:8],
            rows=f"{snapshot['rows']:,}",
            tail=f"{snapshot['tail_rows']:,}",
            unsaved=f"{snapshot['unsaved_rows']:,}",
            ram=_size(snapshot["ram_bytes"]),
        )
        for snapshot in snapshots
    )
    return fill(
        '<h3>Snapshots offered</h3><div class="scroll"><table><thead><tr><th>Snapshot</th><th class="left">Committed'
        "</th><th>Version</th><th>Generation</th><th>Rows</th><th>Not indexed, here</th><th>Unsaved</th>"
        "<th>Memory</th></tr></thead><tbody>{rows}</tbody></table></div>",
        rows=rows,
    )


def _traffic(kinds: Sequence[KindTraffic], stages: Sequence[StageTraffic]) -> Html:
    return fill(
        '<div class="pair">{kinds}{stages}</div>\n',
        kinds=_latencies("Requests", "Kind", [(kind["kind"], kind) for kind in kinds]),
        stages=_latencies("Where time goes", "Stage", [(stage["stage"], stage) for stage in stages]),
    )


def _latencies(title: str, first: str, rows: Sequence[tuple[str, KindTraffic | StageTraffic]]) -> Html:
    body = joined(
        fill(
            "<tr><td>{name}</td><td>{count}</td><td>{p50}</td><td>{p90}</td><td>{p99}</td></tr>",
            name=name,
            count=f"{row['count']:,}",
            p50=_seconds(row["p50"]),
            p90=_seconds(row["p90"]),
            p99=_seconds(row["p99"]),
        )
        for name, row in rows
    )
    table = fill(
        '<div class="scroll"><table><thead><tr><th>{first}</th><th>Count</th><th>p50</th><th>p90</th><th>p99</th></tr>'
        "</thead><tbody>{body}</tbody></table></div>",
        first=first,
        body=body,
    )
    return fill(
        '<section class="card"><div class="head"><h2>{title}</h2><span class="soft">last minute</span></div>{table}'
        "</section>",
        title=title,
        table=table if rows else Html('<p class="empty">Nothing in the last minute.</p>'),
    )


def _cluster(status: ServerStatus) -> Html:
    rows = joined(
        fill(
            '<tr><td>{group}</td><td class="left wrapping"><ul class="servers">{servers}</ul></td></tr>',
            group=f"Group {group}",
            servers=joined(
                _server(server, status["server"]) for server in status["servers"] if server["group"] == group
            ),
        )
        for group in range(status["groups"])
    )
    return fill(
        '<section class="card"><div class="head"><h2>Cluster</h2><span class="soft">{servers}, {groups}, {replicas}, '
        'layout {epoch}</span></div><table class="groups"><tbody>{rows}</tbody></table></section>\n',
        servers=_plural(len(status["servers"]), "server"),
        groups=_plural(status["groups"], "group"),
        replicas=_plural(status["replicas"], "replica"),
        epoch=status["epoch"],
        rows=rows,
    )


def _server(server: ServerSummary, here: int) -> Html:
    http, address = server["http"], fill("{text}", text=server["address"])
    # A link is made only of what can be nothing but a host and a port.
    if http is not None and _LINKABLE.fullmatch(http) and server["id"] != here:
        address = fill('<a href="http://{http}/">{address}</a>', http=http, address=address)
    mark = Html(' class="self"') if server["id"] == here else Html("")
    return fill(
        "<li{mark}><b>{id}</b> {address}{this}</li>",
        mark=mark,
        id=server["id"],
        address=address,
        this=Html(' <span class="soft">this server</span>') if server["id"] == here else Html(""),
    )


def _footer(now: float) -> Html:
    return fill(
        '<footer><div class="wrap"><a href="/metrics">/metrics</a><a href="/status.json">/status.json</a>'
        '<a href="/healthz">/healthz</a><a href="/readyz">/readyz</a>'
        '<span class="time">{time}, again every {seconds} s</span></div></footer>',
        time=_utc(now),
        seconds=REFRESH_SECONDS,
    )


def _ago(then: float, now: float) -> Html:
    return fill('<span title="{time}">{ago} ago</span>', time=_utc(then), ago=_duration(now - then))


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _duration(seconds: float) -> str:
    """Return a time in the one or two units that matter; clocks of two machines may make it negative: none then."""
    seconds = max(0, int(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3_600:
        return f"{seconds // 60} min"
    if seconds < 86_400:
        return f"{seconds // 3_600} h {seconds % 3_600 // 60} min"
    return f"{seconds // 86_400} d {seconds % 86_400 // 3_600} h"


def _seconds(seconds: float) -> str:
    for unit, factor in (("µs", 1e6), ("ms", 1e3), ("s", 1.0)):
        value = seconds * factor
        if value < 999.5 or unit == "s":
            break
    if not value:
        return "0"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 999.5 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def _rate(value: float) -> str:
    return f"{value:,.1f}" if 0 < value < 10 else f"{value:,.0f}"


def _percent(share: float) -> str:
    # 99.96% is not all of it.
    return f"{share:.0%}" if share in (0.0, 1.0) else f"{min(max(100 * share, 0.1), 99.9):.1f}%"


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"
