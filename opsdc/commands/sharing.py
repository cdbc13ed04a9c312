"""Commands that give a trained model to others: export, push."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from opsdc.config.command_line import add_command
from opsdc.config.settings import OPSDCConfig
from opsdc.errors import ConfigError

_EXPORT_EPILOG = """\
  opsdc export runs/demo                                 runs/demo/export, in bfloat16
  opsdc export runs/lora --merge --output my-model       base and adapter as one model
  opsdc export runs/demo --trained runs/demo/checkpoints/step-000008/model --dtype float32

vLLM, transformers' pipeline and the usual converters to GGUF read what it writes.
"""
_PUSH_EPILOG = """\
  opsdc push runs/demo me/my-model-concise               the run's model/ with its card
  opsdc push my-model me/my-model-concise --public       what export wrote

Log in before with `hf auth login`, or give a token in HF_TOKEN.
"""


def add_export(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        "write a run's model for others: adapter merged, weights cast, read back",
        "RUN [--trained FOLDER] [--merge] [--dtype bfloat16] [--output DIR]",
        _export,
        _EXPORT_EPILOG,
    )
    parser.add_argument("folder", metavar="RUN", type=Path, help="folder of a run (config.yaml)")
    parser.add_argument(
        "--trained", type=Path, metavar="FOLDER", help="the trained model (default: RUN/model)"
    )
    parser.add_argument("--merge", action="store_true", help="an adapter and its base as one model")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        help="of the weights: bfloat16, float16 or float32 (default: bfloat16)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/export")


def _export(arguments: argparse.Namespace) -> int:
    """Export the model of a run, and say what the cast has cost."""
    folder: Path = arguments.folder
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is not the folder of a run: it has no config.yaml")
    config = OPSDCConfig.load(folder / "config.yaml")
    from opsdc.models.export import DTYPES, export_model

    if arguments.dtype not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got '{arguments.dtype}'")
    target = arguments.output or folder / "export"
    trained = arguments.trained or folder / "model"
    moved = export_model(
        config.model, trained, target, merge=arguments.merge, dtype=arguments.dtype
    )
    if moved is None:
        print(f"{target}: the adapter as it is, in its own dtype; --merge makes one whole model")
    else:
        print(f"{target}: read back; log-probabilities moved by {moved:.1e} nats on average")
    return 0


def add_push(commands: Any) -> None:
    parser = add_command(
        commands,
        "push",
        "upload a model and its card to the Hugging Face Hub",
        "FOLDER NAME [--public]",
        _push,
        _PUSH_EPILOG,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a run, or a model's folder")
    parser.add_argument("name", metavar="NAME", help="of the repository: USER/MODEL")
    parser.add_argument("--public", action="store_true", help="for everybody (default: private)")


def _push(arguments: argparse.Namespace) -> int:
    """Upload a model, and print its address."""
    folder: Path = arguments.folder
    if (folder / "config.yaml").is_file() and (folder / "model").is_dir():
        folder /= "model"
    from opsdc.models.export import push_model

    print(push_model(folder, arguments.name, private=not arguments.public))
    return 0
