"""The holders of a run's memory: weights, gradients, activations and so on, in each phase."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedConfig

from opsdc.config.settings import OPSDCConfig, TeacherConfig
from opsdc.method.mixture import Mix
from opsdc.models.quantize import BYTES
from opsdc.planner.activations import Activations
from opsdc.planner.sizes import Sizes
from opsdc_kernels import plan as kernels

PHASES = ("sampling", "teacher", "loss", "backward", "update")
"""Memory is counted in each of these phases of a step."""

Holder = tuple[str, dict[str, float]]
"""A name in the plan's table, and bytes per device by phase."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A configuration on its devices, with every sequence at its full length."""

    config: OPSDCConfig
    architecture: PreTrainedConfig
    sizes: Sizes
    other: Sizes | None
    """The sizes of another model that teaches."""
    gpus: int
    """The number of data-parallel ranks."""
    memory_bytes: int
    """The memory of one device."""
    on_gpu: bool
    rows: int
    """The number of sequences in one forward."""
    width: int
    """The number of tokens of a sequence."""
    step_tokens: int
    """The number of response tokens of a whole step on one device."""
    loss: kernels.Plan
    """The kernels' plan of the loss over the responses of one forward."""
    activations: tuple[Activations, Activations] | str
    """Those of one sequence, and of every further one, see `count_activations`; a text: unknown."""
    its_activations: tuple[Activations, Activations] | str
    """Those of the model that teaches; it may be the student."""

    @property
    def sharded(self) -> bool:
        """True where the model is cut over the ranks."""
        return self.gpus > 1 and self.config.distributed.strategy == "fsdp"

    @property
    def ranks_per_model(self) -> int:
        """The number of ranks that hold the model together."""
        return self.gpus if self.sharded else 1

    @property
    def item(self) -> int:
        """The bytes of an element of hidden states, keys and values."""
        return self.sizes.item if self.sizes.frozen or self.sharded else 4


def holders(run: Run) -> Iterator[Holder]:
    """Yield every holder of memory, in the order of the plan's table."""
    yield from _state(run)
    yield from _passes(run)
    sizes = run.sizes
    # A GPU's AdamW takes all tensors at once and holds a root per element; a CPU's one tensor's.
    all_roots = 4 * sizes.trained / run.ranks_per_model
    temporary = all_roots if run.on_gpu else 4 * sizes.head * sizes.trains_head
    yield "AdamW's temporaries", _during(temporary, "update")
    yield from _sampling(run)


def _during(size: float, *phases: str) -> dict[str, float]:
    """Return `size` in the named phases, or in all of them where none is named."""
    return dict.fromkeys(phases or PHASES, float(size))


def _state(run: Run) -> Iterator[Holder]:
    """Yield what lives from step to step: weights, moments, the teacher; and the gradients."""
    config, sizes, ranks = run.config, run.sizes, run.ranks_per_model
    yield "weights, trained (float32)", _during(4 * sizes.trained / ranks)
    plain = sizes.item * (sizes.frozen - sizes.in_4_bits)
    yield f"weights, frozen ({config.model.dtype})", _during(plain / ranks)
    yield "weights, frozen (4 bits)", _during(BYTES * sizes.in_4_bits)
    if sizes.in_4_bits:
        matrix = sizes.item * sizes.largest_matrix
        yield "a matrix, dequantized", _during(matrix, "sampling", "teacher", "loss", "backward")
    yield "AdamW moments (float32)", _during(8 * sizes.trained / ranks)
    # A paged copy takes the student's place for its pass; only its head stays for the loss.
    paged = _during(4 * sizes.head * sizes.trains_head, "loss", "backward")
    copy = paged if config.teacher.offload else _during(4 * sizes.trained / ranks)
    if run.other is not None:
        yield f"other model's weights ({config.model.dtype})", _of_other(run, run.other)
    elif config.teacher.mode != "live":
        yield "teacher's copy (float32)", copy
    if config.teacher.anchor and config.teacher.mode != "frozen":
        yield "start's copy, for the anchor (float32)", copy
    if sizes.widens(config.teacher):
        both = _during(2 * sizes.item * sizes.head, "loss", "backward")
        yield "both heads in one, for the anchor", both
    gradients = _during(4 * sizes.trained / ranks, "loss", "backward", "update")
    if run.sharded and not config.distributed.reduce_every_micro_batch:
        # Ranks add their gradients once a step; until then each holds those of the whole model.
        gradients |= _during(4 * sizes.trained, "loss", "backward")
    yield "gradients (float32)", gradients


def _of_other(run: Run, other: Sizes) -> dict[str, float]:
    """Return what the weights of another model take that teaches."""
    weights = other.item * (other.trained + other.frozen)
    if not run.config.teacher.offload:
        return _during(weights)
    return _during(weights, "teacher") | _during(other.item * other.head, "loss", "backward")


def _passes(run: Run) -> Iterator[Holder]:
    """Yield what the passes of teacher and student hold beside the state, the loss included."""
    config, sizes, loss = run.config, run.sizes, run.loss
    rows, cast = _of_rows(run, run.activations)
    # A checkpointed backward casts anew.
    cast_in_backward = 0.0 if config.model.gradient_checkpointing else cast
    # Another model's weights are of that dtype already, though they were traced in float32.
    its_rows, its_cast = _of_rows(run, run.its_activations)
    if run.sharded:
        yield from _gathered(run)
    elif cast:
        to_teach = cast if run.other is None else 0.0
        phases = {"teacher": to_teach, "loss": cast, "backward": cast_in_backward}
        yield f"weights cast to {config.model.dtype}", phases

    # The embedding's gradient is made last, when the others' activations are gone.
    embedding = 4 * sizes.head * sizes.trains_head
    yield (
        "activations",
        {
            "teacher": max(its_rows.teacher - its_cast, 0.0),
            "loss": max(rows.held, rows.forward - loss.peak_bytes) - cast,
            "backward": max(
                rows.backward - cast_in_backward + embedding * sizes.tied,
                embedding * (1 + sizes.tied),
            ),
        },
    )
    # A mixture of contexts is summed in float32 from the states of each; a wide one is two sums.
    wide = sizes.teacher_dim(config.teacher, run.other)
    its_dim, item = (sizes.dim, run.item) if run.other is None else (wide, run.other.item)
    hidden = run.step_tokens * its_dim * item
    mixed = run.step_tokens * wide * 4
    contexts = _contexts(config.teacher)
    states = dict.fromkeys(("loss", "backward"), float(mixed if contexts > 1 else hidden))
    while_mixed = hidden * contexts + mixed * (contexts > 1)
    yield "teacher's hidden states", {"teacher": float(while_mixed), **states}
    yield "loss: scratch and its gradients", _during(loss.peak_bytes, "loss")


def _of_rows(
    run: Run, activations: tuple[Activations, Activations] | str
) -> tuple[Activations, float]:
    """Return the activations of a forward, and the bytes in them of weights that autocast casts."""
    none = Activations.none()
    one, more = (none, none) if isinstance(activations, str) else activations
    # What is cast does not grow with the rows.
    cast = max(one.held - more.held, 0.0) * (run.config.model.dtype != "float32")
    return one + more * (run.rows - 1), cast


def _contexts(teacher: TeacherConfig) -> int:
    """Return the number of forwards from which the teacher is mixed at most."""
    mix = Mix(
        # A dial that moves needs the plain context beside the concise one.
        dial=teacher.dial if teacher.target is None else 0.5,
        anchor=teacher.anchor,
        against=teacher.against_weight if teacher.against is not None else 0.0,
    )
    return len(mix.weights(start_is_teacher=teacher.mode == "frozen"))


def _gathered(run: Run) -> Iterator[Holder]:
    """Yield what FSDP gathers: two layers and the root to train, all or one tensor to sample."""
    sizes = run.sizes
    layers = sizes.item * (2 * sizes.largest_layer + 2 * sizes.head)
    yield "gathered layers and head", _during(layers, "teacher", "loss", "backward")
    if run.config.rollout.engine == "hf":
        model = sizes.item * (sizes.trained + sizes.frozen)
        yield "whole model, gathered to sample", _during(model, "sampling")
    else:
        yield "a tensor, gathered to push", _during(sizes.item * sizes.head, "sampling")


def _sampling(run: Run) -> Iterator[Holder]:
    """Yield what the sampler holds: vLLM's share, or the cache and logits of `generate`."""
    rollout, evaluation = run.config.rollout, run.config.eval
    if rollout.engine != "hf":
        # In this process vLLM sleeps while the model trains; a server of one's own never does.
        phases = ("sampling",) if rollout.engine == "vllm" else PHASES
        if rollout.server_address is None:
            share = rollout.memory_share * run.memory_bytes
            yield f"vLLM ({rollout.engine})", _during(share, *phases)
        return
    text = run.architecture.get_text_config()
    # Without attention there is no cache that grows with the tokens.
    queries = getattr(text, "num_attention_heads", None) or 0
    heads = getattr(text, "num_key_value_heads", None) or queries
    size = getattr(text, "head_dim", None) or text.hidden_size // max(queries, 1)
    per_layer = 2 * heads * size * run.item if queries else 0

    def at_once(batch: int, sequences: int) -> int:
        return min(batch, -(-sequences // run.gpus))

    # Batches of (responses at once, tokens of a response): rollouts, then the evaluation.
    step = rollout.prompts_per_step * rollout.samples_per_prompt
    batches = [(at_once(rollout.batch_size, step), rollout.max_new_tokens)]
    held_out = run.config.data.eval_size if evaluation.problems is None else evaluation.problems
    if held_out:
        batch = at_once(evaluation.batch_size, held_out * evaluation.samples)
        batches.append((batch, evaluation.max_new_tokens))
    # transformers' cache grows by copying a layer's keys and values, which adds one layer.
    cache = max(
        batch * (run.config.prompt.max_tokens + new) * per_layer * (text.num_hidden_layers + 1)
        for batch, new in batches
    )
    logits = max(batch for batch, _ in batches) * run.sizes.vocab_size * 4 * 4
    yield "keys, values and logits (hf)", {"sampling": float(cache + logits)}
