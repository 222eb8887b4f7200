"""Which filters a server evaluates for somebody it does not trust. No I/O here.

A filter is taken apart by a grammar of our own, a small part of what Lance understands, and whatever is not in it is
refused. Lance's own parser and planner are no fence: a long sum overflows their stack, nested calls of some functions
take them time that doubles with each level, and ``repeat(s, 2000000)`` fills the memory.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from ..errors import AccessDenied, FilterRefused
from ..types import ROW_ID_COLUMN

__all__ = [
    "FUNCTIONS",
    "MAX_DEPTH",
    "MAX_DOUBLINGS",
    "MAX_FILTER_BYTES",
    "MAX_OPERATORS",
    "MAX_PATTERN_CHARS",
    "MAX_REGEXES",
    "check_filter",
]

MAX_FILTER_BYTES = 16 * 1024
"""Longest filter, in UTF-8."""

MAX_OPERATORS = 256
"""Most operators, calls, subscripts, path steps and arguments together; elements of lists do not count.

On a thread with 1 MB of stack, pylance 14 evaluates sums of 256 terms and overflows at 384.
"""

MAX_DEPTH = 16
"""Deepest nesting of parentheses, brackets, NOTs and signs together.

Lance's parser gives up at about 24, after trying in vain what can take a minute.
"""

MAX_DOUBLINGS = 3
"""Most calls of COALESCE (NVL, IFNULL) and BETWEENs inside one another: Lance writes their first operand out twice."""

MAX_REGEXES = 4
"""Most regular expressions; compiled, each may take 10 MB."""

MAX_PATTERN_CHARS = 256
"""Longest regular expression."""

MAX_NUMBER_CHARS = 64
"""Longest number."""

_DOUBLING = frozenset({"coalesce", "ifnull", "nvl"})

_REGEXES = frozenset({"regexp_like", "regexp_match"})

_OTHERS = """
lower upper initcap reverse length char_length character_length octet_length bit_length ascii
btrim ltrim rtrim left right split_part starts_with ends_with contains strpos instr contains_tokens
abs round trunc signum sqrt cbrt exp ln log log2 log10 pow power isnan iszero nanvl
nullif nvl2 greatest least
date_part datepart date_trunc datetrunc to_date make_date to_unixtime from_unixtime
to_timestamp to_timestamp_seconds to_timestamp_millis to_timestamp_micros to_timestamp_nanos
array_has array_contains list_has list_contains array_has_any list_has_any array_has_all list_has_all
array_length list_length cardinality empty array_empty array_position list_position array_max array_min
array_element list_element array_extract list_extract get_field
json_get json_get_string json_get_int json_get_float json_get_bool
"""

FUNCTIONS = frozenset(_OTHERS.split()) | _DOUBLING | _REGEXES
"""Functions that a filter may call: what they return is no larger than what they are given, and soon computed.

No clock and no dice either: equal filters match equal rows on every replica.
"""

_TYPED_LITERALS = frozenset({"date", "datetime", "timestamp"})
_PLAIN_TYPES = frozenset({"boolean", "string", "float", "double", "date", "binary"})
_INTEGER_TYPES = frozenset({"tinyint", "smallint", "int", "integer", "bigint"})
_SIZED_TYPES = frozenset({"decimal", "timestamp", "datetime"})
_CONSTANTS = frozenset({"true", "false", "null"})
_COMPARISONS = frozenset({"=", "==", "<>", "!=", "<", "<=", ">", ">="})
_ARITHMETIC = frozenset({"+", "-", "*", "/", "%"})
# No columns, unless in backticks: Lance knows them, or may one day, as something else than a name.
_WORDS = """
all and any as between by case cast collate current_date current_time current_timestamp current_user distinct else
end escape except exists extract from group having ilike in intersect interval into is like limit localtime
localtimestamp not null offset or order over overlaps regexp rlike row select session_user similar some struct then
true false try_cast union unknown user using values when where with xor
"""
_RESERVED = frozenset(_WORDS.split())

_TOKEN = re.compile(
    r"""
      (?P<space>[ \t\r\n]+)
    | (?P<comment>--|/\*)
    | (?P<hex>[xX]'(?:[0-9a-fA-F]{2})*')
    | (?P<string>'(?:[^']|'')*'|"(?:[^"]|"")*")
    | (?P<quoted>`[^`.]+`)
    | (?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
    | (?P<word>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<sign><>|!=|==|<=|>=|[-=<>+*/%(),.\[\]])
    """,
    re.VERBOSE,
)
# Names and numbers that run into one another, or into a quote (E'..', U&'..', 1_000), are read in as many ways as there
# are dialects.
_RUN_ON = re.compile(r"[A-Za-z0-9_'\"`]")


class _Token(NamedTuple):
    """A piece of a filter: what it is, its text (words in lower case), and where it begins."""

    kind: str
    text: str
    raw: str
    at: int


def check_filter(sql: str, *, columns: Collection[str] | None) -> None:
    """Refuse a filter that a server should not hand to Lance.

    Parameters
    ----------
    sql : str
        The filter.
    columns : collection of str or None
        Columns that it may name, spelled as in the dataset, and all below them; the row id is always among them. None
        for all. Each should be in the dataset: Lance takes another one that differs in case only for one that is not.

    Raises
    ------
    FilterRefused
        If it is too long, too deep, or holds what is not known to be harmless; says where.
    AccessDenied
        If it names a column that is not allowed.
    """
    _Check(sql, _tokens(sql), None if columns is None else frozenset(columns)).filter()


def _tokens(sql: str) -> list[_Token]:
    try:
        length = len(sql.encode())
    except UnicodeEncodeError as exc:
        raise _refused(sql, "a character that is none", exc.start, "Send text that can be written as UTF-8") from None
    if length > MAX_FILTER_BYTES:
        raise _refused(
            sql, f"{length:,} bytes, more than {MAX_FILTER_BYTES:,}", 0, "Send a shorter one, or search with several"
        )
    found: list[_Token] = []
    at = 0
    while at < len(sql):
        match = _TOKEN.match(sql, at)
        kind = match.lastgroup if match else None
        if match is None or kind is None:
            raise _refused(sql, repr(sql[at]), at, _remedy_of_character(sql[at]))
        if kind == "comment":
            raise _refused(sql, "a comment", at, "Leave comments out; put a space between two minus signs")
        after = sql[match.end() : match.end() + 1]
        if kind in ("word", "number", "hex", "string", "quoted") and _RUN_ON.match(after):
            raise _refused(sql, repr(match[0][:40] + after), at, "Put a space between the two")
        if kind == "number" and (len(match[0]) > MAX_NUMBER_CHARS or after == "."):
            raise _refused(sql, "a number like no other", at, f"Write it with at most {MAX_NUMBER_CHARS} digits")
        if kind != "space":
            text = match[0].lower() if kind == "word" else match[0]
            found.append(_Token(kind, text, match[0], at))
        at = match.end()
    found.append(_Token("end", "", "", len(sql)))
    return found


def _remedy_of_character(character: str) -> str:
    if character in "'\"`":
        return "Close the quote; inside one, write it twice (a name in backticks holds no backtick and no dot)"
    if not character.isascii():
        return "Put names with such characters in backticks, texts in single quotes"
    return "Use AND, OR, NOT, comparisons, IN, BETWEEN, LIKE, IS NULL, arithmetic and functions"


def _refused(sql: str, found: str, at: int, remedy: str) -> FilterRefused:
    return FilterRefused(
        f"a filter is not evaluated by this server: found {found} at character {at + 1}",
        remedy=remedy,
        parameter="filter",
        value=sql if len(sql) <= 200 else sql[:200] + "...",
    )


class _Check:
    """Reads a filter from left to right. Methods named after a part of the grammar return its doublings."""

    def __init__(self, sql: str, tokens: list[_Token], columns: frozenset[str] | None) -> None:
        self._sql = sql
        self._tokens = tokens
        self._columns = columns
        self._next = 0
        self._operators = 0
        self._depth = 0
        self._regexes = 0

    def filter(self) -> None:
        """``condition``, and nothing after it."""
        if self._here.kind == "end":
            raise self._refuse("nothing", "Write a condition, or search without a filter")
        self._condition()
        if self._here.kind != "end":
            raise self._unexpected("AND, OR or an operator")

    def _condition(self) -> int:
        """``comparison [AND|OR comparison]...``; what binds more closely does not matter here."""
        doublings = self._comparison()
        while self._word("and") or self._word("or"):
            self._count()
            doublings = max(doublings, self._comparison())
        return doublings

    def _comparison(self) -> int:
        if self._word("not"):
            self._count()
            self._enter()
            doublings = self._comparison()
            self._depth -= 1
            return doublings
        left = self._sum()
        here = self._here
        if here.kind == "sign" and here.text in _COMPARISONS:
            self._step()
            self._count()
            return max(left, self._sum())
        if self._word("is"):
            return max(left, self._is())
        negated = self._word("not")
        if self._word("in"):
            self._count()
            return max(left, self._list("(", ")"))
        if self._word("like") or self._word("ilike"):
            self._count()
            return max(left, self._sum())
        if self._word("between"):
            return self._between(left, here)
        if negated:
            raise self._unexpected("IN, LIKE or BETWEEN")
        return left

    def _between(self, left: int, here: _Token) -> int:
        self._count(2)
        low = self._sum()
        if not self._word("and"):
            raise self._unexpected("AND")
        return self._doubled(max(left, low, self._sum()), here)

    def _is(self) -> int:
        self._count()
        self._word("not")
        if self._word("null") or self._word("true") or self._word("false"):
            return 0
        if not (self._word("distinct") and self._word("from")):
            raise self._unexpected("NULL, TRUE, FALSE or DISTINCT FROM")
        return self._sum()

    def _sum(self) -> int:
        doublings = self._value()
        while self._here.kind == "sign" and self._here.text in _ARITHMETIC:
            self._step()
            self._count()
            doublings = max(doublings, self._value())
        return doublings

    def _value(self) -> int:
        if self._sign("-"):
            self._count()
            self._enter()
            doublings = self._value()
            self._depth -= 1
            return doublings
        doublings = self._primary()
        while self._here.text == "[" and self._here.kind == "sign":
            self._count()
            doublings = max(doublings, self._list("[", "]", most=1))
        return doublings

    def _primary(self) -> int:
        here = self._here
        if here.kind in ("number", "string", "hex"):
            self._step()
            return 0
        if here.kind == "quoted":
            return self._column()
        if here.kind == "word":
            return self._named(here)
        if here.text == "(":
            return self._group()
        if here.text == "[":
            return self._list("[", "]")
        raise self._unexpected("a column, a value or a function")

    def _named(self, here: _Token) -> int:
        """Whatever begins with a word."""
        after = self._tokens[self._next + 1]
        if here.text in _CONSTANTS:
            self._step()
            return 0
        if here.text in _TYPED_LITERALS and after.kind == "string":
            self._step(2)
            return 0
        if here.text == "array" and after.text == "[":
            self._step()
            return self._list("[", "]")
        if after.kind == "sign" and after.text == "(":
            return self._cast() if here.text in ("cast", "try_cast") else self._call(here)
        if here.text in _RESERVED:
            raise self._refuse(here.raw.upper(), "Leave it out; a column of that name goes in backticks")
        return self._column()

    def _column(self) -> int:
        first, path = self._here, []
        while True:
            here = self._here
            if here.kind == "quoted":
                path.append(here.raw[1:-1])
            elif here.kind == "word":
                path.append(here.raw)
            else:
                raise self._unexpected("a name")
            self._step()
            if not self._sign("."):
                break
            self._count()
        if self._here.kind == "sign" and self._here.text == "(":
            raise self._unexpected("an operator, and no call")
        allowed = self._columns
        if allowed is not None and path != [ROW_ID_COLUMN]:
            prefixes = (".".join(path[:end]) for end in range(1, len(path) + 1))
            if not any(prefix in allowed for prefix in prefixes):
                raise AccessDenied(
                    f"a filter may not name column {'.'.join(path)!r} (at character {first.at + 1})",
                    remedy=f"Columns that it may name, spelled like this: {', '.join(sorted(allowed)) or 'none'}",
                )
        return 0

    def _group(self) -> int:
        self._enter()
        self._step()
        doublings = self._condition()
        self._close(")")
        return doublings

    def _list(self, opening: str, closing: str, most: int | None = None) -> int:
        """Elements between parentheses or brackets; a subscript is one of one."""
        if not self._sign(opening):
            raise self._unexpected(f"'{opening}'")
        self._enter()
        doublings, count = self._condition(), 1
        while (most is None or count < most) and self._sign(","):
            doublings, count = max(doublings, self._condition()), count + 1
        self._close(closing)
        return doublings

    def _call(self, name: _Token) -> int:
        if name.text not in FUNCTIONS:
            known = ", ".join(sorted(FUNCTIONS))
            raise self._refuse(f"function {name.raw[:40]}()", f"Functions that may be called: {known}")
        self._count()
        self._step(2)
        self._enter()
        arguments: list[list[_Token]] = []
        doublings = 0
        while True:
            begin = self._next
            doublings = max(doublings, self._condition())
            arguments.append(self._tokens[begin : self._next])
            if not self._sign(","):
                break
            self._count()
        self._close(")")
        if name.text in _REGEXES:
            self._regex(name, arguments)
        return self._doubled(doublings, name) if name.text in _DOUBLING else doublings

    def _regex(self, name: _Token, arguments: list[list[_Token]]) -> None:
        self._regexes += 1
        if self._regexes > MAX_REGEXES:
            raise self._refuse(f"more than {MAX_REGEXES} regular expressions", "Join them with |, or use LIKE", name)
        patterns = arguments[1:]
        if not patterns or any(len(pattern) != 1 or pattern[0].kind != "string" for pattern in patterns):
            raise self._refuse(f"{name.raw}() of a pattern that is no text", "Write the pattern in quotes", name)
        if any(len(pattern[0].raw) - 2 > MAX_PATTERN_CHARS for pattern in patterns):
            raise self._refuse(
                f"a regular expression of more than {MAX_PATTERN_CHARS} characters", "Shorten it", patterns[0][0]
            )

    def _cast(self) -> int:
        self._count()
        self._step(2)
        self._enter()
        doublings = self._condition()
        if not self._word("as"):
            raise self._unexpected("AS")
        self._type()
        self._close(")")
        return doublings

    def _type(self) -> None:
        here = self._here
        name = here.text if here.kind == "word" else ""
        if name in _PLAIN_TYPES:
            self._step()
        elif name in _INTEGER_TYPES:
            self._step()
            self._word("unsigned")
        elif name in _SIZED_TYPES:
            self._step()
            if self._sign("("):
                self._digits()
                if self._sign(","):
                    self._digits()
                if not self._sign(")"):
                    raise self._unexpected("')'")
        else:
            known = sorted(_PLAIN_TYPES | _INTEGER_TYPES | _SIZED_TYPES)
            raise self._unexpected(f"one of the types {', '.join(known)}")

    def _digits(self) -> None:
        if self._here.kind != "number" or not re.fullmatch(r"[0-9]{1,2}", self._here.text):
            raise self._unexpected("one or two digits")
        self._step()

    @property
    def _here(self) -> _Token:
        return self._tokens[self._next]

    def _step(self, by: int = 1) -> None:
        self._next += by

    def _word(self, text: str) -> bool:
        """Step over a keyword, if it is here."""
        found = self._here.kind == "word" and self._here.text == text
        self._next += found
        return found

    def _sign(self, text: str) -> bool:
        """Step over a sign, if it is here."""
        found = self._here.kind == "sign" and self._here.text == text
        self._next += found
        return found

    def _count(self, more: int = 1) -> None:
        self._operators += more
        if self._operators > MAX_OPERATORS:
            raise self._refuse(
                f"more than {MAX_OPERATORS} operators", "Say it shorter: many values of one column go into IN (...)"
            )

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._refuse(f"more than {MAX_DEPTH} levels of nesting", "Leave out parentheses that are not needed")

    def _close(self, closing: str) -> None:
        if not self._sign(closing):
            raise self._unexpected(f"'{closing}'")
        self._depth -= 1

    def _doubled(self, inside: int, where: _Token) -> int:
        if inside + 1 > MAX_DOUBLINGS:
            raise self._refuse(
                f"more than {MAX_DOUBLINGS} COALESCE or BETWEEN inside one another", "Write them side by side", where
            )
        return inside + 1

    def _unexpected(self, expected: str) -> FilterRefused:
        found = "its end" if self._here.kind == "end" else repr(self._here.raw[:40])
        return self._refuse(found, f"Expected {expected} there")

    def _refuse(self, found: str, remedy: str, where: _Token | None = None) -> FilterRefused:
        return _refused(self._sql, found, (where or self._here).at, remedy)
