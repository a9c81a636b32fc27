"""The one place where MySQL's and SQLAlchemy's errors become this project's.

A server's error is permanent unless it is in `_PASSES`, which was chosen from the lists of MariaDB and MySQL. The
message has the server's words, so that its reader knows what to fix, without what they quote: a value in quotes can be
a piece of a payload.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from auditexport_pipeline.core.errors import AuditExportError, InvalidConfig, OutboxUnavailable, SetupIncomplete

# A row's lock, or a table's.
LOCK_WAIT_TIMEOUT = 1205
# These end by themselves: locks, deadlocks (Galera's at COMMIT too), shutdowns and failovers, killed statements,
# connections that are used up or lost, memory and disks that are full for a while.
_PASSES = {
    *(1020, LOCK_WAIT_TIMEOUT, 1213, 1412, 1613, 1614, 1615, 3058, 3100, 3101, 3134, 3572),
    *(1042, 1043, 1047, 1053, 1077, 1078, 1079, 1152, 1180, 1181, 1184, 1317, 1927, 3032, 3168, 3169, 4031),
    *(1040, 1154, 1155, 1156, 1157, 1158, 1159, 1160, 1161, 1189, 1190, 1203),
    *(1021, 1026, 1028, 1030, 1037, 1038, 1041, 1105, 1114, 1135, 1206, 1296, 1297, 1637),
}
# A proxy's own: ProxySQL begins at 9000.
_PROXY = range(9000, 10_000)
# From the driver, about the connection.
_CLIENT = range(2000, 3000)
_TLS_NOT_OFFERED = 2026
# The driver does not have the server's way to authenticate.
_NO_WAY_TO_AUTHENTICATE = {2054, 2058, 2059, 2061}
# No answer by socket, TCP or name, or an answer that is not MySQL's.
NOT_REACHED = 2003
_NOT_REACHED = {2002, NOT_REACHED, 2005}

_ACCESS = "check AUDITEXPORT_MYSQL_URL and the grants, or run `auditexport init`"
_READ_ONLY = "let AUDITEXPORT_MYSQL_URL name a server that is open for writing, the primary"
_TIME_LIMIT = "our sessions set no time limit, so the account, a proxy or an administrator does: lift it for this user"
_PACKET = "raise max_allowed_packet of the server, and of a proxy in front of it"
_ACCOUNT = "unlock or renew the account of AUDITEXPORT_MYSQL_URL"
_TRIGGER = "check the triggers of the table: one of them, or what it calls, refuses the statement"
_ADVICE: dict[int, str] = {
    **dict.fromkeys((1044, 1045, 1049, 1054, 1142, 1143, 1146, 1227, 1370, 1698, 3159), _ACCESS),
    **dict.fromkeys((1036, 1223, 1290, 1792, 1836, 1874), _READ_ONLY),
    **dict.fromkeys((1969, 3024), _TIME_LIMIT),
    **dict.fromkeys((1153, 1301), _PACKET),
    **dict.fromkeys((1820, 1862, 3118, 3878, 3955, 4151), _ACCOUNT),
    **dict.fromkeys(
        (1356, 1449), "create the account that defines the view or trigger, or create the view or trigger again"
    ),
    **dict.fromkeys((1305, 1442, 1644), _TRIGGER),
    1129: "find out which client fails to connect there, then FLUSH HOSTS",
    1130: "let the server know this host, with CREATE USER and the grants",
    1226: "raise the limit of the account, with ALTER USER … WITH",
}
# Their words name accounts, tables, columns and settings. Those of other errors can quote a value.
_NAMES_ONLY = {*_ADVICE, *_PASSES, 1016, 1017, 1034, 1035, 1072, 1118, 1176, 1193, 1194, 1195, 1231, 1238, 1364, 1419}
_NAMES_ONLY |= {1436, 1524, 1592, 1665, 1785, 1786, 3098, 3819, 4025}
_QUOTED = re.compile(r"['\"].*['\"]|['\"].*$", re.DOTALL)
_WORDS_CHARACTERS = 400


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turns what the driver and SQLAlchemy raise into this project's errors; `what` says what was being done."""
    try:
        yield
    except AuditExportError:
        raise
    except OSError as error:
        # PyMySQL opens the certificates that the URL names; a socket's own errors come as DBAPIError.
        # One that holds no certificate is an error without a file name.
        raise InvalidConfig(
            "AUDITEXPORT_MYSQL_URL names a file that cannot be read as a certificate or key, in ssl_ca, ssl_cert or "
            f"ssl_key: {error.filename or error.strerror}"
        ) from error
    except PoolTimeout as error:
        raise OutboxUnavailable(f"MySQL: no free connection while {what}; run again") from error
    except DBAPIError as error:
        code, words = code_and_words(error.orig)
        # A cause is printed with its message, which repeats the server's words.
        raise _ours(what, code, words, error.orig) from (error if code == 0 or _repeatable(code) else None)


def code_and_words(error: BaseException | None) -> tuple[int, str]:
    """The code of a driver's error, 0 for none, and its words without line breaks."""
    arguments: tuple[object, ...] = getattr(error, "args", ())
    if not arguments or not isinstance(arguments[0], int):
        return 0, ""
    words = " ".join(" ".join(map(str, arguments[1:])).split())
    return arguments[0] % 2**16, words[:_WORDS_CHARACTERS]


def _repeatable(code: int) -> bool:
    return code in _NAMES_ONLY or code in _CLIENT or code in _PROXY


def _ours(what: str, code: int, words: str, error: BaseException | None) -> AuditExportError:
    if (refused := _certificate_refused(error)) is not None:
        return SetupIncomplete(
            f"MySQL's certificate was refused while {what} ({refused}); nothing was sent. Let ssl_ca in "
            "AUDITEXPORT_MYSQL_URL name the authority that signed it, and the URL a host name that is in it"
        )
    if code == _TLS_NOT_OFFERED:
        return SetupIncomplete(
            "AUDITEXPORT_MYSQL_URL means TLS, as it does for every server beyond this machine, and the server has no "
            "TLS; nothing was sent. Give the server ssl_cert and ssl_key, or say ssl_disabled=true for plain text"
        )
    if code in _NOT_REACHED:  # our own words: host, port and reason
        return OutboxUnavailable(
            f"MySQL failed while {what} (error {code}: {words}); nothing was changed. See that the server runs and that "
            "AUDITEXPORT_MYSQL_URL names it, then run again; `auditexport doctor` checks both databases"
        )
    words = words or "the connection is lost"
    shown = f"error {code}: {words if _repeatable(code) else _QUOTED.sub('…', words)}"
    if code in _NO_WAY_TO_AUTHENTICATE:
        return SetupIncomplete(f"MySQL refuses {what} ({shown}); {_ACCESS}")
    if code in _PASSES or code in _PROXY or code < min(_PASSES) or code in _CLIENT:
        return OutboxUnavailable(f"MySQL failed while {what} ({shown}); nothing was changed, run again")
    advice = _ADVICE.get(code, "change the setting or the table that the error names; `auditexport doctor` checks them")
    return SetupIncomplete(f"MySQL refuses {what} ({shown}); nothing was changed. To fix it, {advice}")


def _certificate_refused(error: BaseException | None) -> str | None:
    """Why a certificate was refused, when that is what PyMySQL wraps as a connection that failed."""
    cause = getattr(error, "original_exception", None)
    return cause.verify_message if isinstance(cause, ssl.SSLCertVerificationError) else None


def not_reached(error: BaseException, where: str, seconds: float) -> str | None:
    """Why no connection was made to `where`, and what to check; None where a server answered with an error of its own."""
    code, _ = code_and_words(error)
    if code >= min(_PASSES) and code not in _CLIENT:
        return None
    cause = getattr(error, "original_exception", None)
    if isinstance(cause, socket.gaierror):
        why = "the name does not resolve; check the host, and this machine's name servers"
    elif isinstance(cause, ConnectionRefusedError):
        why = "connection refused: no server listens there; check host and port, and that it is started"
    elif isinstance(cause, TimeoutError):
        why = f"no answer within {seconds:g} s; check host and port, and the firewalls between"
    elif isinstance(cause, ssl.SSLError):
        why = f"TLS failed: {cause.reason or 'no reason given'}; check that the server speaks TLS there"
    elif isinstance(cause, OSError):
        why = f"{cause.strerror or type(cause).__name__}; check host and port, and the network between"
    elif code in (2006, 2013):
        why = f"the connection was closed, or silent for {seconds:g} s, before a handshake; check that MySQL listens there"
    elif code in _CLIENT:
        return None
    else:
        why = "the server there is not MySQL; check host and port"
    return f"can't connect to MySQL at {where}: {why}"
