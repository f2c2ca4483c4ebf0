"""A submission's process, seen from outside: started, given its cells, asked, ended, started again where it died."""

import os
import signal
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import get_context

from qlora_edu.checks import Exercise
from qlora_edu.checks.attempt import PATIENCE, Outcome
from qlora_edu.grading import child
from qlora_edu.grading.sandbox import Fence
from qlora_edu.grading.values import LARGEST, Unreadable, decode, encode

GRACE = 10.0  # seconds that a child gets to notice by itself that its time is up

# All children are forked from one process that has imported torch and the checks, and nothing of any submission.
CONTEXT = get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix":
    CONTEXT.set_forkserver_preload(["qlora_edu.grading.child"])


class Died(Exception):
    """The process ended, or did not answer in time."""


class Session:
    """One submission's process.

    Args:
        cells: the sources of its code cells, in order.
        hidden: folders that it may not read.
        memory: bytes that it may take. seconds: for one call and one cell; by default the exercise's, and 20.
        given: how many of the first cells are the course's own; what goes wrong there is not noted.

    A cell or a call that ends the process costs only itself: the process is started again without that cell.
    """

    def __init__(
        self,
        cells: Sequence[str],
        hidden: Sequence[str] = (),
        memory: int = 2 * 2**30,
        seconds: float | None = None,
        given: int = 0,
    ):
        self.cells, self.hidden, self.memory = list(cells), tuple(hidden), memory
        self.seconds, self.given = seconds, given
        self.notes: list[str] = []  # what was wrong with cells
        self._fatal: set[int] = set()
        self._process = self._connection = self._scratch = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_) -> None:
        self._end()

    def defined(self, name: str) -> bool:
        """Whether the submission defines something callable by that name."""
        self._begin()
        try:
            return bool(self._ask({"do": "defined", "name": name}, GRACE).get("defined"))
        except Died:
            return False

    def outcome(self, exercise: Exercise, name: str, arguments: tuple) -> Outcome:
        """What the submission's answer gives for these inputs."""
        self._begin()
        limit = self.seconds or exercise.seconds
        order = {
            "do": "call",
            "exercise": exercise.id,
            "name": name,
            "arguments": arguments,
            "seconds": limit,
        }
        try:
            fields = self._ask(order, PATIENCE * limit + GRACE)
            return Outcome(**fields)
        except Died as reason:
            problem = "endless" if "no answer" in str(reason) else "ended"
            return Outcome(problem=problem, message=str(reason))
        except TypeError:
            return Outcome(problem="ended", message="its process sent something that is no result")

    def _begin(self) -> None:
        """Start the process and run the cells, unless it lives."""
        limit = self.seconds or child.CELL_SECONDS
        while self._process is None or not self._process.is_alive():
            self._end()
            self._start()
            for number, source in enumerate(self.cells):
                if number in self._fatal:
                    continue
                try:
                    said = self._ask(
                        {"do": "run", "source": source, "seconds": limit}, PATIENCE * limit + GRACE
                    )
                    note = said.get("message", "")
                except Died as reason:
                    self._fatal.add(number)
                    note = str(reason)
                if note and number >= self.given and note not in self.notes and len(self.notes) < 20:
                    self.notes.append(str(note)[:300])
                if number in self._fatal:
                    break  # start again without it

    def _start(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="submission-", ignore_cleanup_errors=True)
        fence = Fence(os.path.realpath(self._scratch.name), self.hidden, self.memory)
        self._connection, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=child.main, args=(theirs, fence), daemon=True)
        self._process.start()
        theirs.close()

    def _ask(self, order: dict, seconds: float) -> dict:
        try:
            self._connection.send_bytes(encode(order))
            if not self._connection.poll(seconds):
                raise Died(f"no answer within {seconds:g} seconds")
            answer = decode(self._connection.recv_bytes(LARGEST))
        except Died:
            self._end()
            raise
        except Unreadable:
            self._end()
            raise Died("its process sent something that is no message") from None
        except (EOFError, OSError):
            self._end()
            raise Died("its process ended (os._exit, too much memory, or a crash of native code)") from None
        return answer if isinstance(answer, dict) else {}

    def _end(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL) if os.name == "posix" else self._process.kill()
            with suppress(ProcessLookupError):
                self._process.kill()
            self._process.join(5)
            self._connection.close()
            self._scratch.cleanup()
        self._process = None
