"""What protects accuracy, and what shortens: arms of the demo's task by seeds, paired.

    python -m benchmarks.effect --quick             (minutes: two arms, one seed, a few steps)
    python -m benchmarks.effect --save              (hours: the record)
    python -m benchmarks.effect_tables --write      (docs/effect.md and its plots)

A cell is one arm with one seed, trained in a process of its own on one thread. Finished cells stay
in the folder, so that the same command goes on where it was stopped. All arms answer the same
held-out problems as the base, greedily: differences are paired, and their intervals are bootstraps
over problems, each with its answers of all seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import record
from opsdc.config.settings import OPSDCConfig
from opsdc.config.yaml_file import read_file
from opsdc.eval.answers import Answer, answer, headline, read_answers, write_answers
from opsdc.eval.arms import evaluated_steps, first_of
from opsdc.eval.compare import by_difficulty, compare
from opsdc.record.lines import read_lines, write_json
from opsdc.train import OPSDCTrainer

RECORD = record.RECORDS / "effect" / "cpu.json"
STEPS, SEEDS, EVERY = 8, (0, 1, 2), 4
COMMON: dict[str, Any] = {
    "train.keep_best": False,
    "train.save_every": 0,
    "train.resume": "none",
    "teacher.mode": "frozen",
    "teacher.target": None,
    "teacher.gate": False,
    "data.train_on": "all",
    "optim.lr": 8e-6,
    "optim.schedule": "constant",
    "rollout.prompts_per_step": 16,
    "eval.every": EVERY,
    "eval.batch_size": 132,
}
"""The demo without what protects it: the arm "frozen", from which each other differs by its name.
"""
_REFRESH = {"teacher.mode": "refresh", "teacher.refresh_steps": 4}
ARMS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "correct only": {"data.train_on": "correct"},
    "dial on wrong": {"data.train_on": "dial"},
    "dial 0.5": {"teacher.dial": 0.5},
    "dial 1.5": {"teacher.dial": 1.5},
    "dial 2": {"teacher.dial": 2.0},
    "refresh 4": _REFRESH,
    "refresh 4, gate": {**_REFRESH, "teacher.gate": True},
    "refresh 4, anchor 0.1": {**_REFRESH, "teacher.anchor": 0.1},
    "live": {"teacher.mode": "live"},
    "forward KL": {"loss.divergence": "forward_kl"},
    "JSD": {"loss.divergence": "jsd"},
}
_LONG = {"train.steps": 24}
"""As many steps as the demo takes, for a target is for what stays; at a constant rate, as a dial
steers nothing any more when the rate has fallen to zero."""
TARGETS: dict[str, dict[str, Any]] = {
    f"target {share}": {**_LONG, "teacher.target": share} for share in (0.3, 0.5, 0.7)
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "rate 4e-6": {"optim.lr": 4e-6},
    "rate 1.6e-5": {"optim.lr": 1.6e-5},
    "8 prompts": {"rollout.prompts_per_step": 8},
    "32 prompts": {"rollout.prompts_per_step": 32},
    "rate 1.6e-5, dial 1.5": {"optim.lr": 1.6e-5, "teacher.dial": 1.5},
}
BASE = "base"
"""The model as it is, and told: answers that all arms of a seed are compared with."""
DEMO = "the demo"
"""The recipe as it is, with what protects it; how many steps it takes is its own."""
EVERY_ARM = {DEMO: {}, **ARMS, **TARGETS, **SCHEDULES}
QUICK = ("frozen", "correct only")
DIFFICULTY_SAMPLES = 2
"""Answers per problem, beside those compared, that say how hard it is for the base."""


def config_of(arm: str, seed: int, steps: int, folder: Path) -> OPSDCConfig:
    """The demo's recipe as the arm changes it."""
    changed = {} if arm == DEMO else {**COMMON, "train.steps": steps, **EVERY_ARM[arm]}
    settings = {
        **changed,
        "seed": seed,
        "output_dir": str(folder / "runs" / _file(arm, seed)),
        # The cell answers itself: base and told once a seed, not once a cell.
        "eval.problems": 0,
        "eval.difficulty_samples": 0,
    }
    return OPSDCConfig.load("smollm2-cpu", settings)


def base_cell(seed: int, problems: int, folder: Path) -> dict[str, Any]:
    """Answers of the base, plain and told, and further ones that say how hard a problem is."""
    torch.set_num_threads(1)
    config = config_of("frozen", seed, 1, folder)
    trainer = OPSDCTrainer(None, config)
    _answer(trainer, problems, folder / f"base-{seed}", "student")
    _answer(trainer, problems, folder / f"told-{seed}", "teacher")
    more = {"samples": DIFFICULTY_SAMPLES, "temperature": config.rollout.temperature}
    _answer(trainer, problems, folder / f"difficulty-{seed}", "student", "difficulty", **more)
    return {}


def train_cell(arm: str, seed: int, steps: int, problems: int, folder: Path) -> dict[str, Any]:
    """Train an arm, answer, and return its measures; the weights are not kept."""
    torch.set_num_threads(1)
    config = config_of(arm, seed, steps, folder)
    run = Path(config.output_dir)
    shutil.rmtree(run, ignore_errors=True)
    trainer = OPSDCTrainer(None, config)
    started = time.perf_counter()
    if "stopped" in trainer.train():
        raise RuntimeError("stopped before its end: nothing is answered or kept")
    seconds = time.perf_counter() - started
    _answer(trainer, problems, folder / f"trained-{_file(arm, seed)}", "student")
    for heavy in ("checkpoints", "model", "best"):
        shutil.rmtree(run / heavy, ignore_errors=True)
    rows = read_lines(run / "metrics.jsonl")
    evaluated = {0: run / "eval" / "gate-base.jsonl", **evaluated_steps(run / "eval")}
    choices = json.loads((run / "summary.json").read_text("utf-8")).get("evaluated", [])
    return {
        "kept": next((row["step"] for row in choices if row["kept"]), len(rows)),
        "seconds": round(seconds, 1),
        "steps": [
            {
                "tokens": row["response_tokens_mean"],
                "loss": row["loss_nats"],
                "entropy": row["student_entropy"],
                "teacher_version": row["teacher_version"],
                "dial": row.get("dial"),
                "relative_length": row.get("relative_length"),
                "right": row.get("right_share"),
                "seconds": row["perf/seconds_step"],
                "rollout_seconds": row["perf/seconds_rollout"],
            }
            for row in rows
        ],
        "evaluated": {s: headline(read_answers(f)) for s, f in evaluated.items() if f.is_file()},
    }


def _answer(
    trainer: OPSDCTrainer, problems: int, path: Path, arm: str, stream: str = "eval", **changed: Any
) -> None:
    settings = replace(trainer.config.eval, **changed)
    trainer.sampler.push(trainer.model, trainer.state.step)
    answers = answer(
        trainer.sampler, trainer.tokenizer, first_of(trainer.held_out, problems), settings,
        arm=arm, label=path.name, stream=stream,
    )  # fmt: skip
    write_answers(path.parent / f"{path.name}.jsonl", answers)


def measure(
    arms: Sequence[str], seeds: Sequence[int], steps: int, problems: int, folder: Path, workers: int
) -> None:
    """Run the cells that have no result in `folder` yet.

    Raises RuntimeError, when the others are through, for cells that failed.
    """
    wanted = [(BASE, seed) for seed in seeds] + [(arm, seed) for seed in seeds for arm in arms]
    failed = []
    # A process a cell: nothing that one leaves behind reaches another, and memory is given back.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as go:
        running: dict[Future[Any], tuple[str, int]] = {
            go.submit(base_cell, seed, problems, folder)
            if arm == BASE
            else go.submit(train_cell, arm, seed, steps, problems, folder): (arm, seed)
            for arm, seed in wanted
            if stored(arm, seed, steps, problems, folder) is None
        }
        for done in tqdm(as_completed(running), total=len(running), desc="cells"):
            arm, seed = running[done]
            if done.exception():
                failed.append(f"{arm}, seed {seed}: {done.exception()!r}")
                continue
            path = folder / "cells" / f"{_file(arm, seed)}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"settings": _settings(arm, steps, problems), **done.result()})
    if failed:
        raise RuntimeError(
            "cells failed, and the same command runs them again:\n" + "\n".join(failed)
        )


def _settings(arm: str, steps: int, problems: int) -> dict[str, Any]:
    """Say what a cell's result depends on, but for its seed."""
    answered = {"problems": problems, "common": COMMON}
    if arm == BASE:
        return {**answered, "difficulty_samples": DIFFICULTY_SAMPLES}
    if arm == DEMO:
        # As it is written: a setting that is new, at its default, changes nothing.
        return {**answered, "recipe": read_file("smollm2-cpu")}
    return {**answered, "steps": steps, "arm": EVERY_ARM[arm]}


def stored(arm: str, seed: int, steps: int, problems: int, folder: Path) -> dict[str, Any] | None:
    """Return a cell's result; None without one, or of other settings: it is measured anew."""
    path = folder / "cells" / f"{_file(arm, seed)}.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else None
    return found if found and found["settings"] == _settings(arm, steps, problems) else None


def summary(steps: int, problems: int, folder: Path) -> dict[str, Any]:
    """Return what the cells say that there are, arm by arm, over the seeds that each has."""
    based = [s for s in SEEDS if stored(BASE, s, steps, problems, folder)]
    found = {}
    for arm in EVERY_ARM:
        cells = {s: cell for s in based if (cell := stored(arm, s, steps, problems, folder))}
        if cells:
            found[arm] = _arm(arm, cells, folder)
    # Base and told over the seeds that arms have: a seed draws its own problems.
    seeds = sorted({s for arm in found.values() for s in arm["seeds"]})
    return {"told": _told(seeds, folder), **found} if found else {}


def _arm(arm: str, by_seed: dict[int, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What an arm's cells say together."""
    seeds, cells = [*by_seed], [*by_seed.values()]
    base, told = (_together(folder, name, seeds) for name in ("base", "told"))
    trained = _together(folder, f"trained-{arm}", seeds)
    hardness = _together(folder, "difficulty", seeds)
    plain = headline(base)["tokens_mean"]
    assert plain is not None
    return {
        "seeds": seeds,
        "trained": headline(trained),
        "against_base": compare(base, trained),
        "against_told": compare(told, trained),
        "by_difficulty": by_difficulty(hardness, base, trained),
        "by_seed": [_of_seed(arm, s, folder) for s in seeds],
        "steps_to_half": [_to_half(cell["steps"], plain, lambda step: 1) for cell in cells],
        "minutes_to_half": [
            _to_half(cell["steps"], plain, lambda step: step["seconds"] / 60) for cell in cells
        ],
        "cells": [{k: v for k, v in cell.items() if k != "settings"} for cell in cells],
    }


def _of_seed(arm: str, seed: int, folder: Path) -> dict[str, Any]:
    base, told, trained = (
        _together(folder, name, (seed,)) for name in ("base", "told", f"trained-{arm}")
    )
    return {
        **{n: headline(a) for n, a in (("base", base), ("told", told), ("trained", trained))},
        "against_base": compare(base, trained),
        "against_told": compare(told, trained),
    }


def _told(seeds: Sequence[int], folder: Path) -> dict[str, Any]:
    base, told = (_together(folder, name, seeds) for name in ("base", "told"))
    return {
        "base": headline(base),
        "trained": headline(told),
        "against_base": compare(base, told),
    }


def _together(folder: Path, name: str, seeds: Sequence[int]) -> list[Answer]:
    """All seeds' answers; a problem that several seeds hold out has one sample of each."""
    found = []
    for seed in seeds:
        for a in read_answers(folder / f"{_file(name, seed)}.jsonl"):
            found.append(replace(a, sample=1000 * seed + a.sample))
    return found


def _to_half(
    steps: Sequence[dict[str, Any]], plain: float, cost: Callable[[dict[str, Any]], float]
) -> float | None:
    """Cost of training until rollouts are half as long as the base's answers; None if never."""
    spent = 0.0
    for step in steps:
        # A step's rollouts show the updates before it.
        if step["tokens"] <= 0.5 * plain:
            return round(spent, 2)
        spent += cost(step)
    return None


def _file(name: str, seed: int) -> str:
    return f"{name}-{seed}".replace(" ", "_").replace(",", "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.effect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="two arms, one seed, 4 steps")
    parser.add_argument("--arms", help=f"separated by semicolons, of: {'; '.join(EVERY_ARM)}")
    parser.add_argument("--seeds", help="comma-separated, of 0, 1 and 2 (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("runs/effect"), help="of the cells")
    parser.add_argument("--workers", type=int, default=2, help="cells at once (default 2)")
    parser.add_argument("--save", action="store_true", help=f"write {RECORD.name}, the record")
    options = parser.parse_args(arguments)
    names = [*(QUICK if options.quick else EVERY_ARM)]
    if options.arms:
        names = [name.strip() for name in options.arms.split(";")]
    unknown = [name for name in names if name not in EVERY_ARM]
    if unknown:
        parser.error(f"--arms: no arm is named {unknown[0]!r}; there are: {'; '.join(EVERY_ARM)}")
    # Where cells lie and how many run at once changes nothing that is recorded.
    environment = record.environment(torch.device("cpu"))
    environment["command"] = "python -m benchmarks.effect --save"
    if options.save and environment["dirty"]:
        parser.error("uncommitted changes; commit first, or leave --save out")
    seeds, steps, problems = ((0,), 4, 32) if options.quick else (SEEDS, STEPS, 132)
    if options.seeds:
        seeds = tuple(map(int, options.seeds.split(",")))
    measure(names, seeds, steps, problems, options.folder, options.workers)
    found = summary(steps, problems, options.folder)
    for name, arm in found.items():
        print(f"{name:<24}{one_line(arm)}")
    if options.save:
        record.save(RECORD, {"environment": environment, "steps": steps, "arms": found})
    return 0


def one_line(arm: dict[str, Any]) -> str:
    """Length, accuracy and what it is against the base."""
    against, trained = arm["against_base"], arm["trained"]
    low, high = against["accuracy_difference_ci95"]
    return (
        f"{trained['tokens_mean']:6.1f} tokens, {100 * trained['accuracy']:5.1f} % right, "
        f"{100 * against['accuracy_difference']:+.1f} ({100 * low:+.1f} … {100 * high:+.1f}); "
        f"kept {against['kept']}, lost {against['lost']}, gained {against['gained']}"
    )


if __name__ == "__main__":
    sys.exit(main())
