"""MySQL's statements on the simulated server: the text that the exporter's stores send, parsed by sqlglot and run in a transaction.

READ COMMITTED, as InnoDB does it: a plain SELECT sees what is committed when it begins, and its transaction's own changes. A
statement that locks looks at each row, waits for its lock, and looks at it again. Rows come by ascending primary key where nothing
else orders them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sqlglot
from sqlglot import exp

from auditexport_pipeline.sql import keys_of, load
from auditexport_tests.simulation.expressions import (
    AGGREGATES,
    GROUP,
    ROW_NUMBER,
    Call,
    NotSimulated,
    Row,
    Value,
    alike,
    compiled,
    ordered,
)
from auditexport_tests.simulation.mysql_server import Key, Transaction

TABLES = ("outbox", "ledger", "dead_letters", "actions", "erasures")


@dataclass(slots=True, kw_only=True)
class Answer:
    """What the server answers to one statement. `matched` are the rows that an UPDATE or DELETE found."""

    names: tuple[str, ...] = ()
    rows: list[tuple[Any, ...]]
    matched: int = 0
    last_key: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A table, as our CREATE TABLE statement declares it."""

    name: str
    key: str
    defaults: Mapping[str, Any]
    counts_keys_up: bool
    indexes: tuple[tuple[str, ...], ...]


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


@lru_cache
def definitions() -> dict[str, Definition]:
    """The tables of `mysql/schema.sql`, by name."""
    loaded = load("mysql/schema.sql")
    found = [_definition(loaded[name].replace("$collation", "utf8mb4_bin")) for name in TABLES]
    return {table.name: table for table in found}


def _definition(statement: str) -> Definition:
    tree = sqlglot.parse_one(statement, dialect="mysql")
    defaults: dict[str, Any] = {}
    key = ""
    counted = False
    for column in tree.find_all(exp.ColumnDef):
        kinds = {type(constraint.kind): constraint.kind for constraint in column.constraints}
        default = kinds.get(exp.DefaultColumnConstraint)
        defaults[column.name] = compiled(default.this, _no_columns)({}, _NO_CALL) if default is not None else None
        counted = counted or exp.AutoIncrementColumnConstraint in kinds
        if exp.PrimaryKeyColumnConstraint in kinds:
            key = column.name
    for declared in tree.find_all(exp.PrimaryKey):
        key = declared.expressions[0].name
    indexes = tuple(tuple(columns.split(",")) for columns in keys_of(statement).values())
    return Definition(name=tree.this.this.name, key=key, defaults=defaults, counts_keys_up=counted, indexes=indexes)


def _no_columns(column: exp.Column) -> str:
    raise NotSimulated(column.sql("mysql"))


_NO_CALL = Call({}, 0, lambda node, call: [])


# ── running ──────────────────────────────────────────────────────────────────────────────────────


def run(transaction: Transaction, text: str, values: Mapping[str, Any]) -> Answer:
    """Runs one statement. Raises the driver's errors, and `NotSimulated`."""
    statement = _prepared(text)
    transaction.statement(_title(text))
    call = Call(values, transaction.server.now_ms(), lambda node, call: _select(node).run(transaction, call).rows)
    with transaction.undone_on_timeout():
        return statement(transaction, call)


Statement = Callable[[Transaction, Call], Answer]


@lru_cache(maxsize=2000)
def _prepared(text: str) -> Statement:
    tree = sqlglot.parse_one(text, dialect="mysql")
    makers: dict[type[Any], Callable[[Any], Statement]] = {
        exp.Select: lambda node: _select(node).run,
        exp.Update: _update,
        exp.Delete: _delete,
        exp.Insert: _insert,
    }
    make = makers.get(type(tree))
    if make is None:
        raise NotSimulated(text)
    return make(tree)


@lru_cache(maxsize=2000)
def _title(text: str) -> str:
    """The statement in one line of a story: its verb and its table."""
    tree = sqlglot.parse_one(text, dialect="mysql")
    tables = ", ".join(dict.fromkeys(table.name for table in tree.find_all(exp.Table)))
    lock = " FOR UPDATE" if tree.args.get("locks") else ""
    changed = ""
    if isinstance(tree, exp.Update):
        changed = " SET " + ", ".join(one.this.name for one in tree.expressions)
    return f"{type(tree).__name__.upper()} {tables}{changed}{lock}"


# ── where rows come from ─────────────────────────────────────────────────────────────────────────

Keys = Callable[[Call], "Iterable[Key] | None"]


class _Source:
    """A table, a view of the server's catalogue, or a subquery, under its alias. A row has each column under its name."""

    def __init__(self, node: exp.Expression) -> None:
        self.alias = node.alias_or_name
        self.definition: Definition | None = None
        self._inner: _Select | None = None
        self.columns: set[str]
        if isinstance(node, exp.Subquery):
            self._inner = _select(node.this)
            self.columns = set(self._inner.names)
        elif isinstance(node, exp.Table) and node.db == "information_schema":
            self.columns = set(_CATALOGUE[node.name])
            self._catalogue = node.name
        elif isinstance(node, exp.Table):
            self.definition = definitions()[node.name]
            self.columns = set(self.definition.defaults)
        else:
            raise NotSimulated(node.sql("mysql"))

    def rows(self, transaction: Transaction, call: Call, keys: Iterable[Key] | None = None) -> Iterator[Row]:
        if self._inner is not None:
            answer = self._inner.run(transaction, call)
            return (dict(zip(answer.names, row, strict=True)) for row in answer.rows)
        if self.definition is None:
            return iter(_CATALOGUE_ROWS.get(self._catalogue, ()))
        return (row for _, row in transaction.rows(self.definition.name, keys))


_CATALOGUE = {
    "tables": ("table_schema", "table_name", "create_time"),
    "triggers": (
        *("trigger_name", "action_timing", "action_statement", "event_object_schema"),
        *("event_object_table", "event_manipulation", "action_order"),
    ),
    "check_constraints": ("constraint_schema", "table_name", "check_clause"),
}
_CATALOGUE_ROWS: dict[str, list[Row]] = {
    "tables": [
        {"table_schema": "simulated", "table_name": name, "create_time": 1_700_000_000}
        for name in ("clickhouse_outbox", "clickhouse_outbox_batch")
    ]
}


def _conjuncts(node: exp.Expression | None) -> Iterator[exp.Expression]:
    if isinstance(node, (exp.And, exp.Paren)) and (isinstance(node, exp.And) or isinstance(node.this, exp.And)):
        for part in (node.this, node.args.get("expression")):
            yield from _conjuncts(part)
    elif node is not None:
        yield node


def _keys(where: exp.Expression | None, source: _Source) -> Keys:
    """The primary keys that a condition names; None where it names none: then all rows are looked at."""
    definition = source.definition
    if definition is None:
        return lambda call: None

    def is_key(node: Any) -> bool:
        return isinstance(node, exp.Column) and node.name == definition.key and node.table in ("", source.alias)

    for part in _conjuncts(where):
        if isinstance(part, exp.EQ) and is_key(part.this) and not list(part.expression.find_all(exp.Column)):
            value = compiled(part.expression, _no_columns)
            return lambda call: [value({}, call)]
        if isinstance(part, exp.In) and is_key(part.this) and part.args.get("field") is not None:
            listed = compiled(part.args["field"], _no_columns)
            return lambda call: sorted(set(listed({}, call)))
    return lambda call: None


class _Reach:
    """The rows that a statement which locks comes to before it looks at conditions that its index does not answer.

    Shown by MariaDB 10.11, 11.8 and MySQL 9: SELECT … FOR UPDATE and DELETE wait for each of these rows, whether it matches or
    not. So does an UPDATE of rows that it names by key (also by a range of one key), or finds by a secondary index; of other
    rows it passes those whose committed version does not match (InnoDB calls that a semi-consistent read). The index is the
    primary key where a condition is about it, otherwise the one of which most columns are given.
    """

    def __init__(self, where: exp.Expression | None, source: _Source) -> None:
        assert source.definition is not None
        self._table, key = source.definition.name, source.definition.key
        self._named = _keys(where, source)
        within = [
            part
            for part in _conjuncts(where)
            if not part.find(exp.Subquery)
            and (columns := list(part.find_all(exp.Column)))
            and all(column.name == key for column in columns)
        ]
        self._within = [compiled(part, lambda column: "key") for part in within]
        self._ranges = [
            (compiled(found.args["low"], _no_columns), compiled(found.args["high"], _no_columns))
            for part in within
            for found in part.find_all(exp.Between)
        ]
        given = {
            part.this.name: part
            for part in _conjuncts(where)
            if isinstance(part, exp.EQ) and isinstance(part.this, exp.Column) and not part.expression.find(exp.Column)
        }
        prefixes = [list(itertools.takewhile(given.__contains__, columns)) for columns in source.definition.indexes]
        by_index = [] if self._within else max(prefixes, key=len, default=[])
        self._by_index = [compiled(given[column], lambda column: column.name) for column in by_index]

    def keys(self, transaction: Transaction, call: Call) -> list[tuple[Key, bool]]:
        """In ascending order, each with whether the statement waits for it though it does not match."""
        named = self._named(call)
        if named is not None:
            return [(key, True) for key in named if transaction.meets(self._table, key)]
        found: Iterable[Key] = transaction.keys_that_may_be(self._table)
        if self._by_index:
            return [(key, True) for key in sorted(found) if self._in_index(key, transaction, call)]
        for value in self._within:
            found = [key for key in found if value({"key": key}, call)]
        single = {first for low, high in self._ranges if (first := low({}, call)) == high({}, call)}
        return [(key, key in single) for key in sorted(found) if transaction.meets(self._table, key)]

    def _in_index(self, key: Key, transaction: Transaction, call: Call) -> bool:
        """Whether the index leads to this row as it is, or as another transaction is changing it."""
        rows = transaction.versions(self._table, key)
        return any(all(value(row, call) for value in self._by_index) for row in rows)


# ── SELECT ───────────────────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=2000)
def _select(node: exp.Expression) -> _Select:
    return _Union(node) if isinstance(node, exp.Union) else _Select(node)


class _Select:
    def __init__(self, node: exp.Expression) -> None:
        if isinstance(node, exp.Union):
            return
        if not isinstance(node, exp.Select):
            raise NotSimulated(node.sql("mysql"))
        from_ = node.args.get("from_")
        joins = node.args.get("joins") or []
        self._sources = [_Source(part.this) for part in ([from_] if from_ is not None else []) + joins]
        self._joins = [(join.side == "LEFT", self._value(join.args["on"])) for join in joins]
        self._points = [_point(join.args["on"], source) for join, source in zip(joins, self._sources[1:], strict=True)]
        where = node.args.get("where")
        self._where = self._value(where.this) if where is not None else None
        self._keys = _keys(where.this if where is not None else None, self._sources[0]) if self._sources else None
        self.names = tuple(one.alias_or_name for one in node.expressions)
        self._values = [self._value(one.this if isinstance(one, exp.Alias) else one) for one in node.expressions]
        group = node.args.get("group")
        self._by = (
            [self._of_alias(one, node, columns_first=True) for one in group.expressions] if group is not None else []
        )
        self._grouped = group is not None or any(
            one.find(*AGGREGATES) and not one.find(exp.Subquery) for one in node.expressions
        )
        order = node.args.get("order")
        self._order = (
            [(self._of_alias(one.this, node), bool(one.args.get("desc"))) for one in order.expressions] if order else []
        )
        limit = node.args.get("limit")
        self._limit = compiled(limit.expression, _no_columns) if limit is not None else None
        self._distinct = node.args.get("distinct") is not None
        locks = node.args.get("locks") or []
        self._lock = locks[0] if locks else None
        self._reach = _Reach(where.this if where is not None else None, self._sources[0]) if locks else None
        window = node.find(exp.Window)
        own_window = window is not None and window.find_ancestor(exp.Select) is node
        self._numbered_by = self._value(window.args["order"].expressions[0].this) if own_window else None

    def _value(self, node: exp.Expression) -> Value:
        return compiled(node, self._name)

    def _name(self, column: exp.Column) -> str:
        """With one source, a row has its columns under their names; with several, under alias.name."""
        if len(self._sources) == 1:
            return column.name
        if column.table:
            return f"{column.table}.{column.name}"
        return next(f"{source.alias}.{column.name}" for source in self._sources if column.name in source.columns)

    def _of_alias(self, node: exp.Expression, select: exp.Select, *, columns_first: bool = False) -> Value:
        """ORDER BY prefers an alias of the SELECT to a column of its sources, GROUP BY the other way round."""
        if isinstance(node, exp.Column) and not node.table:
            is_column = any(node.name in source.columns for source in self._sources)
            for place, one in enumerate(select.expressions):
                if one.alias_or_name == node.name and not (columns_first and is_column):
                    return self._values[place]
        return self._value(node)

    def run(self, transaction: Transaction, call: Call) -> Answer:
        found: list[Row] = list(
            self._rows(transaction, call) if self._lock is None else self._locked(transaction, call)
        )
        if self._numbered_by is not None:
            by = self._numbered_by
            found.sort(key=lambda row: by(row, call))
            found = [{**row, ROW_NUMBER: number} for number, row in enumerate(found, start=1)]
        if self._grouped:
            found = self._groups(found, call)
        elif self._order and self._order[-1][1]:
            found.reverse()  # an index that is read from its end has the keys of equal entries in descending order
        for value, descending in reversed(self._order):
            found.sort(key=lambda row, value=value: _order_of(value(row, call)), reverse=descending)  # type: ignore[misc]
        answers = [tuple(value(row, call) for value in self._values) for row in found]
        if self._distinct:
            answers = list({tuple(map(alike, answer)): answer for answer in reversed(answers)}.values())[::-1]
        if self._limit is not None:
            answers = answers[: self._limit({}, call)]
        return Answer(names=self.names, rows=answers)

    def _rows(self, transaction: Transaction, call: Call) -> Iterator[Row]:
        if not self._sources:
            yield {}
            return
        assert self._keys is not None
        first, *others = self._sources
        where = self._where
        for row in first.rows(transaction, call, self._keys(call)):
            if not others:
                if where is None or where(row, call):
                    yield row
                continue
            for joined in self._join(_under(first.alias, row), others, transaction, call):
                if where is None or where(joined, call):
                    yield joined

    def _join(self, row: Row, others: Sequence[_Source], transaction: Transaction, call: Call) -> Iterator[Row]:
        if not others:
            yield row
            return
        source, *rest = others
        place = len(self._joins) - len(others)
        (left, on), point = self._joins[place], self._points[place]
        matched = False
        for other in source.rows(transaction, call, [row[point]] if point is not None else None):
            both = {**row, **_under(source.alias, other)}
            if on(both, call):
                matched = True
                yield from self._join(both, rest, transaction, call)
        if left and not matched:
            nulls = _under(source.alias, dict.fromkeys(source.columns))
            yield from self._join({**row, **nulls}, rest, transaction, call)

    def _locked(self, transaction: Transaction, call: Call) -> Iterator[Row]:
        definition, where = self._sources[0].definition, self._where
        assert definition is not None
        assert self._lock is not None
        assert self._reach is not None
        alone, skip = bool(self._lock.args.get("update")), self._lock.args.get("wait") is False
        for key, _ in self._reach.keys(transaction, call):
            row = transaction.locked_row(
                definition.name, key, lambda row: where is None or where(row, call), alone=alone, skip=skip
            )
            if row is not None:
                yield row

    def _groups(self, rows: list[Row], call: Call) -> list[Row]:
        if not self._by:
            return [{**(rows[0] if rows else {}), GROUP: rows}]
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(alike(value(row, call)) for value in self._by), []).append(row)
        return [{**members[0], GROUP: members} for members in groups.values()]


class _Union(_Select):
    """UNION ALL."""

    def __init__(self, node: exp.Union) -> None:
        super().__init__(node)
        if node.args.get("distinct"):
            raise NotSimulated(node.sql("mysql"))
        self._parts = [_select(node.this), _select(node.expression)]
        self.names = self._parts[0].names

    def run(self, transaction: Transaction, call: Call) -> Answer:
        return Answer(names=self.names, rows=[row for part in self._parts for row in part.run(transaction, call).rows])


def _under(alias: str, row: Row) -> Row:
    return {f"{alias}.{name}": value for name, value in row.items()}


def _point(on: exp.Expression, source: _Source) -> str | None:
    """The column of an earlier table that has the primary key of this one, where ON says so: then one row can match."""
    for term in on.flatten() if isinstance(on, exp.And) else [on]:
        if isinstance(term, exp.EQ) and isinstance(term.this, exp.Column) and isinstance(term.expression, exp.Column):
            for here, there in ((term.this, term.expression), (term.expression, term.this)):
                is_key = source.definition is not None and here.name == source.definition.key
                if here.table == source.alias and is_key and there.table != source.alias:
                    return f"{there.table}.{there.name}"
    return None


def _order_of(value: Any) -> tuple[bool, Any]:
    """NULL comes first."""
    return (value is not None, ordered(value))


# ── statements that change rows ──────────────────────────────────────────────────────────────────


def _one_table(node: exp.Expression) -> Definition:
    source = _Source(node)
    assert source.definition is not None
    return source.definition


def _matching(tree: exp.Expression) -> Callable[[Transaction, Call], Iterator[tuple[Key, Row]]]:
    """The rows that the condition of an UPDATE or DELETE matches, each locked when it is given."""
    source = _Source(tree.this)
    definition = source.definition
    assert definition is not None
    condition = tree.args["where"].this
    where, reach = compiled(condition, lambda column: column.name), _Reach(condition, source)
    passes = isinstance(tree, exp.Update)

    def matching(transaction: Transaction, call: Call) -> Iterator[tuple[Key, Row]]:
        for key, waits in reach.keys(transaction, call):
            if passes and not waits:
                seen = transaction.get(definition.name, key)
                if seen is None or not where(seen, call):
                    continue
            row = transaction.locked_row(definition.name, key, lambda row: bool(where(row, call)))
            if row is not None:
                yield key, row

    return matching


def _update(tree: exp.Update) -> Statement:
    definition, matching = _one_table(tree.this), _matching(tree)
    changes = _assignments(tree.expressions)

    def run(transaction: Transaction, call: Call) -> Answer:
        matched = 0
        for key, row in matching(transaction, call):
            transaction.put(definition.name, key, _changed(row, changes, call))
            matched += 1
        return Answer(rows=[], matched=matched)

    return run


def _assignments(nodes: Iterable[exp.Expression]) -> list[tuple[str, Value]]:
    return [(node.this.name, compiled(node.expression, lambda column: column.name)) for node in nodes]


def _changed(row: Row, changes: Sequence[tuple[str, Value]], call: Call) -> Row:
    """From left to right: a later assignment sees the earlier ones."""
    changed = dict(row)
    for name, value in changes:
        changed[name] = value(changed, call)
    return changed


def _delete(tree: exp.Delete) -> Statement:
    definition, matching = _one_table(tree.this), _matching(tree)

    def run(transaction: Transaction, call: Call) -> Answer:
        matched = 0
        for key, _ in matching(transaction, call):
            transaction.put(definition.name, key, None)
            matched += 1
        return Answer(rows=[], matched=matched)

    return run


def _insert(tree: exp.Insert) -> Statement:
    definition = _one_table(tree.this.this)
    columns = [column.name for column in tree.this.expressions]
    (listed,) = tree.expression.expressions
    values = [compiled(one, _no_columns) for one in listed.expressions]
    conflict = tree.args.get("conflict")
    on_duplicate = _assignments(conflict.expressions) if conflict is not None else None
    ignore = bool(tree.args.get("ignore"))

    def run(transaction: Transaction, call: Call) -> Answer:
        row = {**definition.defaults, **{name: value({}, call) for name, value in zip(columns, values, strict=True)}}
        if definition.counts_keys_up and row[definition.key] is None:
            row[definition.key] = transaction.new_key(definition.name)
        elif definition.counts_keys_up:
            transaction.use_key(definition.name, row[definition.key])
        key = row[definition.key]
        transaction.lock(definition.name, key)
        existing = transaction.get(definition.name, key)
        matched = 1
        if existing is None:
            transaction.put(definition.name, key, row)
        elif on_duplicate is not None:
            call.inserted = row
            changed = _changed(existing, on_duplicate, call)
            matched = 1 if changed == existing else 2
            transaction.put(definition.name, key, changed)
        elif ignore:
            matched = 0
        else:
            raise transaction.duplicate(definition.name, key)
        return Answer(rows=[], matched=matched, last_key=key if definition.counts_keys_up and matched else 0)

    return run
