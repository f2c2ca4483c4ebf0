"""One call of a student's object: whatever it does, an `Outcome` comes back.

It gets copies of the inputs, a limit on time and one on what it prints; an exception, `sys.exit`, or a call of the
course's own answer ends it. In a notebook this is for honest mistakes. Grading runs the same in a process of its
own (`qlora_edu.grading`).
"""

import io
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field

import torch
from torch import Tensor

SECONDS = 10.0
PATIENCE = 4  # seconds on the clock for each second of computing
PRINTED = 2_000  # characters that are shown; a hundred times as many end the call
#: Packages that hold the answers. The checks themselves are no answer.
ANSWERS = ("qlora_edu", "bitsandbytes", "peft")
ALLOWED = ("qlora_edu.checks",)


class TimeUp(BaseException):
    """The time is over. No Exception, so that `except Exception` does not catch it."""


class Flood(BaseException):
    """Too much was printed."""


class NotYours(BaseException):
    """The course's own answer was called."""


@dataclass
class Outcome:
    """What came of a call.

    Attributes:
        value: what was returned, in plain values: tensors, numbers, texts, None, and lists, tuples and dicts of them.
        problem: "" or the id of what went wrong: "not-attempted", "crashed", "endless", "exited", "flood", "not-yours".
        error: names of the exception's class and of those that it derives from.
        message: the exception's text, and the student's line that raised it.
        changed: positions of the inputs that were changed in place.
        shared: whether a result lies in an input's memory.
        printed: the beginning of what was printed.
    """

    value: object = None
    problem: str = ""
    error: list[str] = field(default_factory=list)
    message: str = ""
    changed: list[int] = field(default_factory=list)
    shared: bool = False
    printed: str = ""


def attempt(
    target: Callable, arguments: tuple, seconds: float = SECONDS, allow: tuple[str, ...] = ()
) -> Outcome:
    """Call `target` with copies of the arguments.

    Args:
        seconds: of computing, after which the call is ended; in the main thread only, where notebooks run.
        allow: modules of the course that this exercise is meant to use.
    """
    copies = clone(arguments)
    outcome, printed = Outcome(), _Bounded()
    try:
        with redirect_stdout(printed), redirect_stderr(printed), _time_limit(seconds), _own_work(allow):
            value = target(*copies)
        outcome.shared = bool(_memory(value) & _memory(copies))
        outcome.value = plain(value)
    except TimeUp:
        outcome.problem, outcome.message = "endless", f"no result after {seconds:g} seconds"
    except Flood:
        outcome.problem, outcome.message = "flood", f"more than {100 * PRINTED:,} characters were printed"
    except NotYours as error:
        outcome.problem, outcome.message = "not-yours", str(error)
    except SystemExit:
        outcome.problem, outcome.message = "exited", "it called sys.exit() or exit()"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # torch raises it too, and says what is not implemented
        stub = isinstance(error, NotImplementedError) and not str(error)
        outcome.problem = "not-attempted" if stub else "crashed"
        outcome.message = "" if stub else _described(error)
        outcome.error = [cls.__name__ for cls in type(error).__mro__]
    outcome.changed = [
        i for i, (a, b) in enumerate(zip(arguments, copies, strict=True)) if not unchanged(a, b)
    ]
    outcome.printed = printed.shown()
    return outcome


def _memory(value) -> set[int]:
    """Where the tensors among plain values lie."""
    if isinstance(value, Tensor):
        lies = value.layout == torch.strided and value.numel()
        return {value.untyped_storage().data_ptr()} if lies else set()
    if isinstance(value, dict):
        value = list(value.values())
    return set().union(*map(_memory, value)) if isinstance(value, tuple | list) else set()


def clone(value):
    """A copy of plain values; tensors keep their dtype and strides, and share nothing."""
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.preserve_format)
    if isinstance(value, tuple | list):
        return type(value)(clone(v) for v in value)
    if isinstance(value, dict):
        return {key: clone(v) for key, v in value.items()}
    return value


def plain(value):
    """Values as a check compares them: tensors without history, NumPy arrays and scalars as torch and Python have them.

    Anything else stays as text, so that a check can say what came.
    """
    if isinstance(value, Tensor):
        dense = not value.is_meta and value.layout == torch.strided and not value.is_quantized
        if not dense:
            return Other(f"{value.layout} tensor on {value.device}")
        return Tensor.detach(value).as_subclass(Tensor).cpu()
    if value is None or isinstance(value, bool):
        return value
    for kind, itself in ((int, int.__index__), (float, float.__pos__), (str, str.__str__)):
        if isinstance(value, kind):  # a subclass may lie about sums and comparisons
            return itself(value)
    if isinstance(value, tuple | list):
        return tuple(map(plain, value)) if type(value) is tuple else [plain(v) for v in value]
    if isinstance(value, dict):
        return {key if isinstance(key, str | int | tuple) else str(key): plain(v) for key, v in value.items()}
    if type(value).__module__ == "numpy":
        if getattr(value, "ndim", 0) or type(value).__name__ == "ndarray":
            return torch.from_numpy(value.copy()) if value.dtype.kind in "fiub" else repr(value)
        return value.item()
    if isinstance(value, torch.dtype):
        return str(value)
    return Other(f"{type(value).__name__} object")


class Other(str):
    """What is no plain value, by the name of its type."""


def unchanged(before, after) -> bool:
    """Whether plain values are bitwise the same."""
    if isinstance(before, Tensor):
        if before.shape != after.shape or before.dtype != after.dtype:
            return False
        a, b = before.detach(), after.detach()
        return torch.equal(a, b) or (
            a.is_floating_point()
            and torch.equal(a.nan_to_num(), b.nan_to_num())
            and torch.equal(a.isnan(), b.isnan())
        )
    if isinstance(before, tuple | list):
        return len(before) == len(after) and all(map(unchanged, before, after))
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(unchanged(before[k], after[k]) for k in before)
    return before is after or before == after or before != before


class _Bounded(io.StringIO):
    """Keeps the beginning of what is written, and ends whoever writes without end."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def write(self, text: str) -> int:
        if self.count < PRINTED:
            super().write(text[: PRINTED - self.count])
        self.count += len(text)
        if self.count > 100 * PRINTED:
            raise Flood
        return len(text)

    def shown(self) -> str:
        more = self.count - PRINTED
        return self.getvalue() + (f"\n... and {more:,} characters more" if more > 0 else "")


@contextmanager
def _time_limit(seconds: float):
    """Raise TimeUp in this thread after so many seconds of computing, and again each tenth, should it be caught."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if not hasattr(signal, "setitimer"):  # Windows: what Ctrl-C does
        import _thread

        over = threading.Event()
        timer = threading.Timer(seconds, lambda: (over.set(), _thread.interrupt_main()))
        timer.start()
        try:
            yield
        except KeyboardInterrupt:
            if over.is_set():
                raise TimeUp from None
            raise
        finally:
            timer.cancel()
        return

    def up(signum, frame):
        raise TimeUp

    # Seconds of computing, and more on the clock: a busy machine must not make a right answer an endless one.
    timers = {
        signal.ITIMER_PROF: (signal.SIGPROF, seconds),
        signal.ITIMER_REAL: (signal.SIGALRM, seconds * PATIENCE),
    }
    before = {number: signal.signal(number, up) for number, _ in timers.values()}
    for timer, (_, limit) in timers.items():
        signal.setitimer(timer, limit, 0.1)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _own_work(allow: tuple[str, ...]):
    """Raise NotYours where code of the packages that hold the answers is called, however it is wrapped."""

    def watch(frame, event, argument):
        if event != "call":
            return
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_qualname
        answer = module.partition(".")[0] in ANSWERS and not module.startswith(ALLOWED + allow)
        # A check's own function, called by a notebook's code: an answer that asks the check.
        caller = frame.f_back.f_globals.get("__name__") if frame.f_back else ""
        asks = module.startswith(ALLOWED) and caller == "__main__" and name.isidentifier()
        if answer or asks:
            raise NotYours(f"{module}.{name}")

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)


def _described(error: BaseException) -> str:
    """The exception in one line, and where in the student's code it was raised."""
    first = (str(error).strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {first}".rstrip(": ")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    own = [f for f in frames if "site-packages" not in f.filename and "/qlora_edu/" not in f.filename]
    for frame in reversed(own or frames):
        line = f", at `{frame.line}`" if frame.line else ""
        return f"{text[:300]}, in {frame.name}{line}"
    return text[:300]
