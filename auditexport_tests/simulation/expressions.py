"""MySQL's expressions as Python functions: what the SQL of the exporter's stores says, evaluated on simulated rows.

sqlglot parses. Here is the meaning of the operators and functions that our statements use, and of no others: an expression that
is new to this module is an error, not a guess. NULL is None. Text compares as in `utf8mb4_bin`, which our tables have and, on MariaDB,
the outbox of the demo: by code points, and spaces at the end do not count. `contract/test_mysql.py` compares each statement with
real servers.
"""

from __future__ import annotations

import json
import operator
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import Any

from sqlglot import exp

Row = Mapping[str, Any]
# A value, of a row's columns and of the statement that is running.
Value = Callable[[Row, "Call"], Any]
# Under these names a row also has the rows of its group, and its number in a window.
GROUP, ROW_NUMBER = "#group", "#row_number"


@dataclass(slots=True)
class Call:
    """One execution of a statement: its parameters, the server's time, and how a subquery is answered."""

    values: Mapping[str, Any]
    now_ms: int
    subquery: Callable[[exp.Expression, Call], list[tuple[Any, ...]]]
    inserted: Row = field(default_factory=dict)  # what VALUES(column) means


class NotSimulated(Exception):
    """A statement uses SQL that this simulation does not know."""


def compiled(node: exp.Expression, names: Callable[[exp.Column], str]) -> Value:
    """The value of an expression. `names` says under which name a row has a column."""
    make = _MAKERS.get(type(node))
    if make is None:
        raise NotSimulated(f"{type(node).__name__} in {node.sql('mysql')}")
    return make(node, lambda inner: compiled(inner, names), names)


Compile = Callable[[exp.Expression], Value]
Names = Callable[[exp.Column], str]
Maker = Callable[[Any, Compile, Names], Value]


# ── operators ────────────────────────────────────────────────────────────────────────────────────


def _binary(operation: Callable[[Any, Any], Any]) -> Maker:
    def make(node: exp.Binary, of: Compile, _: Names) -> Value:
        left, right = of(node.this), of(node.expression)

        def value(row: Row, call: Call) -> Any:
            one, other = left(row, call), right(row, call)
            return None if one is None or other is None else operation(one, other)

        return value

    return make


def _same(one: Any, other: Any) -> bool:
    """`=`: two texts compare without spaces at their ends, a text and a byte string by bytes."""
    if one == other:
        return True
    if isinstance(one, str):
        if isinstance(other, str):
            return (one[-1:] == " " or other[-1:] == " ") and one.rstrip(" ") == other.rstrip(" ")
        return isinstance(other, bytes) and one.encode() == other
    return isinstance(one, bytes) and isinstance(other, str) and one == other.encode()


def alike(value: Any) -> Any:
    """The same for values that are one to GROUP BY and DISTINCT."""
    return value.rstrip(" ") if isinstance(value, str) else value


# Wider than a column by which our statements order or compare.
_WIDTH = 200


def ordered(value: Any) -> Any:
    """What a value is ordered by: a shorter text is as if spaces followed, so a control character comes before its end."""
    return value.ljust(_WIDTH) if isinstance(value, str) else value


def _comparison(operation: Callable[[Any, Any], bool]) -> Maker:
    def compare(one: Any, other: Any) -> bool:
        return operation(ordered(one), ordered(other)) if isinstance(one, str) else operation(one, other)

    return _binary(compare)


def _and(node: exp.And, of: Compile, _: Names) -> Value:
    left, right = of(node.this), of(node.expression)

    def value(row: Row, call: Call) -> Any:
        one = left(row, call)
        if one is not None and not one:
            return False
        other = right(row, call)
        if other is not None and not other:
            return False
        return None if one is None or other is None else True

    return value


def _or(node: exp.Or, of: Compile, _: Names) -> Value:
    left, right = of(node.this), of(node.expression)

    def value(row: Row, call: Call) -> Any:
        one = left(row, call)
        if one:
            return True
        other = right(row, call)
        if other:
            return True
        return None if one is None or other is None else False

    return value


def _not(node: exp.Not, of: Compile, _: Names) -> Value:
    inner = of(node.this)

    def value(row: Row, call: Call) -> Any:
        one = inner(row, call)
        return None if one is None else not one

    return value


def _is(node: exp.Is, of: Compile, _: Names) -> Value:
    if not isinstance(node.expression, exp.Null):
        raise NotSimulated(node.sql("mysql"))
    inner = of(node.this)
    return lambda row, call: inner(row, call) is None


def _in(node: exp.In, of: Compile, _: Names) -> Value:
    inner = of(node.this)
    listed = node.args.get("field")
    if listed is not None:  # `IN :pks`
        parameter = of(listed)

        def among(row: Row, call: Call) -> Any:
            one = inner(row, call)
            return None if one is None else any(_same(one, other) for other in parameter(row, call))

        return among
    options = [of(option) for option in node.expressions]

    def value(row: Row, call: Call) -> Any:
        one = inner(row, call)
        return None if one is None else any(_same(one, option(row, call)) for option in options)

    return value


def _between(node: exp.Between, of: Compile, _: Names) -> Value:
    inner, low, high = of(node.this), of(node.args["low"]), of(node.args["high"])

    def value(row: Row, call: Call) -> Any:
        one, least, most = inner(row, call), low(row, call), high(row, call)
        return None if None in (one, least, most) else least <= one <= most

    return value


def _like(node: exp.Like, of: Compile, _: Names) -> Value:
    inner, pattern = of(node.this), of(node.expression)

    def value(row: Row, call: Call) -> Any:
        one, like = inner(row, call), pattern(row, call)
        return None if one is None or like is None else bool(_like_pattern(like).fullmatch(one))

    return value


@lru_cache(maxsize=1000)
def _like_pattern(like: str) -> re.Pattern[str]:
    escapes = {"%": ".*", "_": "."}
    return re.compile("".join(escapes.get(letter) or re.escape(letter) for letter in like), re.DOTALL)


# ── leaves ───────────────────────────────────────────────────────────────────────────────────────


def _column(node: exp.Column, _: Compile, names: Names) -> Value:
    name = names(node)
    return lambda row, call: row[name]


def _placeholder(node: exp.Placeholder, _: Compile, __: Names) -> Value:
    name = str(node.this)
    return lambda row, call: call.values[name]


def _literal(node: exp.Literal, _: Compile, __: Names) -> Value:
    text = str(node.this)
    value: Any = text if node.is_string else int(text)
    return lambda row, call: value


def _subquery(node: exp.Subquery, _: Compile, __: Names) -> Value:
    def value(row: Row, call: Call) -> Any:
        rows = call.subquery(node.this, call)
        return rows[0][0] if rows else None

    return value


# ── functions ────────────────────────────────────────────────────────────────────────────────────


def _function(operation: Callable[..., Any], *, null: bool = True) -> Maker:
    """A function of its arguments; with `null`, None when one of them is."""

    def make(node: exp.Func, of: Compile, _: Names) -> Value:
        arguments = [of(argument) for argument in _arguments(node)]

        def value(row: Row, call: Call) -> Any:
            values = [argument(row, call) for argument in arguments]
            return None if null and None in values else operation(*values)

        return value

    return make


def _arguments(node: exp.Expression) -> list[exp.Expression]:
    first = [node.this] if isinstance(node.this, exp.Expression) else []
    second = [node.expression] if isinstance(node.args.get("expression"), exp.Expression) else []
    return [*first, *second, *node.expressions]


def _cast(node: exp.Cast, of: Compile, _: Names) -> Value:
    inner, kind = of(node.this), node.to.this
    convert = {
        exp.DataType.Type.BIGINT: _integer,
        exp.DataType.Type.UBIGINT: _integer,
        exp.DataType.Type.BINARY: lambda value: value.encode() if isinstance(value, str) else value,
        exp.DataType.Type.CHARACTER_SET: lambda value: value,
    }.get(kind)
    if convert is None:
        raise NotSimulated(node.sql("mysql"))

    def value(row: Row, call: Call) -> Any:
        one = inner(row, call)
        return None if one is None else convert(one)

    return value


def _integer(value: Any) -> int:
    if isinstance(value, str):  # the digits with which it begins, as MySQL reads a text
        found = re.match(r"\s*-?\d+", value)
        return int(found[0]) if found else 0
    return round(value)


def _if(node: exp.If, of: Compile, _: Names) -> Value:
    condition, then, otherwise = of(node.this), of(node.args["true"]), of(node.args["false"])
    return lambda row, call: (then if condition(row, call) else otherwise)(row, call)


def _case(node: exp.Case, of: Compile, _: Names) -> Value:
    branches = [(of(branch.this), of(branch.args["true"])) for branch in node.args["ifs"]]
    default = of(node.args["default"]) if node.args.get("default") is not None else lambda row, call: None

    def value(row: Row, call: Call) -> Any:
        return next((then for condition, then in branches if condition(row, call)), default)(row, call)

    return value


def _coalesce(node: exp.Coalesce, of: Compile, names: Names) -> Value:
    sums = isinstance(node.this, exp.Sum)  # the type of the first decides

    def first(*values: Any) -> Any:
        found = next((value for value in values if value is not None), None)
        return Decimal(found) if sums and found is not None else found

    return _function(first, null=False)(node, of, names)


def _json(text: Any, keys: Sequence[str]) -> Any:
    """What JSON_EXTRACT finds, as JSON; None when it is not there."""
    found: Any = json.loads(text)
    for key in keys:
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return json.dumps(found)


def _json_extract(node: exp.JSONExtract, of: Compile, _: Names) -> Value:
    inner = of(node.this)
    keys = [str(part.this) for part in node.expression.find_all(exp.JSONPathKey)]

    def value(row: Row, call: Call) -> Any:
        text = inner(row, call)
        return None if text is None else _json(text, keys)

    return value


def _unquoted(text: str) -> str:
    return str(json.loads(text)) if text.startswith('"') else text


def _anonymous(node: exp.Anonymous, of: Compile, names: Names) -> Value:
    name = str(node.this).upper()
    if name == "NOW":
        return lambda row, call: call.now_ms / 1000
    if name == "VALUES":
        column = str(node.expressions[0].name)
        return lambda row, call: call.inserted[column]
    operation = {
        "UNIX_TIMESTAMP": lambda seconds: seconds,
        "CRC32": lambda text: zlib.crc32(text.encode()),
        "JSON_UNQUOTE": _unquoted,
        "OCTET_LENGTH": _bytes,
    }.get(name)
    if operation is None:
        raise NotSimulated(node.sql("mysql"))
    return _function(operation)(node, of, names)


def _substring_index(text: str, delimiter: str, count: int) -> str:
    return delimiter.join(text.split(delimiter)[:count])


def _bytes(value: Any) -> int:
    return len(value.encode() if isinstance(value, str) else value)


def _of_all(operation: Callable[..., Any], *arguments: Any) -> Value:
    *nodes, of = arguments
    values = [of(node) for node in nodes]
    return lambda row, call: operation(*(value(row, call) for value in values))


# ── aggregates ───────────────────────────────────────────────────────────────────────────────────


def _aggregate(operation: Callable[[list[Any]], Any]) -> Maker:
    def make(node: exp.AggFunc, of: Compile, _: Names) -> Value:
        inner: Value = (lambda row, call: 1) if isinstance(node.this, exp.Star) else of(node.this)

        def value(row: Row, call: Call) -> Any:
            values = [one for member in row[GROUP] if (one := inner(member, call)) is not None]
            return operation(values)

        return value

    return make


def _window(node: exp.Window, _: Compile, __: Names) -> Value:
    if not isinstance(node.this, exp.RowNumber):
        raise NotSimulated(node.sql("mysql"))
    return lambda row, call: row[ROW_NUMBER]


_MAKERS: dict[type[Any], Maker] = {
    exp.And: _and,
    exp.Or: _or,
    exp.Not: _not,
    exp.Is: _is,
    exp.In: _in,
    exp.Between: _between,
    exp.Like: _like,
    exp.EQ: _binary(_same),
    exp.NEQ: _binary(lambda one, other: not _same(one, other)),
    exp.GT: _comparison(operator.gt),
    exp.GTE: _comparison(operator.ge),
    exp.LT: _comparison(operator.lt),
    exp.LTE: _comparison(operator.le),
    exp.Add: _binary(lambda one, other: one + other),
    exp.Sub: _binary(lambda one, other: one - other),
    exp.Mul: _binary(lambda one, other: one * other),
    exp.Paren: lambda node, of, _: of(node.this),
    exp.Column: _column,
    exp.Placeholder: _placeholder,
    exp.Literal: _literal,
    exp.Boolean: lambda node, of, _: lambda row, call: bool(node.this),
    exp.Null: lambda node, of, _: lambda row, call: None,
    exp.Subquery: _subquery,
    exp.CurrentSchema: lambda node, of, _: lambda row, call: "simulated",
    exp.Cast: _cast,
    exp.If: _if,
    exp.Case: _case,
    exp.Coalesce: _coalesce,
    exp.Nullif: _function(
        lambda one, other: None if one is not None and other is not None and _same(one, other) else one, null=False
    ),
    exp.Greatest: _function(max),
    exp.Concat: _function(lambda *texts: "".join(texts)),
    exp.LowerHex: _function(lambda number: f"{number:x}"),
    exp.Left: _function(lambda value, length: value[:length]),
    exp.SubstringIndex: lambda node, of, _: _of_all(
        _substring_index, node.this, node.args["delimiter"], node.args["count"], of
    ),
    exp.JSONExtract: _json_extract,
    exp.Anonymous: _anonymous,
    exp.Count: _aggregate(len),
    exp.Sum: _aggregate(lambda values: Decimal(sum(values)) if values else None),
    exp.Min: _aggregate(lambda values: min(values, default=None)),
    exp.Max: _aggregate(lambda values: max(values, default=None)),
    exp.Window: _window,
}
AGGREGATES = (exp.Count, exp.Sum, exp.Min, exp.Max)
