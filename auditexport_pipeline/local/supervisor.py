"""The supervisor: runs one server until the process that started it closes a pipe.

`processes.Child` starts it as `supervisor.py REPORT_FD STOP_SIGNAL ARGV…` in a session of its own. It uses the standard
library only, without site packages, so that it starts in milliseconds. It writes the server's process id, or the error, to
REPORT_FD, and stops the server when its standard input closes.
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
    # A shell's background job ignores SIGINT. A server that inherits this could not be stopped by SIGINT.
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
    # Ends what the server started and left running, and this process: all are in one process group.
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    supervise(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
