"""Settings: frozen dataclasses, filled from YAML, overridden by dotted command-line flags.

Every field says its meaning (`opsdc train --help` prints it). Unknown keys, duplicate keys and
mistyped values are errors that name the place; so are the names other trainers use for the same
thing, answered with ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from opsdc.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    r: Annotated[int, "rank of the adapter, >= 1"] = 32
    alpha: Annotated[int, "scale of the adapter is alpha / r"] = 64
    target_modules: Annotated[
        str | list[str], "modules that get an adapter; 'all-linear' is every linear but the head"
    ] = "all-linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    name_or_path: Annotated[
        str, "Hugging Face folder or Hub name; 'embedded:smollm2' is the demo model, no hub needed"
    ] = "embedded:smollm2"
    revision: Annotated[str | None, "commit or tag of a Hub model; recorded with the run"] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        "what the forward computes in; trainable parameters are always kept in float32",
    ] = "float32"
    attn_implementation: Annotated[
        str | None, "sdpa | eager | flash_attention_2 | flex_attention; unset: the model's default"
    ] = None
    gradient_checkpointing: Annotated[bool, "recompute activations: ~1/3 more time"] = False
    compile: Annotated[
        bool, "torch.compile the decoder layers where they train; sampling stays as it is"
    ] = False
    liger: Annotated[
        bool, "Liger's norms, rotary positions and MLPs in the model (a GPU); never its loss"
    ] = False
    trust_remote_code: Annotated[bool, "run Python code that comes with the model folder"] = False
    lora: Annotated[LoRAConfig | None, "train an adapter instead of all weights"] = None
    quantize: Annotated[
        Literal["nf4"] | None,
        "keep the adapter's frozen base in 4 bits (QLoRA), all but embedding and head; vLLM is "
        "given it dequantized",
    ] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    source: Annotated[
        str, "a .jsonl/.json/.parquet file, a Hub dataset name, or reasoning_gym:TASK"
    ] = "reasoning_gym:gsm_symbolic"
    split: Annotated[str | None, "split of a Hub dataset (default: train)"] = None
    options: Annotated[
        dict[str, Any],
        "passed to the source: reasoning-gym task options, load_dataset arguments",
    ] = field(default_factory=dict)
    prompt_column: Annotated[str | None, "column of the problem; unset: the usual names"] = None
    answer_column: Annotated[str | None, "column of the answer (metrics only)"] = None
    eval_size: Annotated[int, "problems held out for evaluation, never trained on"] = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptConfig:
    instruction: Annotated[
        str, "what only the teacher is told: P1 or P2 (the paper's), a text file, or the text"
    ] = "P1"
    placement: Annotated[
        Literal["user", "system"], "where: before the problem in the user turn, or a system turn"
    ] = "user"
    enable_thinking: Annotated[
        bool | None, "passed to the chat template on both sides; unset: not passed"
    ] = None
    max_tokens: Annotated[
        int, "longer prompts (either side) are dropped and counted, never cut; paper: 1024"
    ] = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    engine: Annotated[
        Literal["hf", "vllm", "vllm_server"],
        "hf: transformers' generate in each trainer process | vllm: vLLM in each trainer process | "
        "vllm_server: vLLM in one process of its own",
    ] = "hf"
    prompts_per_step: Annotated[int, "problems per optimizer step; paper: 32"] = 32
    samples_per_prompt: Annotated[int, "responses per problem; paper: 1"] = 1
    max_new_tokens: Annotated[
        int, "cap of a response; paper: 8192 (1024 gives ~95 % of the compression)"
    ] = 8192
    temperature: Annotated[float, "of sampling only, the loss is always at 1; paper: 1.0"] = 1.0
    top_p: Annotated[float, "nucleus; paper: 1.0"] = 1.0
    batch_size: Annotated[int, "responses generated together (memory, not the result)"] = 32
    max_staleness: Annotated[int, "updates a response may lag behind the weights; 0: on-policy"] = 0
    memory_share: Annotated[
        float, "vllm, vllm_server: share of the device's memory for the engine's weights and cache"
    ] = 0.3
    timeout_s: Annotated[
        float,
        "vllm_server: longest that one request may take; a fault ends in an answer or an error "
        "within twice this",
    ] = 1800.0
    server_address: Annotated[
        str | None,
        "vllm_server: host:port of a running `opsdc serve`; unset: the run starts its own on "
        "loopback. Off loopback a key is needed, in the environment variable OPSDC_SERVER_KEY",
    ] = None
    weights_dir: Annotated[
        str | None,
        "vllm_server: folder, seen by both sides, for weights on their way; unset: a temporary one",
    ] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    mode: Annotated[
        Literal["refresh", "frozen", "ema", "live"],
        "refresh: hard copy every refresh_steps | frozen: the start | ema | live: the student (the "
        "paper's M = 1, which collapses)",
    ] = "refresh"
    refresh_steps: Annotated[int, "M: copy the student AFTER the update of step k, k % M == 0"] = 50
    refresh_plateau: Annotated[
        float | None,
        "refresh mode: instead, copy once the mean loss of M steps is less than this share below "
        "that of the M before",
    ] = None
    ema_decay: Annotated[float, "ema only: teacher <- decay·teacher + (1 - decay)·student"] = 0.995
    offload: Annotated[
        bool,
        "keep the teacher's weights in the host's memory, on the device for its pass alone: the "
        "same bits for two copies over the bus a step",
    ] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    divergence: Annotated[
        Literal["reverse_kl", "forward_kl", "jsd"], "reverse_kl: KL(student‖teacher), the method"
    ] = "reverse_kl"
    beta: Annotated[float, "jsd only: weight of the teacher in the mixture"] = 0.5
    normalization: Annotated[
        Literal["sequence", "token"],
        "sequence: mean over responses of their per-token means (the paper's text) | token: mean "
        "over all response tokens of the step",
    ] = "sequence"
    backend: Annotated[
        Literal["auto", "chunked", "fused", "reference"], "of opsdc_kernels; reference materialises"
    ] = "auto"
    workspace_bytes: Annotated[int | None, "scratch of the loss; unset: by the device"] = None
    skip_tolerance: Annotated[
        float | None,
        "reverse_kl only: largest relative error of the loss's gradients to accept for leaving out "
        "vocabulary columns that the student hardly gives any probability; unset: exact",
    ] = None
    token_share: Annotated[
        float,
        "share of each response's tokens to train on, those with the most of token_criterion; 1: "
        "all. Scoring them all first takes two head GEMMs: time is saved below about 0.35",
    ] = 1.0
    token_criterion: Annotated[
        Literal["divergence", "entropy"],
        "what tokens are kept by: from the teacher | the student's",
    ] = "divergence"
    exact_value_every: Annotated[
        int,
        "with skip_tolerance: steps between logged losses from all columns, at one GEMM more; the "
        "others are lower bounds; 0: never",
    ] = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    lr: Annotated[float, "AdamW's learning rate; paper: 1e-6"] = 1e-6
    betas: Annotated[list[float], "AdamW's two decay rates"] = field(
        default_factory=lambda: [0.9, 0.999]
    )
    weight_decay: Annotated[float, "AdamW's; paper: 0.01"] = 0.01
    grad_clip: Annotated[float, "largest global gradient norm; paper: 1.0"] = 1.0
    schedule: Annotated[Literal["constant", "linear", "cosine"], "of lr"] = "constant"
    warmup_steps: Annotated[int, "linear warm-up; paper: 0"] = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    steps: Annotated[int, "optimizer steps; the paper's tables are at 100"] = 100
    max_tokens_per_micro_batch: Annotated[
        int, "prompt + response tokens per forward; changes memory and speed, not the result"
    ] = 16384
    max_train_tokens: Annotated[
        int | None,
        "train on the first so many tokens of a response, however long it was sampled; unset: all",
    ] = None
    packing: Annotated[
        Literal["auto", "on", "off"],
        "several responses in one row without padding; auto: when the attention skips foreign "
        "blocks and the check at start finds packed equal to single",
    ] = "auto"
    save_every: Annotated[int, "steps between checkpoints; 0: only at the end"] = 10
    keep: Annotated[int, "newest checkpoints kept, >= 2: one to fall back on"] = 2
    resume: Annotated[
        str, "auto: from the newest good checkpoint of output_dir | none | a checkpoint folder"
    ] = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig:
    """Several processes, started by torchrun or accelerate launch; with one nothing here acts."""

    strategy: Annotated[
        Literal["ddp", "fsdp"],
        "ddp: each rank has the whole model, its teacher and its moments | fsdp: each has its part",
    ] = "ddp"
    reduce_every_micro_batch: Annotated[
        bool,
        "fsdp: add gradients after each micro-batch instead of once a step: more traffic, but no "
        "rank then holds a gradient of the whole model (4 bytes a parameter)",
    ] = False
    timeout_s: Annotated[float, "longest that a rank waits for the others"] = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    every: Annotated[int, "steps between evaluations of the student; 0: only base and end"] = 0
    problems: Annotated[int | None, "held-out problems used; unset: all, 0: no evaluation"] = None
    samples: Annotated[int, "responses per problem; paper: 8"] = 1
    max_new_tokens: Annotated[int, "cap of a response; paper: 30000"] = 2048
    temperature: Annotated[float, "0: greedy; paper: 0.6"] = 0.6
    top_p: Annotated[float, "paper: 0.95"] = 0.95
    top_k: Annotated[int, "0: off; paper: 20"] = 0
    batch_size: Annotated[int, "responses generated together"] = 32
    scorer: Annotated[
        str, "math_verify | answer_line | boxed | dual | number | exact | reasoning_gym"
    ] = "dual"


_Action = Literal["off", "warn", "stop", "rollback"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """What to do when a run goes wrong; `opsdc.record.guard` says where the limits come from.

    warn prints a line; stop ends the run as if it were its last step; rollback ends it with the
    newest checkpoint from before.
    """

    window: Annotated[int, "steps per mean; the run's first window is what it is compared with"] = 4
    length: Annotated[_Action, "on training responses that collapse"] = "warn"
    min_length: Annotated[float, "of the first window's mean length"] = 0.25
    truncation: Annotated[_Action, "on more responses that hit rollout.max_new_tokens"] = "warn"
    max_truncation_rise: Annotated[float, "in the truncated share, above the first window's"] = 0.2
    repetition: Annotated[_Action, "on responses that repeat themselves"] = "warn"
    max_repetition: Annotated[float, "share of a response's 8-grams that it has had before"] = 0.1
    kl: Annotated[_Action, "on a loss that grows"] = "warn"
    max_kl: Annotated[float, "times the first window's loss"] = 3.0
    entropy: Annotated[_Action, "on a student's entropy that leaves its band"] = "warn"
    min_entropy: Annotated[float, "times the first window's"] = 0.5
    max_entropy: Annotated[float, "times the first window's"] = 1.7
    accuracy: Annotated[_Action, "on held-out accuracy that falls; needs eval.every"] = "warn"
    max_accuracy_drop: Annotated[float, "below the base model's, as a share of the problems"] = 0.1
    target_compression: Annotated[
        float | None, "stop when held-out answers are this share shorter; needs eval.every"
    ] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    report_to: Annotated[
        list[str], "wandb, tensorboard, trackio, mlflow, ... beside metrics.jsonl"
    ] = field(default_factory=list)
    every: Annotated[int, "steps between printed lines"] = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class OPSDCConfig:
    """Everything that decides a run. `OPSDCConfig.load` reads a recipe or a YAML file."""

    output_dir: Annotated[str, "where the run leaves its record and checkpoints"] = "runs/opsdc"
    seed: Annotated[int, "problems, samples and dropout follow from it"] = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def load(cls, source: str | Path, overrides: Mapping[str, Any] | None = None) -> OPSDCConfig:
        """Read a recipe by name (`smollm2-cpu`) or a YAML file, then apply dotted overrides.

        Raises ConfigError naming the file and the key.
        """
        tree = _read_yaml(source)
        for dotted, value in (overrides or {}).items():
            *sections, key = dotted.split(".")
            node = tree
            for section in sections:
                child = node.get(section)
                node[section] = node = dict(child) if isinstance(child, Mapping) else {}
            node[key] = value
        return cls.from_dict(tree, origin=str(source))

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], origin: str = "config") -> OPSDCConfig:
        """Build from nested mappings as `to_dict` writes them; raises ConfigError."""
        return _build(cls, tree, origin, "")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain mappings; `from_dict` gives an equal config back."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that `load` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def recipe_names() -> list[str]:
    """Names of the recipes inside the package."""
    folder = resources.files("opsdc") / "recipes"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def flags() -> dict[str, tuple[Any, Any, str]]:
    """Dotted name -> (type, default, help) of every setting, in order."""
    found: dict[str, tuple[Any, Any, str]] = {}

    def walk(cls: type, prefix: str) -> None:
        for name, (hint, text, default) in _fields(cls).items():
            section = _dataclass_of(hint)
            if section is not None:
                walk(section, f"{prefix}{name}.")
            else:
                found[prefix + name] = (hint, default, text)

    walk(OPSDCConfig, "")
    return found


# What people coming from other trainers type, and where it lives here.
_FOREIGN = {
    "learning_rate": "optim.lr",
    "max_steps": "train.steps",
    "num_train_epochs": "train.steps",
    "per_device_train_batch_size": "rollout.prompts_per_step and train.max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "train.max_tokens_per_micro_batch",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "max_grad_norm": "optim.grad_clip",
    "lr_scheduler_type": "optim.schedule",
    "warmup_steps": "optim.warmup_steps",
    "weight_decay": "optim.weight_decay",
    "bf16": "model.dtype: bfloat16",
    "fp16": "model.dtype: float16",
    "logging_steps": "log.every",
    "report_to": "log.report_to",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep",
    "resume_from_checkpoint": "train.resume",
    "eval_steps": "eval.every",
    "max_prompt_length": "prompt.max_tokens",
    "max_completion_length": "rollout.max_new_tokens",
    "temperature": "rollout.temperature (the loss is always at temperature 1)",
    "top_p": "rollout.top_p",
    "num_generations": "rollout.samples_per_prompt",
    "use_vllm": "rollout.engine",
    "vllm_mode": "rollout.engine",
    "teacher_sync_steps": "teacher.refresh_steps",
    "teacher_update_rate": "teacher.mode and teacher.ema_decay",
    "beta": "loss.divergence (reverse_kl, forward_kl or jsd) and loss.beta",
    "loss_temperature": "nothing: the loss is always at temperature 1",
    "chat_template_kwargs": "prompt.enable_thinking",
    "privileged_context": "prompt.instruction",
    "model_name_or_path": "model.name_or_path",
    "dataset_name": "data.source",
}


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a repeated key is an error instead of a silent overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(
                    f"line {key_node.start_mark.line + 1}: key {key!r} is not text; quote it"
                )
            if key in seen:
                raise ConfigError(
                    f"line {key_node.start_mark.line + 1}: key '{key}' appears twice; keep one"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not path.suffix and str(source) in recipe_names():
        text = (resources.files("opsdc") / "recipes" / f"{source}.yaml").read_text("utf-8")
    elif path.is_file():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source} is not UTF-8 text: {error}") from error
    else:
        raise ConfigError(
            f"no configuration '{source}': give a YAML file or one of the recipes "
            f"{', '.join(recipe_names())}"
        )
    try:
        # _Loader is a SafeLoader: it builds plain data only.
        tree = yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected sections and keys, found {type(tree).__name__}")
    return tree


def _fields(cls: type) -> dict[str, tuple[Any, str, Any]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {}
    for item in dataclasses.fields(cls):
        hint, text = hints[item.name], ""
        if typing.get_origin(hint) is Annotated:
            hint, text = typing.get_args(hint)
        default = (
            item.default_factory()
            if item.default_factory is not dataclasses.MISSING
            else item.default
        )
        found[item.name] = (hint, text, default)
    return found


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _dataclass_of(hint: Any) -> type | None:
    return next((m for m in _members(hint) if dataclasses.is_dataclass(m)), None)  # type: ignore[return-value]


def _build(cls: type, tree: Any, origin: str, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"{origin}: {prefix.rstrip('.') or 'the file'} must be a section of keys, got {tree!r}"
        )
    known = _fields(cls)
    values = {}
    for key, raw in tree.items():
        if key not in known:
            raise ConfigError(_unknown(origin, prefix, str(key), list(known)))
        hint = known[key][0]
        section = _dataclass_of(hint)
        if section is not None and not (raw is None and type(None) in _members(hint)):
            values[key] = _build(section, raw, origin, f"{prefix}{key}.")
        else:
            values[key] = _convert(raw, hint, f"{origin}: {prefix}{key}")
    return cls(**values)


def _unknown(origin: str, prefix: str, key: str, known: list[str]) -> str:
    message = f"{origin}: unknown key '{prefix}{key}'"
    if key in _FOREIGN:
        return f"{message}; here it is {_FOREIGN[key]}"
    everywhere = [name for name in flags() if name.rpartition(".")[2] == key]
    close = everywhere or [prefix + name for name in difflib.get_close_matches(key, known, 1)]
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"{message}{hint} (known here: {', '.join(known)})"


def _convert(raw: Any, hint: Any, place: str) -> Any:
    members = _members(hint)
    if raw is None or (isinstance(raw, str) and raw in ("null", "none") and len(members) > 1):
        if type(None) in members:
            return None
        if raw is None:
            raise ConfigError(f"{place} must be set, got null")
    problems = []
    for member in members:
        if member is type(None):
            continue
        try:
            return _convert_one(raw, member)
        except ValueError as error:
            problems.append(str(error))
    raise ConfigError(f"{place} must be {' or '.join(problems)}, got {raw!r}")


def _convert_one(raw: Any, kind: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        # YAML reads a bare on/off as a boolean.
        text = {True: "on", False: "off"}.get(raw, raw) if isinstance(raw, bool) else raw
        if text in choices:
            return text
        raise ValueError("one of " + ", ".join(choices))
    if origin is list:
        if isinstance(raw, str):
            raw = [part.strip() for part in raw.strip("[]").split(",") if part.strip()]
        if not isinstance(raw, (list, tuple)):
            raise ValueError("a list")
        return [_convert_one(item, typing.get_args(kind)[0]) for item in raw]
    if origin is dict:
        if isinstance(raw, str):
            try:
                raw = yaml.load(raw, Loader=_Loader)
            except yaml.YAMLError:
                raw = None
        if not isinstance(raw, Mapping):
            raise ValueError("a mapping such as '{size: 500}'")
        return dict(raw)
    if kind is bool:
        if isinstance(raw, bool):
            return raw
        if isinstance(raw, str) and raw.lower() in ("true", "false"):
            return raw.lower() == "true"
        raise ValueError("true or false")
    if isinstance(raw, bool):
        raise ValueError({int: "a whole number", float: "a number", str: "text"}[kind])
    if kind is str:
        if isinstance(raw, str):
            return raw
        raise ValueError("text")
    if kind is int:
        # 8192, "8192", 1e9 and "1e9" are all how people write whole numbers.
        try:
            number = float(raw)
            if number == int(number):
                return int(raw) if isinstance(raw, (int, str)) and _is_digits(raw) else int(number)
        except (TypeError, ValueError, OverflowError):
            pass
        raise ValueError("a whole number")
    try:
        number = float(raw)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("a number") from None
    if not math.isfinite(number):
        raise ValueError("a finite number")
    return number


def _is_digits(raw: int | str) -> bool:
    return isinstance(raw, int) or raw.strip().lstrip("+-").isdigit()


def _check(c: OPSDCConfig) -> None:
    """Ranges, and settings that would have no effect."""

    def need(ok: bool, key: str, value: Any, rule: str) -> None:
        if not ok:
            raise ConfigError(f"{key} must be {rule}, got {value!r}")

    at_least_1 = {
        "prompt.max_tokens": c.prompt.max_tokens,
        "rollout.prompts_per_step": c.rollout.prompts_per_step,
        "rollout.samples_per_prompt": c.rollout.samples_per_prompt,
        "rollout.max_new_tokens": c.rollout.max_new_tokens,
        "rollout.batch_size": c.rollout.batch_size,
        "teacher.refresh_steps": c.teacher.refresh_steps,
        "train.steps": c.train.steps,
        "train.max_tokens_per_micro_batch": c.train.max_tokens_per_micro_batch,
        "eval.samples": c.eval.samples,
        "eval.max_new_tokens": c.eval.max_new_tokens,
        "eval.batch_size": c.eval.batch_size,
        "log.every": c.log.every,
        "guard.window": c.guard.window,
    }
    at_least_0 = {
        "data.eval_size": c.data.eval_size,
        "rollout.max_staleness": c.rollout.max_staleness,
        "loss.exact_value_every": c.loss.exact_value_every,
        "optim.lr": c.optim.lr,
        "optim.weight_decay": c.optim.weight_decay,
        "optim.warmup_steps": c.optim.warmup_steps,
        "train.save_every": c.train.save_every,
        "eval.every": c.eval.every,
        "eval.temperature": c.eval.temperature,
        "eval.top_k": c.eval.top_k,
        "seed": c.seed,
        "guard.min_length": c.guard.min_length,
        "guard.max_truncation_rise": c.guard.max_truncation_rise,
        "guard.max_repetition": c.guard.max_repetition,
        "guard.max_kl": c.guard.max_kl,
        "guard.min_entropy": c.guard.min_entropy,
        "guard.max_accuracy_drop": c.guard.max_accuracy_drop,
    }
    for key, value in at_least_1.items():
        need(value >= 1, key, value, "at least 1")
    for key, number in at_least_0.items():
        need(number >= 0, key, number, "at least 0")
    # Behind a newest one that turns out damaged there must be another.
    need(c.train.keep >= 2, "train.keep", c.train.keep, "at least 2")
    need(c.rollout.temperature > 0, "rollout.temperature", c.rollout.temperature, "above 0")
    need(
        0 < c.rollout.memory_share < 1, "rollout.memory_share", c.rollout.memory_share, "in (0, 1)"
    )
    need(c.rollout.timeout_s > 0, "rollout.timeout_s", c.rollout.timeout_s, "above 0")
    wait = c.distributed.timeout_s
    need(wait > 0, "distributed.timeout_s", wait, "above 0")
    address = c.rollout.server_address
    need(
        address is None or (":" in address and address.rpartition(":")[2].isdigit()),
        "rollout.server_address",
        address,
        "host:port",
    )
    need(
        address is None or c.rollout.weights_dir is not None,
        "rollout.weights_dir",
        c.rollout.weights_dir,
        "a folder that the server at rollout.server_address sees as well",
    )
    need(0 < c.rollout.top_p <= 1, "rollout.top_p", c.rollout.top_p, "in (0, 1]")
    need(0 < c.eval.top_p <= 1, "eval.top_p", c.eval.top_p, "in (0, 1]")
    need(c.optim.grad_clip > 0, "optim.grad_clip", c.optim.grad_clip, "above 0")
    betas = c.optim.betas
    need(len(betas) == 2 and all(0 <= b < 1 for b in betas), "optim.betas", betas, "two in [0, 1)")
    need(0 <= c.teacher.ema_decay < 1, "teacher.ema_decay", c.teacher.ema_decay, "in [0, 1)")
    trained_on = c.train.max_train_tokens
    need(trained_on is None or trained_on >= 1, "train.max_train_tokens", trained_on, "at least 1")
    plateau, target = c.teacher.refresh_plateau, c.guard.target_compression
    need(plateau is None or 0 <= plateau < 1, "teacher.refresh_plateau", plateau, "in [0, 1)")
    need(target is None or 0 < target < 1, "guard.target_compression", target, "in (0, 1)")
    low, high = c.guard.min_entropy, c.guard.max_entropy
    need(low < high, "guard.max_entropy", high, f"above guard.min_entropy ({low:g})")
    need(0 < c.loss.beta < 1, "loss.beta", c.loss.beta, "in (0, 1)")
    tolerance = c.loss.skip_tolerance
    need(tolerance is None or 0 < tolerance < 1, "loss.skip_tolerance", tolerance, "in (0, 1)")
    if tolerance is not None:
        kind, backend = c.loss.divergence, c.loss.backend
        need(kind == "reverse_kl", "loss.divergence", kind, "reverse_kl with loss.skip_tolerance")
        need(
            backend in ("auto", "chunked"),
            "loss.backend",
            backend,
            "auto or chunked with loss.skip_tolerance",
        )
    need(0 < c.loss.token_share <= 1, "loss.token_share", c.loss.token_share, "in (0, 1]")
    need(bool(c.output_dir.strip()), "output_dir", c.output_dir, "a folder")
    need(bool(c.model.name_or_path.strip()), "model.name_or_path", c.model.name_or_path, "a model")
    need(
        bool(c.prompt.instruction.strip()), "prompt.instruction", c.prompt.instruction, "not empty"
    )
    if c.model.lora is not None:
        need(c.model.lora.r >= 1, "model.lora.r", c.model.lora.r, "at least 1")
    if c.model.quantize is not None:
        lora, strategy = c.model.lora, c.distributed.strategy
        need(
            lora is not None, "model.lora", lora, "set with model.quantize, whose weights are fixed"
        )
        need(strategy == "ddp", "distributed.strategy", strategy, "ddp with model.quantize")
    wanted, held_out = c.eval.problems, c.data.eval_size
    need(
        wanted is None or 0 <= wanted <= held_out,
        "eval.problems",
        wanted,
        f"between 0 and data.eval_size ({held_out})",
    )


def ignored_settings(config: OPSDCConfig) -> list[str]:
    """Settings that differ from their default and have no effect in this configuration."""
    default = OPSDCConfig()
    c, notes = config, []
    if c.teacher.mode != "refresh" and c.teacher.refresh_steps != default.teacher.refresh_steps:
        notes.append(f"teacher.refresh_steps has no effect with teacher.mode {c.teacher.mode}")
    if c.teacher.mode != "ema" and c.teacher.ema_decay != default.teacher.ema_decay:
        notes.append(f"teacher.ema_decay has no effect with teacher.mode {c.teacher.mode}")
    if c.teacher.mode == "live" and c.teacher.offload:
        notes.append("teacher.offload has no effect with teacher.mode live")
    if c.teacher.mode != "refresh" and c.teacher.refresh_plateau is not None:
        notes.append(f"teacher.refresh_plateau has no effect with teacher.mode {c.teacher.mode}")
    held_out = c.data.eval_size if c.eval.problems is None else c.eval.problems
    if c.guard.target_compression is not None and not (c.eval.every and held_out):
        notes.append("guard.target_compression has no effect without eval.every and eval.problems")
    if c.guard.accuracy in ("stop", "rollback") and not (c.eval.every and held_out):
        notes.append("guard.accuracy has no effect without eval.every and eval.problems")
    if c.loss.divergence != "jsd" and c.loss.beta != default.loss.beta:
        notes.append(f"loss.beta has no effect with loss.divergence {c.loss.divergence}")
    if c.loss.exact_value_every and c.loss.skip_tolerance is None:
        notes.append("loss.exact_value_every has no effect without loss.skip_tolerance")
    criterion = c.loss.token_criterion
    if c.loss.token_share == 1 and criterion != default.loss.token_criterion:
        notes.append("loss.token_criterion has no effect with loss.token_share 1")
    users = {
        "memory_share": ("vllm", "vllm_server"),
        "timeout_s": ("vllm_server",),
        "server_address": ("vllm_server",),
        "weights_dir": ("vllm_server",),
    }
    for key, engines in users.items():
        changed = getattr(c.rollout, key) != getattr(default.rollout, key)
        if changed and c.rollout.engine not in engines:
            notes.append(f"rollout.{key} has no effect with rollout.engine {c.rollout.engine}")
    if c.teacher.mode == "refresh" and c.teacher.refresh_steps >= c.train.steps:
        notes.append(
            f"teacher.refresh_steps ({c.teacher.refresh_steps}) is not below train.steps "
            f"({c.train.steps}): the teacher stays frozen"
        )
    return notes
