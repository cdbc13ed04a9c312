"""The settings of a run: a frozen dataclass per section, checked whenever one is made.

A field carries its type, range and default, and its meaning stands below it. The command line, the
page of settings and the errors are made from these. What one asks of another stands in `rules`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from opsdc.config import rules
from opsdc.config.fields import MustBe, UsedWith, convert
from opsdc.config.mistakes import first_mistake
from opsdc.config.yaml_file import read_file, with_settings
from opsdc.errors import ConfigError

_Class = TypeVar("_Class")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def _section(cls: type[_Class]) -> type[_Class]:
    """Make a frozen dataclass whose constructor checks every value and raises ConfigError."""
    cls._converted = field_validator("*", mode="before")(convert)  # type: ignore[attr-defined]
    rules = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    section: Any = dataclass(frozen=True, kw_only=True, config=rules)(cls)
    check = section.__init__

    @functools.wraps(check)
    def __init__(self: Any, **values: Any) -> None:
        try:
            check(self, **values)
        except ValidationError as error:
            raise ConfigError(first_mistake(error, section, OPSDCConfig)) from None

    section.__init__ = __init__
    return section


@_section
class LoRAConfig:
    """A LoRA adapter, trained instead of all weights; off unless one of its settings is given."""

    r: Annotated[int, Field(ge=1)] = 32
    """Rank of the adapter."""
    alpha: int = 64
    """The adapter is scaled by alpha / r."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Modules that get an adapter; all-linear is every linear layer but the head."""


@_section
class ModelConfig:
    """The model to train, and how it computes."""

    name_or_path: Annotated[str, MustBe("a model", str.strip)] = "embedded:smollm2"
    """Hugging Face folder or Hub name; embedded:smollm2 is the demo model and needs no hub."""
    revision: str | None = None
    """Commit or tag of a Hub model; it is recorded with the run."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the forward computes in; trainable parameters are always kept in float32."""
    attn_implementation: str | None = None
    """Attention: sdpa, eager, flash_attention_2 or flex_attention; unset: the model's default."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward instead of keeping them: about 1/3 more time."""
    compile: bool = False
    """Compile the decoder layers (torch.compile) where they train; sampling stays as it is."""
    liger: bool = False
    """Use Liger's norms, rotary positions and MLPs in the model (on a GPU); never its loss."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model folder."""
    lora: LoRAConfig | None = None
    """Train an adapter instead of all weights."""
    quantize: Literal["nf4"] | None = None
    """Frozen base in 4 bits (QLoRA), all but embedding and head; vLLM is given it dequantized."""

    def __post_init__(self) -> None:
        rules.check_model(self)


@_section
class DataConfig:
    """The problems: where they come from, and how many are held out."""

    source: str | tuple[str, ...] = "reasoning_gym:gsm_symbolic"
    """Files (.jsonl, .json, .csv, .parquet, each also as .gz; a pattern such as data/*.jsonl, or a
    list), the name of a Hub dataset, or reasoning_gym:TASK."""
    split: str | None = None
    """Split of a Hub dataset; unset: train."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the source: options of a reasoning-gym task, arguments of load_dataset."""
    prompt_column: str | None = None
    """Column of the problem; unset: the usual names are tried."""
    answer_column: str | None = None
    """Column of the answer, which only metrics use; unset: the usual names are tried."""
    eval_size: Annotated[int, Field(ge=0)] = 64
    """Problems held out for evaluation and never trained on."""
    gate_size: Annotated[int, Field(ge=0)] = 0
    """Problems held out beside those, for decisions while training: refreshes (teacher.gate), the
    checkpoint to keep (train.keep_best) and guards. 0: decisions look at eval_size's."""
    train_on: Literal["all", "correct", "dial"] = "all"
    """Responses that are learned from. all: the paper; correct: right ones that ended by
    themselves; dial: the others pull back to the plain teacher. The last two need answers."""
    scorer: str = "dual"
    """Judge of training responses where train_on is not all; as eval.scorer."""


def _is_day(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return datetime.date.fromisoformat(text).isoformat() == text
    return False


@_section
class PromptConfig:
    """What student and teacher are asked."""

    instruction: Annotated[str, MustBe("not empty", str.strip)] = "P1"
    """What only the teacher is told: P1 or P2 (the paper's), a text file, or the text itself."""
    placement: Literal["user", "system"] = "user"
    """The instruction's place: before the problem in the user's turn, or in a system turn."""
    enable_thinking: bool | None = None
    """Passed to the chat template on both sides; unset: not passed."""
    date: Annotated[str | None, MustBe("a day such as 2026-01-31", _is_day)] = None
    """The day that a chat template prints; unset: the one on which the run began, however long it
    takes and however often it goes on."""
    max_tokens: Annotated[int, Field(ge=1)] = 1024
    """Longer prompts (on either side) are dropped and counted, never cut; paper: 1024."""


_VLLM = UsedWith("rollout.engine", ("vllm", "vllm_server"))
_VLLM_SERVER = UsedWith("rollout.engine", ("vllm_server",))
_PORT = re.compile(r":\d+\Z")


@_section
class RolloutConfig:
    """How responses are sampled."""

    engine: Literal["hf", "vllm", "vllm_server"] = "hf"
    """The sampler. hf: transformers' generate in each trainer process; vllm: vLLM in each trainer
    process; vllm_server: vLLM in one process of its own."""
    prompts_per_step: Annotated[int, Field(ge=1)] = 32
    """Problems per optimizer step; paper: 32."""
    samples_per_prompt: Annotated[int, Field(ge=1)] = 1
    """Responses per problem; paper: 1."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 8192
    """Longest response; paper: 8192 (1024 gives about 95 % of the compression)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of sampling only, the loss is always at 1; paper: 1.0."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus to sample from; paper: 1.0."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Responses generated together; it changes memory, not the result."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Updates that a response may lag behind the weights; 0: on-policy."""
    memory_share: Annotated[float, _VLLM, Field(gt=0, lt=1)] = 0.3
    """Share of the device's memory for the engine's weights and cache."""
    timeout_s: Annotated[float, _VLLM_SERVER, Field(gt=0)] = 1800.0
    """Seconds that a request may take; a fault ends in an answer or an error within twice this."""
    server_address: Annotated[str | None, _VLLM_SERVER, MustBe("host:port", _PORT.search)] = None
    """Address host:port of a running `opsdc serve`; unset: the run starts its own on loopback. Off
    loopback a key is needed, in the environment variable OPSDC_SERVER_KEY."""
    weights_dir: Annotated[str | None, _VLLM_SERVER] = None
    """Folder, seen by both sides, for weights on their way; unset: a temporary one."""

    def __post_init__(self) -> None:
        rules.check_rollout(self)


_REFRESH = UsedWith("teacher.mode", ("refresh",))


@_section
class TeacherConfig:
    """Where the teacher's weights come from, and when they are renewed."""

    mode: Literal["refresh", "frozen", "ema", "live"] = "refresh"
    """Weights of the teacher. refresh: a copy of the student, renewed every refresh_steps; frozen:
    the start; ema: a moving average; live: the student's (the paper's M = 1, which collapses)."""
    model: Annotated[str | None, MustBe("a model", str.strip)] = None
    """Another model that teaches, a folder or Hub name: of any size, with the student's vocabulary,
    and frozen; unset: the student teaches itself."""
    refresh_steps: Annotated[int, _REFRESH, Field(ge=1)] = 50
    """The paper's M: the student is copied AFTER the update of step k where k % M == 0."""
    refresh_plateau: Annotated[float | None, _REFRESH, Field(ge=0, lt=1)] = None
    """Copy instead once M steps' mean loss is less than this share below that of the M before."""
    ema_decay: Annotated[float, UsedWith("teacher.mode", ("ema",)), Field(ge=0, lt=1)] = 0.995
    """After each step: teacher <- decay·teacher + (1 - decay)·student."""
    offload: Annotated[bool, UsedWith("teacher.mode", ("refresh", "frozen", "ema"))] = False
    """Keep the teacher in host memory but for its pass: the same bits, two copies a step."""
    dial: Annotated[float, Field(ge=-1, le=4)] = 1.0
    """How strongly the instruction pulls: 1 as it is (the paper), below 1 more gently, above 1
    harder, 0 not at all. Exact: teachers are mixed in hidden space."""
    anchor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Weight in the teacher of the model before training, which holds what it could do."""
    against: Annotated[str | None, MustBe("not empty", str.strip)] = None
    """A second instruction whose style is subtracted from the teacher: P1, P2, a file or a text."""
    against_weight: Annotated[float, Field(gt=0, le=2)] = 0.5
    """How strongly teacher.against is subtracted."""
    target: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Share of the response tokens to save, held there: the dial then moves by itself, from where
    plain and told lengths put it (or teacher.dial, if not 1); wants optim.schedule constant."""
    dial_max: Annotated[float, Field(gt=0, le=4)] = 2.0
    """The dial's largest value with teacher.target; its smallest is 0."""
    gate: Annotated[bool, UsedWith("teacher.mode", ("refresh",))] = False
    """Refresh the teacher only where the student answers the validation problems as well as the
    teacher did (data.gate_size, else the held-out ones); after two refusals it goes back to it."""
    gate_margin: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """With teacher.gate, the largest fall of accuracy that passes, as a share of the problems."""

    def __post_init__(self) -> None:
        rules.check_teacher(self)


@_section
class LossConfig:
    """The divergence between student and teacher, and the tokens it is taken over."""

    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """What is minimised; reverse_kl, KL(student‖teacher), is the method."""
    beta: Annotated[float, UsedWith("loss.divergence", ("jsd",)), Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the mixture."""
    normalization: Literal["sequence", "token"] = "sequence"
    """The mean. sequence: over responses, of their means over tokens (the paper's text); token:
    over all response tokens of the step."""
    backend: Literal["auto", "chunked", "fused", "reference"] = "auto"
    """Backend of opsdc_kernels; auto: the fastest; fused is experimental, no GPU has run it yet;
    reference holds all logits in memory."""
    workspace_bytes: int | None = None
    """Scratch memory of the loss; unset: by the device."""
    columns: Literal["exact", "unbiased", "bounded"] | None = None
    """The vocabulary columns that the loss's gradients come from (reverse_kl only). exact: all.
    unbiased: those of much probability and a random sample of the others, right on average.
    bounded: those that skip_tolerance cannot do without. Unset: bounded with skip_tolerance, else
    exact."""
    skip_tolerance: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Relative error of the loss's gradients to accept for leaving out columns: the largest where
    they are bounded, the standard error where they are unbiased (then 0.01 if unset)."""
    token_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each response's tokens to train on, those with the most of token_criterion; 1: all.
    Scoring them all first takes two head GEMMs: time is saved below about 0.35."""
    token_criterion: Literal["divergence", "entropy"] = "divergence"
    """What tokens are kept by: the divergence from the teacher, or the student's entropy."""
    exact_value_every: Annotated[int, Field(ge=0)] = 0
    """Where columns are left out: steps between logged losses from all columns, at one GEMM more;
    the others are lower bounds (bounded) or estimates (unbiased, whose true error is then measured
    too). 0: never."""

    def __post_init__(self) -> None:
        rules.check_loss(self)

    @property
    def leaves_columns_out(self) -> bool:
        """Return True where gradients do not come from all vocabulary columns."""
        return self.skip_tolerance is not None or self.columns == "unbiased"


def _are_decays(betas: tuple[float, ...]) -> bool:
    return len(betas) == 2 and all(0 <= beta < 1 for beta in betas)


@_section
class OptimConfig:
    """AdamW and its learning rate."""

    lr: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate; paper: 1e-6."""
    betas: Annotated[tuple[float, ...], MustBe("two in [0, 1)", _are_decays)] = (0.9, 0.999)
    """Decay rates of both moments."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay; paper: 0.01."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the whole gradient; paper: 1.0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up; paper: 0."""


@_section
class TrainConfig:
    """How long to train, how a step is cut, what is saved."""

    steps: Annotated[int, Field(ge=1)] = 100
    """Optimizer steps; the paper's tables are at 100."""
    max_tokens_per_micro_batch: Annotated[int, Field(ge=1)] = 16384
    """Tokens of prompts and responses per forward; it changes memory and speed, not the result."""
    max_train_tokens: Annotated[int | None, Field(ge=1)] = None
    """Train on the first so many tokens of a response, however long it was sampled; unset: all."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Several responses in one row without padding; auto: when the attention skips foreign blocks
    and the check at start finds packed equal to single."""
    save_every: Annotated[int, Field(ge=0)] = 10
    """Steps between checkpoints; 0: only at the end."""
    # Behind a newest one that turns out damaged there must be another.
    keep: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints that are kept, one of them to fall back on."""
    keep_best: bool = False
    """Leave as model/ not the last step but the best evaluated one: the shortest answers whose
    accuracy has not fallen by more than best_margin (lower end of its paired 95 % interval), and
    of steps that save nine tenths of what the shortest saves, the most often right."""
    best_margin: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fall of accuracy that must be excluded for a step to be kept, as a share of the problems."""
    resume: str = "auto"
    """What to go on from: auto (newest good checkpoint of output_dir), none, or a checkpoint."""


@_section
class DistributedConfig:
    """Several processes, started by torchrun or accelerate launch; with one nothing here acts."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """The whole model, its teacher and its moments on each rank (ddp), or each its part (fsdp)."""
    reduce_every_micro_batch: bool = False
    """Under fsdp, add gradients after each micro-batch instead of once a step: more traffic, but no
    rank then holds a gradient of the whole model (4 bytes a parameter)."""
    timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds that a rank waits for the others."""


@_section
class EvalConfig:
    """Answers to held-out problems: when, how many, how they are judged."""

    every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations of the student; 0: only base and end."""
    problems: Annotated[int | None, Field(ge=0)] = None
    """Held-out problems that are used; unset: all of data.eval_size; 0: no evaluation."""
    samples: Annotated[int, Field(ge=1)] = 1
    """Responses per problem; paper: 8."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 2048
    """Longest response; paper: 30000."""
    temperature: Annotated[float, Field(ge=0)] = 0.6
    """Temperature of sampling; 0: greedy; paper: 0.6."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus to sample from; paper: 0.95."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Most likely tokens to sample from; 0: all; paper: 20."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Responses generated together."""
    scorer: str = "dual"
    """Judge: math_verify, answer_line, boxed, letter, dual, number, exact or reasoning_gym."""
    greedy: bool = False
    """At the ends answer once more greedily, in a table of its own."""
    difficulty_samples: Annotated[int, Field(ge=0)] = 0
    """Further answers of the base to each problem, to say how hard it is without judging it by the
    answers that are compared; 0: no table by difficulty."""


@_section
class GuardConfig:
    """What to do when a run goes wrong: nothing, warn, stop, or roll back.

    warn prints a line; stop ends the run as if it were its last step; rollback ends it with the
    newest checkpoint from before. `opsdc.record.guard` holds the limits and says where they come
    from.
    """

    action: Literal["off", "warn", "stop", "rollback"] = "warn"
    """What to do when responses collapse, are cut or repeat themselves, when the loss grows, when
    the student's entropy leaves its band, or when held-out accuracy falls (needs eval.every)."""
    max_accuracy_drop: Annotated[float, Field(ge=0)] = 0.1
    """Largest drop below the base model's accuracy, as a share of the problems."""
    target_compression: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Stop when held-out answers are this share shorter; needs eval.every."""


@_section
class LogConfig:
    """What is printed and reported."""

    report_to: tuple[str, ...] = ()
    """Trackers beside metrics.jsonl: wandb, tensorboard, trackio, mlflow and others."""
    every: Annotated[int, Field(ge=1)] = 1
    """Steps between printed lines."""
    verbose: bool = False
    """Print a line for each check before step 1, not one for all."""


@_section
class OPSDCConfig:
    """Everything that decides a run.

    `OPSDCConfig.load` reads a recipe or a YAML file.
    """

    output_dir: Annotated[str, MustBe("a folder", str.strip)] = "runs/opsdc"
    """Folder where the run leaves its record and checkpoints; a file of settings that names none
    gets runs/ and the file's own name."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Problems, samples and dropout follow from it."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    teacher: TeacherConfig = TeacherConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    distributed: DistributedConfig = DistributedConfig()
    eval: EvalConfig = EvalConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        rules.check_run(self)

    @classmethod
    def load(cls, source: str | Path, overrides: Mapping[str, Any] | None = None) -> OPSDCConfig:
        """Read a recipe by name (`smollm2-cpu`) or a YAML file, then apply dotted overrides.

        Raises ConfigError naming the file and the key.
        """
        # Two experiments must not share a folder because neither names one.
        tree = {"output_dir": f"runs/{Path(source).stem}"} | read_file(source)
        tree = with_settings(tree, overrides or {})
        return cls.from_dict(tree, origin=str(source))

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], origin: str = "config") -> OPSDCConfig:
        """Build from nested mappings as `to_dict` writes them; raises ConfigError."""
        try:
            return TypeAdapter(cls).validate_python(tree)
        except ValidationError as error:
            raise ConfigError(f"{origin}: {first_mistake(error, cls, cls)}") from None

    def to_dict(self) -> dict[str, Any]:
        """Nested plain mappings and lists; `from_dict` gives an equal config back."""
        return dataclasses.asdict(
            self,
            dict_factory=lambda items: {
                key: list(value) if isinstance(value, tuple) else value for key, value in items
            },
        )

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that `load` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
