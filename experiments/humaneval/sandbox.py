"""Runs a program that nobody has read, in a process of its own and with little to work with.

This keeps accidents small. It is NOT a security sandbox. Run untrusted models in a container or a
virtual machine that holds nothing of worth.

What there is: another process and process group, killed at the time limit; limits on processor
time, memory, size and number of files; an empty temporary folder to work in, removed afterwards; an
empty environment; no network, by a namespace of its own where the system allows it, and by a hook
that refuses sockets; the same hook refuses to start programs and to change files elsewhere, be they
named by text, by `Path`, or by a folder that is open (looked up in /proc: without it, refused too).

What there is not: a program can read any file that its user can read. Python tells the hook of the
calls of `os`, `open` and `sqlite3.connect`, not of files that native code opens on its own account,
such as those that SQL attaches and shared memory. And a program that looks for a way around the
hook finds one, as both live in one interpreter.
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
starts = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
          "os.kill", "os.putenv", "ctypes.", "pty.")
writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Where an event names its paths, and the open folder (`dir_fd`) that each is relative to.
# What `shutil` changes, it changes by these.
changes = {
    "os.remove": {0: 1}, "os.rmdir": {0: 1}, "os.mkdir": {0: 2}, "os.chmod": {0: 2},
    "os.chown": {0: 3}, "os.utime": {0: 3}, "os.rename": {0: 2, 1: 3}, "os.link": {0: 2, 1: 3},
    "os.symlink": {0: 2, 1: 2}, "os.truncate": {0: None}, "os.setxattr": {0: None},
    "os.removexattr": {0: None},
}
def located(path, folder=None):
    if isinstance(path, int):  # an open file or folder
        return f"/proc/self/fd/{path}"
    path = os.fsdecode(path)
    return path if folder in (None, -1) else os.path.join(f"/proc/self/fd/{folder}", path)
def outside(path):
    return not (os.path.realpath(path) + os.sep).startswith(home)
def refuse(event, args):
    places = changes.get(event, {}).items()
    paths = [located(args[path], folder and args[folder]) for path, folder in places]
    if event == "open" and args[2] & writes and not isinstance(args[0], int):
        paths = [located(args[0])]
    if event == "sqlite3.connect":
        paths = [located(args[0]).removeprefix("file:").partition("?")[0]]
    if event.startswith(starts) or any(map(outside, paths)):
        raise PermissionError(event)
def open_at(path, flags, mode=0o777, *, dir_fd=None, opened=os.open):
    # Its event does not tell the folder, but this path does.
    return opened(located(path, dir_fd), flags, mode)
def refuse_call(*args, **options):
    raise PermissionError
os.open = open_at
os.supports_dir_fd.add(open_at)
# These make files without an event.
os.mkfifo = os.mknod = refuse_call
# These write files without one; `dbm` has another way, in Python.
sys.modules["_dbm"] = sys.modules["_gdbm"] = None
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
