"""The process behind `opsdc.eval.grader`: compares answers where a hostile one can do no harm.

One JSON request per line on standard input, one JSON reply per line on the original standard
output. A process of its own, because an answer such as 9^9^9^9 can keep a computer algebra system
in C code, where neither a thread nor a Python signal handler ends it. The kernel ends this process
when a request has used its CPU seconds. CPU time, not wall time: a busy machine must not turn right
answers into wrong ones.

It is run as a file and never imported, so that nothing of a model or a GPU is loaded here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import resource
import signal
import sys
from typing import Any

_CPU_LIMIT_S = 3.0
"""CPU seconds of one request; a usual comparison takes 0.01 and one in a thousand 0.3."""

_MEMORY_LIMIT_BYTES = 8 << 30
"""Limit of this process's address space."""


class _NoEval:
    """A guard within whose block no text becomes Python, but for numerals and arithmetic.

    Several of reasoning-gym's scorers call eval() on the answer, and so does sympy's parse_expr,
    through which math-verify reads "1/2". Python announces every compilation to audit hooks.
    """

    # What sympy makes of numerals and arithmetic: "Integer (1 )/Integer (2 )", "Float ('0.5' )".
    _ARITHMETIC = re.compile(
        r"from sympy import \*|(?:(?:Integer|Float)(?= *\()|[\d\s.+\-*/()',]|(?<=\d)[eE])*"
    )
    # Modules that compile code of their own: multiplication of monomials, lazy class definitions.
    _GENERATORS = frozenset({"sympy.polys.monomials", "collections", "dataclasses"})

    def __init__(self) -> None:
        self.armed = False
        self.refused = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Refuse a compilation, as Python's audit announces it, by raising PermissionError."""
        if not self.armed or event != "compile":
            return
        source, filename = arguments
        # A lazy import compiles a file, which has a name. A syntax tree (None) was parsed before.
        if source is None or not str(filename).startswith("<"):
            return
        if sys._getframe(1).f_globals.get("__name__") in self._GENERATORS:
            return
        text = source.decode("utf-8", "replace") if isinstance(source, bytes) else str(source)
        if not self._ARITHMETIC.fullmatch(text):
            self.refused = True
            raise PermissionError("an answer is not evaluated as Python")

    def __enter__(self) -> _NoEval:
        self.armed, self.refused = True, False
        return self

    def __exit__(self, *_: object) -> None:
        self.armed = False


def _math_verify(gold: str, texts: list[str], no_eval: _NoEval) -> dict[str, Any]:
    """Compare each text with the gold answer, all within one limit of CPU time."""
    with _cpu_limit(), no_eval:
        return {"results": [_compare(gold, text) for text in texts]}


def _compare(gold: str, text: str) -> list[Any]:
    """Return [whether the text holds the gold answer, the answer read in it or None]."""
    import math_verify

    parsed = math_verify.parse(text, parsing_timeout=None)
    correct = math_verify.verify(_parse_gold(gold), parsed, timeout_seconds=None)
    # The last entry is the piece of text that was parsed, those before it are its readings.
    return [bool(correct), str(parsed[-1]) if parsed else None]


@functools.lru_cache(maxsize=4)
def _parse_gold(gold: str) -> Any:
    import math_verify

    return math_verify.parse(gold, parsing_timeout=None)


def _load_math_verify() -> None:
    logging.disable(logging.CRITICAL)
    # First use builds grammars and tables; that must not count against the first answer.
    _compare(r"\boxed{\frac{1}{2}}", "The answer is 2/4.")


def _reasoning_gym(entry: dict[str, Any], answer: str, no_eval: _NoEval) -> dict[str, Any]:
    """Score an answer to a task's problem, which is made again from its options and index."""
    task, options = entry["task"], json.dumps(entry["options"])
    dataset = _dataset(task, options)
    problem = dataset[entry["index"]]
    if (task, options) not in _usable_tasks:
        # A scorer that needs eval() would find all answers wrong: say so at once.
        _score(dataset, str(problem["answer"]), problem, no_eval)
        if no_eval.refused:
            return {"unusable": True}
        _usable_tasks.add((task, options))
    return {"score": _score(dataset, answer, problem, no_eval)}


_usable_tasks: set[tuple[str, str]] = set()
"""Tasks and their options whose scorer was found to do without eval()."""


def _score(dataset: Any, answer: str, problem: dict[str, Any], no_eval: _NoEval) -> float:
    with _cpu_limit(), no_eval:
        try:
            return float(dataset.score_answer(answer, problem))
        except Exception:  # A scorer that cannot read an answer has found it wrong.
            return 0.0


@functools.lru_cache(maxsize=4)
def _dataset(task: str, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **json.loads(options))


@contextlib.contextmanager
def _cpu_limit() -> Any:
    """Let the kernel end this process where the block uses more CPU time than the limit."""
    # No handler is installed: the default action of SIGPROF ends the process, in C code too.
    signal.setitimer(signal.ITIMER_PROF, _CPU_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _reply(request: dict[str, Any], no_eval: _NoEval, loaded: set[str]) -> dict[str, Any]:
    """Answer one request; the first of its kind loads the library."""
    kind = request["kind"]
    try:
        if kind not in loaded:
            if kind == "math_verify":
                _load_math_verify()
            else:
                import reasoning_gym  # noqa: F401
            loaded.add(kind)
    except ImportError as error:
        return {"missing": error.name}
    if kind == "math_verify":
        return _math_verify(request["gold"], request["texts"], no_eval)
    return _reasoning_gym(request["entry"], request["answer"], no_eval)


def _main() -> None:
    """Read requests and write replies until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # What a library prints must not become a reply.
    no_eval, loaded = _NoEval(), set[str]()
    with contextlib.suppress(ValueError, OSError):  # A lower limit is already in force.
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
    for line in sys.stdin.buffer:
        try:
            reply = _reply(json.loads(line), no_eval, loaded)
        except MemoryError:
            # Nothing here is sound any more: end as the kernel would end it.
            os.kill(os.getpid(), signal.SIGKILL)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    _main()
