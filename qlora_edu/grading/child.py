"""The process that a submission runs in. It obeys three orders: run a cell, call an answer, say what is defined."""

import ast
import linecache
import os
from dataclasses import asdict
from multiprocessing.connection import Connection

import torch

import qlora_edu.checks as check
from qlora_edu.checks.attempt import attempt
from qlora_edu.grading.sandbox import Fence, confine
from qlora_edu.grading.values import Unreadable, decode, encode

CELL_SECONDS = 20.0


def main(connection: Connection, fence: Fence) -> None:
    """Confine this process, then obey until the other end closes."""
    if hasattr(os, "setsid"):
        os.setsid()  # so that it can be ended with all that it started
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    own = connection.fileno()
    os.closerange(3, own)  # nothing but the connection: no other process's pipes
    os.closerange(own + 1, 4096)
    torch.set_num_threads(1)
    confine(fence)
    exercises, space = check.exercises(), {"__name__": "__main__"}
    while True:
        try:
            order = decode(connection.recv_bytes())
        except (EOFError, OSError):
            return
        if order["do"] == "run":
            answer = _run(order["source"], space, order["seconds"])
        elif order["do"] == "defined":
            answer = {"defined": callable(space.get(order["name"]))}
        else:
            exercise, target = exercises[order["exercise"]], space.get(order["name"])
            outcome = exercise.outcome(target, order["arguments"], order["seconds"])
            answer = asdict(outcome)
        try:
            message = encode(answer)
        except Unreadable as error:
            message = encode(
                {"problem": "crashed", "message": f"a result that is {error}", "error": ["TypeError"]}
            )
        connection.send_bytes(message)


def _run(source: str, space: dict, seconds: float) -> dict:
    """Run one cell statement by statement, so that what stands before a failing one is kept."""
    source = "\n".join("pass" if line.startswith(("%", "!")) else line for line in source.splitlines())
    try:
        statements = ast.parse(source).body
        name = f"<cell {len(linecache.cache)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for messages
    except SyntaxError as error:
        return {
            "problem": "syntax",
            "message": f"SyntaxError: {error.msg}, at `{(error.text or '').strip()[:80]}`",
        }
    for statement in statements:
        code = compile(ast.Module([statement], []), name, "exec")
        outcome = attempt(lambda code=code: exec(code, space), (), seconds, allow=("qlora_edu",))
        if outcome.problem:
            return {"problem": outcome.problem, "message": outcome.message or outcome.problem}
    return {"problem": "", "message": ""}
