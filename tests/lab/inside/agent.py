"""The agent in a guest: does what the lab asks over a virtio-serial port. Needs nothing but Python's own library.

One JSON object a line, in both directions. A request has ``id``, ``op`` and what the operation takes; the answer has
the same ``id`` and either what it gives, or ``error``. Bytes travel as base64. Requests run side by side.

| op | takes | gives |
|---|---|---|
| hello | – | boot (the boot id of the kernel) |
| run | argv, stdin, env, cwd, timeout_s | status (null: deadline passed, killed), stdout, stderr |
| spawn | argv, env, cwd, log | pid |
| put | path, data, mode, append | – |
| get | path, offset, length | data |
| clock | now (seconds since 1970) | – |
| python | code, values | result: what the code left in ``result``; runs within the agent |
"""

from __future__ import annotations

import base64
import json
import os
import signal
import site
import subprocess
import threading
import time
import traceback
from pathlib import Path
from typing import Any

PORT = "/dev/virtio-ports/lab.agent"
POLL_S = 0.02
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "HOME": "/root",
}


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def hello(request: dict[str, Any]) -> dict[str, Any]:
    return {"boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}


def run(request: dict[str, Any]) -> dict[str, Any]:
    process = subprocess.Popen(
        request["argv"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT | request.get("env", {}),
        cwd=request.get("cwd", "/root"),
        start_new_session=True,
    )
    status: int | None
    try:
        out, err = process.communicate(base64.b64decode(request.get("stdin", "")), timeout=request["timeout_s"])
        status = process.returncode
    except subprocess.TimeoutExpired as late:
        os.killpg(process.pid, signal.SIGKILL)
        # What it started in a session of its own may hold the pipes open: they are not read to their end.
        out, err, status = late.stdout or b"", late.stderr or b"", None
        threading.Thread(target=process.wait, daemon=True).start()
    return {"status": status, "stdout": encode(out), "stderr": encode(err)}


def spawn(request: dict[str, Any]) -> dict[str, Any]:
    with open(request["log"], "ab") as log:
        process = subprocess.Popen(
            request["argv"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=ENVIRONMENT | request.get("env", {}),
            cwd=request.get("cwd", "/root"),
            start_new_session=True,
        )
    threading.Thread(target=process.wait, daemon=True).start()
    return {"pid": process.pid}


def put(request: dict[str, Any]) -> dict[str, Any]:
    path = Path(request["path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab" if request.get("append") else "wb") as file:
        file.write(base64.b64decode(request["data"]))
    path.chmod(request["mode"])
    return {}


def get(request: dict[str, Any]) -> dict[str, Any]:
    with open(request["path"], "rb") as file:
        file.seek(request["offset"])
        return {"data": encode(file.read(request["length"]))}


def clock(request: dict[str, Any]) -> dict[str, Any]:
    time.clock_settime(time.CLOCK_REALTIME, request["now"])
    return {}


def python(request: dict[str, Any]) -> dict[str, Any]:
    site.main()  # installed packages become importable: not before somebody wants them, it takes time
    names: dict[str, Any] = {"result": None, **request.get("values", {})}
    exec(compile(request["code"], "<snippet>", "exec"), names)
    return {"result": names["result"]}


OPERATIONS = {f.__name__: f for f in (hello, run, spawn, put, get, clock, python)}


class Agent:
    def __init__(self, port: int) -> None:
        self._port = port
        self._writing = threading.Lock()

    def serve(self) -> None:
        buffered = b""
        while True:
            received = os.read(self._port, 1 << 16)
            if not received:  # nobody is connected
                time.sleep(POLL_S)
                continue
            buffered += received
            while b"\n" in buffered:
                line, _, buffered = buffered.partition(b"\n")
                self._accept(line)

    def _accept(self, line: bytes) -> None:
        try:
            request = json.loads(line)
        except ValueError:  # an empty line, or what an earlier client did not finish
            return
        threading.Thread(target=self._answer, args=(request,), daemon=True).start()

    def _answer(self, request: dict[str, Any]) -> None:
        try:
            answer = OPERATIONS[request["op"]](request)
        except OSError as error:
            answer = {"error": str(error)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        line = json.dumps({"id": request["id"], **answer}).encode() + b"\n"
        with self._writing:
            while line:
                line = line[os.write(self._port, line) :]


if __name__ == "__main__":
    Agent(os.open(PORT, os.O_RDWR)).serve()
