"""The supervisor: runs one server until the process that started it lets go of a pipe.

Started by `processes.Child` as `supervisor.py REPORT_FD STOP_SIGNAL ARGV…` in a session of its own, on the standard library alone and
without site packages, so that it starts in milliseconds. It writes the server's process id, or why
there is none, to REPORT_FD, and stops the server when its own standard input closes.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

# InnoDB flushes in well under this; past it the server is killed.
STOP_GRACE_S = 15.0
POLL_S = 0.1


def supervise(report_fd: int, stop_signal: int, argv: list[str]) -> None:
    # A shell's background job inherits an ignored SIGINT; a server that did could not be stopped by one.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        server = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    except OSError as error:
        os.write(report_fd, f"{error}\n".encode())
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: server.send_signal(stop_signal))
    os.write(report_fd, f"{server.pid}\n".encode())
    os.close(report_fd)
    while server.poll() is None:
        readable, _, _ = select.select([0], [], [], POLL_S)
        if readable and not os.read(0, 1):
            server.send_signal(stop_signal)
            try:
                server.wait(STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    # Whatever the server had started and left behind is in our process group, and so are we.
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    supervise(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
