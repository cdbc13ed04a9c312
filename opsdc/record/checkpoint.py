"""Checkpoints that survive a crash at any moment.

    checkpoints/step-000008/
        manifest.json            format, step, versions, sha256 and size of every other file; last
        model/ or adapter/       ordinary Hugging Face folders (safetensors)
        teacher/                 the same, unless the teacher is the student
        optimizer*.safetensors   AdamW's moments by parameter name
        state.json               step, counters, the resolved configuration

A checkpoint is written beside its place, synced to disk, read back, and renamed: one that has its
name is whole. Loading verifies every hash and falls back to the one before. Nothing is unpickled: a
folder with any file that is not in its manifest, or of a kind that could hold code, is refused.

Ranks that hold parts of a model (fsdp) each write a numbered file of whole tensors, and each reads
its own rows from whatever files there are: a checkpoint does not depend on the number of ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from opsdc.errors import CheckpointError
from opsdc.method.teacher import Teacher
from opsdc.ranks.files import Tensors, like_parameter, load_weights, save_tensors, save_weights
from opsdc.ranks.shard import is_sharded
from opsdc.ranks.talk import ALONE, Ranks
from opsdc.record.lines import writing
from opsdc.record.versions import versions

T = TypeVar("T")

FORMAT = 2
_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-\d{6,}")
# A checkpoint that makes way for a new one of its step, until that has its name.
_REPLACED = ".tmp-replaced-"
# What state.json must hold for a run to go on.
_STATE = {
    "step": int,
    "teacher_version": int,
    "skipped_steps": int,
    "skipped_in_a_row": int,
    "config": dict,
    "versions": dict,
}
# Weights, settings, peft's model card, a chat template: nothing that a library would unpickle.
_KINDS = (".safetensors", ".json", ".md", ".jinja")


def save(
    root: Path,
    step: int,
    model: Any,
    teacher: Teacher,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Write `step`'s checkpoint, verify it, give it its name, then drop all but the newest `keep`.

    `state`: `teacher_version`, `skipped_steps`, `skipped_in_a_row`, `config`, and what else the
    caller wants back.
    Dropped are also those of later steps: a run that is at `step` has found them damaged, or was
    told to start before them. Raises CheckpointError (disk full, read-only folder, ...); older
    checkpoints stay as they are.
    """
    final = path_of(root, step)
    aside = root / f".tmp-{final.name}-{ranks.from_first(os.getpid())}"
    replaced = root / f"{_REPLACED}{final.name}"
    software = versions()

    def prepare() -> None:
        root.mkdir(parents=True, exist_ok=True)
        _sync(root.parent)
        clear_unfinished(root)
        aside.mkdir()

    def finish(files: dict[str, Any]) -> None:
        manifest = {"format": FORMAT, "step": step, "versions": software, "files": files}
        _write_json(aside / _MANIFEST, manifest)
        for folder in (aside / _MANIFEST, *(p for p in aside.rglob("*") if p.is_dir()), aside):
            _sync(folder)
        problem = verify(aside)
        if problem:
            raise OSError(f"it reads back damaged: {problem}")
        if final.exists():
            final.rename(replaced)
        aside.rename(final)
        _sync(root)

    try:
        ranks.on_first_rank(prepare)
        save_weights(model, aside / _weights_folder(model), ranks)
        if not teacher.is_student:
            with teacher.weights():
                save_weights(model, aside / "teacher", ranks)
        _save_optimizer(model, optimizer, aside, ranks)
        sealed = {**state, "step": step, "versions": software}
        ranks.on_first_rank(lambda: _write_json(aside / "state.json", sealed))
        # Every rank reads a share of the files back for their hashes.
        files = ranks.on_first_rank(lambda: sorted(str(p) for p in aside.rglob("*") if p.is_file()))
        mine = [Path(file) for file in files[ranks.rank :: ranks.size]]
        hashed = ranks.on_each_rank(lambda: _hashed(mine, aside))
        ranks.on_first_rank(lambda: finish({k: v for part in hashed for k, v in part.items()}))
    except (OSError, SafetensorError) as error:
        if ranks.first:
            with contextlib.suppress(OSError):  # a disk that became read-only, say
                clear_unfinished(root)
        raise CheckpointError(
            f"cannot write checkpoint {final}: {error}; earlier checkpoints are untouched"
        ) from error
    if ranks.first:
        shutil.rmtree(replaced, ignore_errors=True)
        _drop_old(root, final, keep)
    return final


def write_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, ranks: Ranks = ALONE
) -> None:
    """Write an ordinary Hugging Face folder (with LoRA the adapter's), tokenizer included.

    Raises CheckpointError where it cannot be written.
    """
    with writing(folder):
        save_weights(model, folder, ranks)
        if ranks.first:
            tokenizer.save_pretrained(str(folder))


def _hashed(files: Sequence[Path], folder: Path) -> dict[str, Any]:
    def describe(file: Path) -> dict[str, Any]:
        _sync(file)
        return {"sha256": _sha256(file), "bytes": file.stat().st_size}

    names = (str(file.relative_to(folder)) for file in files)
    return dict(zip(names, _at_once(describe, files), strict=True))


def _drop_old(root: Path, newest: Path, keep: int) -> None:
    found = listing(root)
    at = found.index(newest)
    for old in found[:at] + found[at + keep :]:
        try:
            _remove(old)
        except OSError as error:
            # The new one is safe; the next save tries again.
            print(f"checkpoint {old} cannot be removed: {error}", file=sys.stderr)


def clear_unfinished(root: Path) -> None:
    """Remove what a crash left of a checkpoint that was being written or removed.

    One that was moved aside for a successor that has not come is put back.
    """
    for replaced in root.glob(f"{_REPLACED}*"):
        final = root / replaced.name.removeprefix(_REPLACED)
        if not final.exists():
            replaced.rename(final)
    for stale in root.glob(".tmp-*"):
        shutil.rmtree(stale)


def drop_later(root: Path, folder: Path) -> None:
    """Remove the checkpoints of later steps than `folder`'s: a resume would start from them."""
    found = listing(root)
    for later in found[: found.index(folder)]:
        _remove(later)


def path_of(root: Path, step: int) -> Path:
    """Where `save` puts the checkpoint of a step."""
    return root / f"step-{step:06d}"


def listing(root: Path) -> list[Path]:
    """Finished checkpoints under `root`, newest first."""
    found = (p for p in root.glob("step-*") if _NAME.fullmatch(p.name))
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def newest_good(root: Path) -> Path | None:
    """The newest checkpoint whose every file has its recorded hash; says why others are passed."""
    damaged = []
    for folder in listing(root):
        problem = verify(folder)
        if problem is None:
            return folder
        print(f"checkpoint {folder} is damaged ({problem}); trying the one before", file=sys.stderr)
        damaged.append(folder)
    if damaged:
        raise CheckpointError(
            f"all {len(damaged)} checkpoints under {root} are damaged; move them away or set "
            "train.resume to none with another output_dir"
        )
    return None


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file is as it was written."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"{_MANIFEST} has format {manifest['format']!r}, this version reads {FORMAT}"
        present = _entries(folder)
        for name, expected in files.items():
            path = folder / name
            # A name such as ../x is none of the entries, whatever it leads to.
            if name not in present:
                return f"{name} is missing, or a name outside the checkpoint"
            if path.is_symlink() or not path.is_file():
                return f"{name} is not a plain file"
            if path.suffix not in _KINDS:
                return f"{name} is of no kind that a checkpoint holds ({', '.join(_KINDS)})"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        foreign = sorted(present - {*files, _MANIFEST})
        if foreign:
            return f"{foreign[0]} is not in {_MANIFEST}"
        found = _at_once(_sha256, [folder / name for name in files])
        for (name, expected), sha256 in zip(files.items(), found, strict=True):
            if sha256 != expected["sha256"]:
                return f"{name} does not have its recorded sha256"
            if name.endswith(".index.json"):
                # Libraries join these names to the folder as they are.
                index = json.loads((folder / name).read_text("utf-8"))
                for shard in index["weight_map"].values():
                    if Path(shard).name != shard or str(Path(name).parent / shard) not in files:
                        return f"{name} names a file outside the checkpoint: {shard!r}"
        state = read_state(folder)
        for key, kind in _STATE.items():
            if not isinstance(state.get(key), kind):
                return f"state.json has no {key} ({kind.__name__})"
        for key in ("step", "versions"):
            if manifest[key] != state[key]:
                return f"{_MANIFEST} and state.json are of different {key}"
    except OSError as error:
        return f"cannot be read: {error}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{_MANIFEST} is not a manifest: {error!r}"
    return None


def _entries(folder: Path) -> set[str]:
    """Names of everything below `folder` but real folders; links, which lead anywhere, included."""
    return {
        os.path.relpath(os.path.join(where, name), folder)
        for where, folders, files in os.walk(folder)
        for name in (*files, *folders)
        if name in files or os.path.islink(os.path.join(where, name))
    }


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a verified checkpoint."""
    return json.loads((folder / "state.json").read_text("utf-8"))


def restore(
    folder: Path, model: Any, teacher: Teacher, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Load a verified checkpoint into the model, the teacher and the optimizer; gives its state.

    Raises CheckpointError for one of another model, adapter or kind of teacher.
    """
    state = read_state(folder)
    try:
        load_weights(model, folder / _weights_folder(model))
        if not teacher.is_student:
            with teacher.weights():
                load_weights(model, folder / "teacher")
        teacher.version = int(state["teacher_version"])
        _load_moments(model, optimizer, Tensors(folder.glob("optimizer*.safetensors")))
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {folder} does not fit this run's model, adapter or teacher.mode: {error}; "
            "restore those settings or name another output_dir"
        ) from error
    return state


def _load_moments(model: Any, optimizer: torch.optim.Optimizer, stored: Tensors) -> None:
    for name, param in model.named_parameters():
        if param.requires_grad and f"{name}/step" in stored:
            optimizer.state[param] = {
                # AdamW keeps its step counter on the CPU, its moments with the parameter.
                "step": stored.like(f"{name}/step", torch.empty(())),
                **{
                    key: like_parameter(stored.like(f"{name}/{key}", param), param)
                    for key in ("exp_avg", "exp_avg_sq")
                },
            }


def _weights_folder(model: Any) -> str:
    return "adapter" if hasattr(model, "peft_config") else "model"


def _save_optimizer(
    model: Any, optimizer: torch.optim.Optimizer, folder: Path, ranks: Ranks
) -> None:
    tensors = {
        f"{name}/{key}": value.detach()
        for name, param in model.named_parameters()
        for key, value in optimizer.state.get(param, {}).items()
    }
    if is_sharded(model):
        save_tensors(tensors, folder, "optimizer", ranks)
    else:
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        ranks.on_first_rank(lambda: save_file(tensors, folder / "optimizer.safetensors"))


def _at_once(work: Callable[[Path], T], files: Iterable[Path]) -> list[T]:
    """`work` of every file, on all cores: hashing leaves Python to other threads."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(work, files))


def _remove(folder: Path) -> None:
    # Under its own name half of it might be taken for a checkpoint.
    aside = folder.with_name(f".tmp-old-{folder.name}")
    folder.rename(aside)
    shutil.rmtree(aside)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), "utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
