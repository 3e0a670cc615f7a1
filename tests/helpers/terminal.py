"""What a function prints on a real pseudo-terminal of some width."""

import fcntl
import os
import pty
import re
import struct
import termios
import traceback
from collections.abc import Callable

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def in_terminal(function: Callable[[], None], columns: int, **environment: str) -> str:
    """Return all that ``function`` writes, escape sequences included, in a forked process."""
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
            for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
                os.environ.pop(name, None)
            os.environ.update({"TERM": "xterm-256color", **environment})
            # What pytest has put in place of them.
            import sys

            sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
            function()
            sys.stdout.flush()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(0)
    output = b""
    while True:
        try:
            read = os.read(terminal, 1 << 16)
        except OSError:
            # Linux's answer once the other end is closed.
            break
        if not read:
            break
        output += read
    os.close(terminal)
    os.waitpid(pid, 0)
    return output.decode().replace("\r\n", "\n")


def without_escapes(output: str) -> str:
    """Return the text that is printed."""
    return _ESCAPE.sub("", output)
