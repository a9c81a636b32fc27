"""Upgrades: the release before this one at work on the same two databases.

`release_7233b52.tar.xz` is that release, as `git archive 7233b52` gave it (core, stores, cli, defs, crash points): in the
repository, so that a checkout without history can test against it. `old_release` runs it in a process of its own.
"""
