"""Reads ClickHouse's error answers to an INSERT or a probe into `core.ports.Refusal`.

Only names of the schema (view, constraint, column) are taken from the text: everything else in it may quote a payload.
"""

from __future__ import annotations

import re

from auditexport_pipeline.core.ports import Refusal, RefusalKind

# Errors about values: parsing, ranges, depth, constraints.
ROW_CODES = {
    *(6, 25, 26, 27, 33, 38, 41, 53, 69, 70, 72, 117, 130, 131, 190, 306, 321, 349, 376, 395, 407),
    *(441, 467, 469, 675, 676, 691),
}
# Codes that no rerun fixes: tables, columns, grants, settings, credentials.
SETUP_CODES = {16, 36, 46, 47, 60, 62, 81, 115, 164, 192, 193, 194, 291, 452, 497, 516}
LIMIT_CODES = {
    **dict.fromkeys((241, 173, 735), RefusalKind.MEMORY),
    **dict.fromkeys((158, 307, 396, 161), RefusalKind.SIZE),
    **dict.fromkeys((159, 160), RefusalKind.TIME),
}
# The same from a proxy, by HTTP status.
LIMIT_STATUSES = {413: RefusalKind.SIZE, 504: RefusalKind.TIME, 408: RefusalKind.TIME}
# The message of our own fence, in `insert` of audit_log.sql. Another throwIf() has the same code.
FENCE = "auditexport: the deadline of this INSERT has passed"
FENCE_CODE = 395

_NAME = r"(?:`(?:[^`\\]|\\.)+`|[\w$-]+)"
_QUALIFIED = rf"({_NAME}(?:\.{_NAME})?)"
# ClickHouse appends one for each view that the rows pass, the innermost first, at the very end of the text: the text
# before can quote a payload, which may have the same words.
_VIEWS = re.compile(
    rf"((?:: while pushing to view {_QUALIFIED})+)\. \([A-Z0-9_]+\)(?: \(version [\w. ()+-]*\))?(?: \(for url \S+\))?\s*$"
)
_VIEW = re.compile(rf": while pushing to view {_QUALIFIED}")
# A missing target of a view is found before anything is written; ClickHouse then names the inserted table as the view.
_TARGET_GONE = re.compile(r"^Target table '([^']+)' of view '")
_CONSTRAINT = re.compile(rf"^Constraint ({_NAME}) for table ")
# An error in a default expression names the expression; the column is named only where a value is converted.
_COLUMN = re.compile(rf"to destination column {_QUALIFIED}")
_MESSAGE = re.compile(r"DB::Exception: (.*)", re.DOTALL)
_LONGEST_NAME = 200


def refusal_of_status(status: int, meaning: str) -> Refusal | None:
    """The same for an answer that is not ClickHouse's: a proxy's limit, by its HTTP status."""
    kind = LIMIT_STATUSES.get(status)
    return Refusal(code=status, name=f"HTTP {status}", kind=kind, meaning=meaning) if kind is not None else None


def is_fence(code: int, text: str) -> bool:
    """Whether this is the deadline of our INSERT, and not the throwIf() of a view."""
    message = _message(text)
    return code == FENCE_CODE and message.startswith(FENCE) and not _VIEWS.search(message)


def refusal_of(code: int, name: str, text: str) -> Refusal | None:
    """The answer as a value, or None for an error that is not about rows, a view or a limit."""
    message = _message(text)
    constraint = _first(_CONSTRAINT, message)
    if pushed := _VIEWS.search(message):
        view = _plain(_VIEW.findall(pushed[1])[0])
        permanent = code in SETUP_CODES
        return Refusal(
            code=code, name=name, kind=RefusalKind.VIEW, view=view, constraint=constraint, permanent=permanent
        )
    if code in SETUP_CODES and (gone := _TARGET_GONE.match(message)):
        view = f"with the target {_plain(gone[1])}, which does not exist"
        return Refusal(code=code, name=name, kind=RefusalKind.VIEW, view=view, permanent=True)
    if code in LIMIT_CODES:
        return Refusal(code=code, name=name, kind=LIMIT_CODES[code])
    if code in ROW_CODES:
        return Refusal(code=code, name=name, constraint=constraint, column=_first(_COLUMN, message))
    return None


def _message(text: str) -> str:
    found = _MESSAGE.search(text)
    return found[1] if found else text


def _first(pattern: re.Pattern[str], message: str) -> str:
    found = pattern.search(message)
    return _plain(found[1]) if found else ""


def _plain(name: str) -> str:
    """A name as a short printable line, for logs and pages."""
    return "".join(letter if letter.isprintable() else "?" for letter in name.replace("`", ""))[:_LONGEST_NAME]
