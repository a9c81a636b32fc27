"""Named SQL statements, read from the `.sql` file that stands beside a store.

What belongs here: the loader. What does not: statements, and any building of SQL out of data.

A statement begins with a line `-- name: some_name`; the comments under it say which index it uses, what
it locks and which race it survives, and stay in the text that the server's slow log shows.
"""

from __future__ import annotations

from pathlib import Path


def load(file_name: str) -> dict[str, str]:
    """The statements of a `.sql` file in this package, by name."""
    statements: dict[str, str] = {}
    name = ""
    for line in Path(__file__).with_name(file_name).read_text().splitlines():
        if line.startswith("-- name: "):
            name = line.removeprefix("-- name: ").strip()
            if name in statements:
                raise ValueError(f"{file_name} holds two statements named {name}")
            statements[name] = ""
        elif name and not line.lstrip().startswith("--"):
            statements[name] += line + "\n"
    return {name: text.strip() for name, text in statements.items()}
