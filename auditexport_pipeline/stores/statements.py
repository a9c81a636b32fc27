"""Named SQL statements, read from the `.sql` file that stands beside a store.

What belongs here: the loader. What does not: statements, and any building of SQL out of data.

A statement begins with a line `-- name: some_name`; the comments under it say which index it uses, what
it locks and which race it survives, and stay in the text that the server's slow log shows.
"""

from __future__ import annotations

from pathlib import Path

from auditexport_pipeline.core.versions import statements_of


def load(file_name: str) -> dict[str, str]:
    """The statements of a `.sql` file in this package, by name."""
    return statements_of(Path(__file__).with_name(file_name).read_text(), file_name)
