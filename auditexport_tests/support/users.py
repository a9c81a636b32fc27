"""The one user of the embedded ClickHouse, with grants and a settings profile that a test chooses.

What belongs here: the text of its users.xml. What does not: the rest of a server's configuration, and starting it anew.
"""

from __future__ import annotations

from collections.abc import Iterable

_USERS = """
<clickhouse>
  <profiles><default>{profile}</default></profiles>
  <quotas><default/></quotas>
  <users><default>
    <password/> <networks><ip>::/0</ip></networks> <profile>default</profile> <quota>default</quota>
    <grants>{grants}</grants>
  </default></users>
</clickhouse>
"""


def users_xml(grants: Iterable[str], profile: str = "") -> str:
    """A users.xml with these GRANT statements, which name nobody, and these settings as XML."""
    queries = "".join(f"<query>{grant}</query>" for grant in grants)
    return _USERS.format(grants=queries, profile=profile)
