"""Speaks the Debug Adapter Protocol to debugpy, as an editor does: https://microsoft.github.io/debug-adapter-protocol."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Self

Message = dict[str, Any]


class DebugAdapter:
    """An adapter in a process of its own, and the program that is debugged; or the adapter of a program that waits.

    Args:
        folder: where programs run that the adapter asks to be run in a terminal.
        address: host and port at which a program's own adapter listens; an editor that attaches with ``connect`` speaks
            to that one. None starts an adapter.
    """

    def __init__(self, folder: Path, address: tuple[str, int] | None = None) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._input: BinaryIO
        self._output: BinaryIO
        if address is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "debugpy.adapter"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert self._process.stdin is not None and self._process.stdout is not None
            self._input, self._output = self._process.stdin, self._process.stdout
        else:
            connection = socket.create_connection(address, 60)
            connection.settimeout(None)
            self._input, self._output = connection.makefile("wb"), connection.makefile("rb")
        self._terminals: list[subprocess.Popen] = []
        self._arrived: queue.Queue[Message | None] = queue.Queue()
        self._number = 0
        self.seen: list[Message] = []
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Self:
        self.answer_to(self.ask("initialize", adapterID="debugpy", supportsRunInTerminalRequest=True))
        return self

    def __exit__(self, *error: object) -> None:
        self.ask("disconnect", terminateDebuggee=True)
        for process in [*self._terminals, *([] if self._process is None else [self._process])]:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask(self, command: str, **arguments: Any) -> int:
        """Sends a request; returns its number."""
        self._number += 1
        self._send({"seq": self._number, "type": "request", "command": command, "arguments": arguments})
        return self._number

    def answer_to(self, number: int) -> Message:
        """The body of the answer to a request, which has to be a success."""
        answer = self.wait_for(lambda m: m["type"] == "response" and m["request_seq"] == number)
        assert answer["success"], answer
        return answer.get("body") or {}

    def event(self, name: str) -> Message:
        """The body of the next event of this name."""
        return self.wait_for(lambda m: m["type"] == "event" and m["event"] == name).get("body") or {}

    def wait_for(self, wanted: Callable[[Message], bool], within_s: float = 120.0) -> Message:
        """The first message that is wanted; programs are run meanwhile where the adapter asks for it."""
        while True:
            message = self._arrived.get(timeout=within_s)
            assert message is not None, f"the adapter has ended; it said {self.seen[-5:]}"
            self.seen.append(message)
            if message["type"] == "request" and message["command"] == "runInTerminal":
                self._run_in_terminal(message)
            elif wanted(message):
                return message

    def _run_in_terminal(self, request: Message) -> None:
        arguments = request["arguments"]
        environment = {**os.environ, **{k: v for k, v in (arguments.get("env") or {}).items() if v is not None}}
        process = subprocess.Popen(
            arguments["args"], cwd=arguments.get("cwd") or self._folder, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._terminals.append(process)
        body = {"processId": process.pid}
        self._number += 1
        self._send(
            {"seq": self._number, "type": "response", "request_seq": request["seq"], "success": True,
             "command": "runInTerminal", "body": body}
        )  # fmt: skip

    def _send(self, message: Message) -> None:
        content = json.dumps(message).encode()
        self._input.write(b"Content-Length: %d\r\n\r\n%s" % (len(content), content))
        self._input.flush()

    def _read(self) -> None:
        stream = self._output
        while header := stream.readline():
            length = int(header.split(b":")[1])
            while stream.readline().strip():
                pass
            self._arrived.put(json.loads(stream.read(length)))
        self._arrived.put(None)
