"""Runs a program that nobody has read, in a process of its own and with little to work with.

This keeps accidents small. It is NOT a security sandbox: a program that wants to can still read any
file that its user can read, and may find a way around the rest. Run untrusted models in a container
or a virtual machine that holds nothing of worth.

What there is: another process and process group, killed at the time limit; limits on processor
time, memory, size and number of files; an empty temporary folder to work in, removed afterwards; an
empty environment; no network, by a namespace of its own where the system allows it, and by a hook
that refuses sockets; the same hook refuses to start programs and to change files elsewhere.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from typing import Literal

Outcome = Literal["passed", "failed", "timeout"]

# Reads the word to say at the end, and the program; says the word only if the program ran through.
# `SystemExit` does not pass, and `os._exit` says nothing.
_GUARD = """
import ctypes, os, resource, sys
word, seconds, megabytes = sys.stdin.readline().split()
program = sys.stdin.read()
say = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
try:
    libc = ctypes.CDLL(None)
    # A network namespace: as an ordinary user it takes a user namespace too.
    libc.unshare(0x50000000) and libc.unshare(0x40000000)
except (OSError, AttributeError):
    pass
size, seconds = int(megabytes) << 20, int(seconds)
for name, most in (
    ("RLIMIT_CPU", seconds), ("RLIMIT_AS", size), ("RLIMIT_DATA", size), ("RLIMIT_STACK", 64 << 20),
    ("RLIMIT_FSIZE", 1 << 20), ("RLIMIT_NOFILE", 32), ("RLIMIT_CORE", 0),
):
    try:
        resource.setrlimit(getattr(resource, name), (most, most))
    except (AttributeError, OSError, ValueError):
        pass
home = os.path.realpath(os.getcwd()) + os.sep
changes = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link",
           "os.symlink", "os.truncate", "os.utime", "shutil.")
starts = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
          "os.kill", "os.putenv", "ctypes.", "pty.")
writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
outside = lambda path: not (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(home)
def refuse(event, args, outside=outside, starts=starts, changes=changes, writes=writes):
    if event.startswith(starts):
        raise PermissionError(event)
    if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & writes:
        if outside(args[0]):
            raise PermissionError(event)
    if event.startswith(changes) and any(
        outside(path) for path in args if isinstance(path, (str, bytes))
    ):
        raise PermissionError(event)
code = compile(program, "program", "exec")
sys.addaudithook(refuse)
exec(code, {"__name__": "__main__"})
os.write(say, word.encode())
"""


def run_program(program: str, *, seconds: int = 5, megabytes: int = 1024) -> Outcome:
    """Runs a Python program, see the module's warning.

    Args:
        program: its source; only the standard library is there.
        seconds: limit of processor time; that of the clock is one more.
        megabytes: limit of memory.

    Returns:
        "passed" if it ran to its end without an exception.
    """
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="humaneval-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        given = f"{word} {seconds} {megabytes}\n{program}".encode("utf-8", "replace")
        try:
            said, _ = process.communicate(given, timeout=seconds + 1)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return "timeout"
        finally:
            process.kill()
            process.communicate()
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "timeout"
    return "passed" if said == word.encode() else "failed"
