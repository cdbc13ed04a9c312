"""Plant small wrong edits, one at a time, and see which of them the tests notice.

    python tests/mutants.py                 all that the record does not know yet: hours
    python tests/mutants.py --only opsdc_kernels/chunked --limit 10
    python tests/mutants.py --survivors     again those that lived

Works in copies of the tree. Each edit (`helpers.edits`) meets the test file that mirrors its file,
then others that reach the file by the fewest imports, until one fails: an edit that makes none fail
has survived. Every outcome is written at once to `tests/mutants.jsonl`, and a later call goes on
from there; a line's "reason", written by hand, says why an edit changes nothing that can be seen.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.edits import PACKAGES, Edit, fixed_choice  # noqa: E402

RECORD = ROOT / "tests" / "mutants.jsonl"
COUNT = 330
MIRRORS = {"opsdc": "tests/trainer", "opsdc_kernels": "tests/kernels"}
TEST_FILES = 6
"""The most files of tests that an edit meets."""
BUDGET_S = 60.0
"""No further file of tests is begun after so many seconds of those before, unedited."""
LONG_S = 30.0
"""No file of tests that takes longer is run beside the first."""
TIMEOUT_S = 300.0
SLACK_S = 20.0
"""A test file may take three times as long as unedited, and this."""
IN_THE_INTERPRETER = 'os.environ.get("TRITON_INTERPRET") != "1"'
"""How test files begin that skip themselves outside of Triton's interpreter."""


def test_files(root: Path) -> dict[str, list[str]]:
    """The test files of each source file: its mirror, then those that import it or what imports it,
    those of its own folder first, the nearest and the shortest before others."""
    files = {p.relative_to(root).as_posix(): p for p in _python_files(root)}
    names = {_module(name): name for name in files}
    readers: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for imported in _imports(path, name):
            if imported in names:
                readers[names[imported]].add(name)
    tests = {name for name in files if Path(name).name.startswith("test_")}
    chosen = {}
    for name in files:
        package, _, rest = name.partition("/")
        if package not in PACKAGES:
            continue
        top, (folder, _, stem) = MIRRORS[package], rest.rpartition("/")
        mirror = "/".join(x for x in (top, folder, f"test_{stem}") if x)
        of_folder = {x for x in tests if folder and x.startswith(f"{top}/{folder}/")}
        of_folder |= tests & {f"{top}/test_{folder}.py"}
        steps = {x: n for x, n in _steps(name, readers).items() if x in tests and x.startswith(top)}
        order = sorted(
            steps or dict.fromkeys(of_folder, 0),
            key=lambda x: (x != mirror, x not in of_folder, steps.get(x), files[x].stat().st_size),
        )
        chosen[name] = order[:TEST_FILES]
    return chosen


def _steps(name: str, readers: dict[str, set[str]]) -> dict[str, int]:
    """How many imports away from a file its direct and indirect readers are."""
    steps, level = {name: 0}, {name}
    while level:
        level = {reader for x in level for reader in readers[x]} - set(steps)
        steps |= dict.fromkeys(level, max(steps.values()) + 1)
    return steps


def _python_files(root: Path) -> list[Path]:
    return [p for folder in (*PACKAGES, "tests") for p in sorted((root / folder).rglob("*.py"))]


def _module(name: str) -> str:
    return (
        name.removeprefix("tests/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    )


def _imports(path: Path, name: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found - {_module(name)}


class Copy:
    """A copy of the tree in which one edit stands at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.check_output(listed, cwd=ROOT).decode().split("\0"):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)

    def passes(self, test: str, timeout: float) -> bool:
        """Run one file of tests up to its first failure; False for a failure, or no end."""
        environment = {
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **os.environ,
            "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        if IN_THE_INTERPRETER in (self.folder / test).read_text("utf-8"):
            environment["TRITON_INTERPRET"] = "1"
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test],
            cwd=self.folder, env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            return process.wait(timeout) in (0, 5)  # 5: every test is left out here
        except subprocess.TimeoutExpired:
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Run:
    """The workers, and what they share."""

    def __init__(self, tests: dict[str, list[str]], rows: list[dict]) -> None:
        self.tests, self.lock = tests, threading.Lock()
        self.unedited = {row["test"]: row for row in rows if "test" in row}

    def work(self, edits: queue.SimpleQueue[Edit]) -> None:
        """Take edits until none is left."""
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            tree = Copy(Path(folder))
            while True:
                try:
                    edit = edits.get_nowait()
                except queue.Empty:
                    return
                self._try(tree, edit)

    def _try(self, tree: Copy, edit: Edit) -> None:
        path, start = tree.folder / edit.file, time.monotonic()
        source, killer, spent, met = path.read_bytes(), None, 0.0, []
        for test in self.tests[edit.file]:
            if spent > BUDGET_S:
                break
            unedited = self._unedited(tree, test)
            long = met and unedited["seconds"] > LONG_S
            if long or not unedited["passes"]:
                continue
            met.append(test)
            spent += unedited["seconds"]
            path.write_bytes(edit.applied(source))
            try:
                alive = tree.passes(test, min(3 * unedited["seconds"] + SLACK_S, TIMEOUT_S))
            finally:
                path.write_bytes(source)
            if not alive:
                killer = test
                break
        outcome = "killed" if killer else "survived" if met else "no tests"
        row = {key: value for key, value in asdict(edit).items() if key not in ("start", "stop")}
        seconds = round(time.monotonic() - start, 1)
        self._write({**row, "outcome": outcome, "by": killer, "seconds": seconds})
        print(f"{outcome:9} {seconds:6.1f} s  {_shown(row)}", flush=True)

    def _unedited(self, tree: Copy, test: str) -> dict:
        """How long a file of tests takes, and whether it passes, without an edit."""
        if test not in self.unedited:
            start = time.monotonic()
            passes = tree.passes(test, TIMEOUT_S)
            row = {"test": test, "passes": passes, "seconds": round(time.monotonic() - start, 1)}
            self.unedited[test] = row
            self._write(row)
        return self.unedited[test]

    def _write(self, row: dict) -> None:
        with self.lock, RECORD.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _shown(row: dict) -> str:
    before, after = (" ".join(row[key].split())[:60] for key in ("before", "after"))
    return f"{row['file']}:{row['line']} {row['kind']}: {before} → {after}"


def recorded() -> list[dict]:
    """The lines of the record: files of tests, unedited, and outcomes of edits."""
    if not RECORD.exists():
        return []
    return [json.loads(line) for line in RECORD.read_text("utf-8").splitlines()]


def report(chosen: list[Edit], rows: list[dict]) -> None:
    """Print how many of the chosen edits were killed, and those that were not."""
    outcomes = {row["id"]: row for row in rows if "id" in row}
    known = [outcomes[edit.id] for edit in chosen if edit.id in outcomes]
    for package in PACKAGES:
        of_package = [row for row in known if row["file"].startswith(f"{package}/")]
        killed = sum(row["outcome"] == "killed" for row in of_package)
        print(f"{package}: {killed} of {len(of_package)} killed")
    for row in known:
        if row["outcome"] != "killed":
            print(f"  {row['outcome']}: {_shown(row)}  {row.get('reason', '')}")
    print(f"{len(chosen) - len(known)} to come")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="files whose path begins like this")
    parser.add_argument("--limit", type=int, help="try at most so many edits")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--survivors", action="store_true", help="try again those that survived")
    given = parser.parse_args()
    rows = recorded()
    chosen = [x for x in fixed_choice(ROOT, COUNT) if x.file.startswith(given.only)]
    outcomes = {row["id"]: row["outcome"] for row in rows if "id" in row}
    again = {edit for edit, outcome in outcomes.items() if outcome != "killed"}
    todo = [x for x in chosen if (x.id in again if given.survivors else x.id not in outcomes)]
    edits: queue.SimpleQueue[Edit] = queue.SimpleQueue()
    for edit in todo[: given.limit]:
        edits.put(edit)
    run = Run(test_files(ROOT), rows)
    workers = [threading.Thread(target=run.work, args=(edits,)) for _ in range(given.workers)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        print("ends with the edits it is at")
        with contextlib.suppress(queue.Empty):
            while True:
                edits.get_nowait()
    for worker in workers:
        worker.join()
    report(chosen, recorded())


if __name__ == "__main__":
    main()
