"""Runs ``czsl`` commands in forked children, which die or find the disk full at a file operation that is counted out.

It is a program: the packages are imported once, and a child starts in milliseconds. Requests are lines of JSON on
stdin, answers are lines of JSON on stdout.
"""

import contextlib
import errno
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback

import torch

# What a run changes on the disk, by the names of Python's audit events.
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
KILLED = 137

armed = {"roots": (), "at": 0, "how": "", "gate": (), "seen": []}


def watch(event, arguments):
    """Count changes to files below the roots; at the one that was asked for, die, or find the disk full."""
    if not armed["roots"] or event not in CHANGES or not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return
    name = os.path.abspath(os.fsdecode(arguments[0]))
    if not name.startswith(armed["roots"]) or not changes(event, name, arguments):
        return
    armed["seen"].append(f"{event} {name}")
    if len(armed["seen"]) != armed["at"]:
        return
    if armed["how"] == "kill":
        os._exit(KILLED)
    if armed["how"] == "wait":
        wait(*armed["gate"])
        return
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def wait(reached, go):
    """Make one file, and wait for the other: a test does something in between."""
    with open(reached, "w", encoding="utf-8") as file:
        file.write(str(os.getpid()))
    while not os.path.exists(go):
        time.sleep(0.01)


def changes(event, name, arguments):
    """Whether what is about to happen changes which files and folders there are."""
    there = os.path.lexists(name)
    if event == "open":
        return not there and isinstance(arguments[2], int) and bool(arguments[2] & os.O_CREAT)
    return not there if event == "os.mkdir" else there


def answer(request):
    """Run a command in a child, and tell its status, what it said, and which file operations it came to."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        status, said = run(request)
        os.write(write, json.dumps({"status": status, "said": said, "seen": armed["seen"]}).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(content) if content else {"status": os.waitstatus_to_exitcode(status), "said": "", "seen": []}


def run(request):
    from czsl_heads.cli import main

    said = io.StringIO()
    os.chdir(request.get("cwd", "."))
    if "tmpdir" in request:
        tempfile.tempdir = request["tmpdir"]
    armed.update(roots=tuple(request.get("roots", ())), at=request.get("at", 0), how=request.get("how", ""))
    armed["gate"] = request.get("gate", ())
    signal.alarm(request.get("seconds", 300))  # what hangs is killed
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = main(request["arguments"])
    except BaseException:
        status = "raised"
        said.write(traceback.format_exc())
    armed["roots"] = ()
    return status, said.getvalue()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.addaudithook(watch)
    for line in sys.stdin:
        request = json.loads(line)
        # Here and in no child: what it imports is there for all of them.
        found = {"status": run(request)[0]} if request.get("here") else answer(request)
        signal.alarm(0)
        print(json.dumps(found), flush=True)
