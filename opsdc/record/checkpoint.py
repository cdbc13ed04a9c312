"""Checkpoints that survive a crash at any moment.

    checkpoints/step-000008/
        manifest.json            format, step, versions, sha256 and size of every other file; last
        model/ or adapter/       ordinary Hugging Face folders (safetensors)
        teacher/                 the same, unless the teacher is the student
        optimizer*.safetensors   AdamW's moments by parameter name
        state.json               step, counters, the resolved configuration

A checkpoint is written under another name, synced to disk, read back, and renamed: one that has its
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
"""Version of the layout above; another one is refused."""

_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-\d{6,}")

_REPLACED = ".tmp-replaced-"
"""Prefix of a checkpoint that makes way for a new one of its step, until that one has its name."""

_STATE = {
    "step": int,
    "teacher_version": int,
    "skipped_steps": int,
    "skipped_in_a_row": int,
    "config": dict,
    "versions": dict,
}
"""Keys and types that state.json must hold for a run to go on."""

_KINDS = (".safetensors", ".json", ".md", ".jinja")
"""Suffixes of weights, settings, peft's model card and chat templates: nothing that a library would
unpickle."""


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

    Checkpoints of later steps are dropped too: a run that is at `step` has found them damaged, or
    was told to start before them. `state` holds `teacher_version`, `skipped_steps`,
    `skipped_in_a_row`, `config`, and anything else that the caller wants back.

    Raises CheckpointError (disk full, read-only folder, ...); older checkpoints stay as they are.
    """
    final = path_of(root, step)
    aside = root / f".tmp-{final.name}-{ranks.from_first(os.getpid())}"
    software = versions()
    try:
        # Every rank writes the tensors that it holds, the first rank all other files.
        ranks.on_first_rank(lambda: _begin(root, aside))
        save_weights(model, aside / _weights_folder(model), ranks)
        if teacher.is_copy:
            with teacher.weights():
                save_weights(model, aside / "teacher", ranks)
        _save_optimizer(model, optimizer, aside, ranks)
        full_state = {**state, "step": step, "versions": software}
        ranks.on_first_rank(lambda: _write_json(aside / "state.json", full_state))

        # Every rank reads a share of the files back for their hashes.
        paths = ranks.on_first_rank(lambda: sorted(str(p) for p in aside.rglob("*") if p.is_file()))
        share = [Path(path) for path in paths[ranks.rank :: ranks.size]]
        described = ranks.on_each_rank(lambda: _describe(share, aside))

        files = {name: facts for part in described for name, facts in part.items()}
        manifest = {"format": FORMAT, "step": step, "versions": software, "files": files}
        ranks.on_first_rank(lambda: _seal(aside, final, manifest))
    except (OSError, SafetensorError) as error:
        if ranks.first:
            # The disk may have become read-only.
            with contextlib.suppress(OSError):
                clear_unfinished(root)
        raise CheckpointError(
            f"cannot write checkpoint {final}: {error}; earlier checkpoints are untouched"
        ) from error
    if ranks.first:
        shutil.rmtree(_replaced(final), ignore_errors=True)
        _drop_old(root, final, keep)
    return final


def _begin(root: Path, aside: Path) -> None:
    """Make the folder that a checkpoint is written into, and clear the leftovers of crashes."""
    root.mkdir(parents=True, exist_ok=True)
    _sync(root.parent)
    clear_unfinished(root)
    aside.mkdir()


def _seal(aside: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, verify the whole checkpoint, and give it its name.

    An older one of the same step is moved aside. Raises OSError for one that reads back damaged.
    """
    _write_json(aside / _MANIFEST, manifest)
    for path in (aside / _MANIFEST, *(p for p in aside.rglob("*") if p.is_dir()), aside):
        _sync(path)
    problem = verify(aside)
    if problem:
        raise OSError(f"it reads back damaged: {problem}")
    if final.exists():
        final.rename(_replaced(final))
    aside.rename(final)
    _sync(final.parent)


def _replaced(final: Path) -> Path:
    return final.with_name(f"{_REPLACED}{final.name}")


def write_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, ranks: Ranks = ALONE
) -> None:
    """Write an ordinary Hugging Face folder (the adapter's with LoRA), tokenizer included.

    Raises CheckpointError where the folder cannot be written.
    """
    with writing(folder):
        save_weights(model, folder, ranks)
        if ranks.first:
            tokenizer.save_pretrained(str(folder))


def _describe(files: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Sync files to disk and return the manifest's entry of each, by its name below `folder`."""

    def describe(file: Path) -> dict[str, Any]:
        _sync(file)
        return {"sha256": _sha256(file), "bytes": file.stat().st_size}

    names = (str(file.relative_to(folder)) for file in files)
    return dict(zip(names, _at_once(describe, files), strict=True))


def _drop_old(root: Path, newest: Path, keep: int) -> None:
    folders = listing(root)
    at = folders.index(newest)
    for folder in folders[:at] + folders[at + keep :]:
        try:
            _remove(folder)
        except OSError as error:
            # The new one is safe; the next save tries again.
            print(f"checkpoint {folder} cannot be removed: {error}", file=sys.stderr)


def clear_unfinished(root: Path) -> None:
    """Remove the parts of a checkpoint that a crash interrupted in its writing or removal.

    A checkpoint that was moved aside for a successor that never came is put back.
    """
    for replaced in root.glob(f"{_REPLACED}*"):
        final = root / replaced.name.removeprefix(_REPLACED)
        if not final.exists():
            replaced.rename(final)
    for stale in root.glob(".tmp-*"):
        shutil.rmtree(stale)


def drop_later(root: Path, folder: Path) -> None:
    """Remove the checkpoints of later steps than `folder`'s: a resume would start from them."""
    folders = listing(root)
    for later in folders[: folders.index(folder)]:
        _remove(later)


def path_of(root: Path, step: int) -> Path:
    """Return the folder into which `save` puts the checkpoint of a step."""
    return root / f"step-{step:06d}"


def listing(root: Path) -> list[Path]:
    """List the finished checkpoints under `root`, newest first."""
    folders = (p for p in root.glob("step-*") if _NAME.fullmatch(p.name))
    return sorted(folders, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def newest_good(root: Path) -> Path | None:
    """Return the newest checkpoint whose files all have their recorded hashes; None without any.

    Says on stderr why it passes others over. Raises CheckpointError where all are damaged.
    """
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
    """Check a checkpoint folder: return its first fault in words, or None where it is sound."""
    try:
        # The folder holds exactly the files of its manifest, of their kinds and sizes.
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

        # Each has its hash, and no index leads out of the folder.
        digests = _at_once(_sha256, [folder / name for name in files])
        for (name, expected), sha256 in zip(files.items(), digests, strict=True):
            if sha256 != expected["sha256"]:
                return f"{name} does not have its recorded sha256"
            if name.endswith(".index.json"):
                # Libraries join these names to the folder as they are.
                index = json.loads((folder / name).read_text("utf-8"))
                for shard in index["weight_map"].values():
                    if Path(shard).name != shard or str(Path(name).parent / shard) not in files:
                        return f"{name} names a file outside the checkpoint: {shard!r}"

        # A run can go on from its state, and the manifest is of the same save.
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
    """Name everything below `folder` that is not a real folder.

    Links are included, to folders too: they may lead anywhere.
    """
    return {
        os.path.relpath(os.path.join(where, name), folder)
        for where, folders, files in os.walk(folder)
        for name in (*files, *folders)
        if name in files or os.path.islink(os.path.join(where, name))
    }


def read_state(folder: Path) -> dict[str, Any]:
    """Read state.json of a verified checkpoint."""
    return json.loads((folder / "state.json").read_text("utf-8"))


def restore(
    folder: Path, model: Any, teacher: Teacher, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Load a verified checkpoint into model, teacher and optimizer, and return its state.

    Raises CheckpointError for a checkpoint of another model, adapter or kind of teacher.
    """
    state = read_state(folder)
    try:
        load_weights(model, folder / _weights_folder(model))
        if teacher.is_copy:
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
    """Load AdamW's state of each trained parameter; on each rank the rows that it holds."""
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
    """Write AdamW's moments by parameter name, from whatever ranks hold them."""
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
    """Apply `work` to files on all cores: hashing releases Python's lock."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(work, files))


def _remove(folder: Path) -> None:
    # Half removed under its own name, it might be taken for a checkpoint.
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
