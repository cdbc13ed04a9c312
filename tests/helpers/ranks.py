"""Ranks: real gloo processes, forked from the warm server of `helpers.runs`, that run one function.

A rank finds its place in the environment, as torchrun says it, and sends back what it found.
"""

from __future__ import annotations

import json
import math
import os
import pkgutil
import signal
import socket
import traceback
from pathlib import Path

from helpers import runs

TIMEOUT_S = 200


def ranks(size, function, *arguments):
    """[function(*arguments) on rank 0, on rank 1, ...]; raises the first error of one."""
    started = [start(rank, size, port, function, *arguments) for port in [free_port()] for rank in
               range(size)]  # fmt: skip
    found = []
    for process, pipe in started:
        assert pipe.poll(TIMEOUT_S), "a rank hangs"
        found.append(pipe.recv())
        process.join(20)
    errors = [x for x in found if isinstance(x, Exception)]
    if errors:
        raise errors[0]
    return found


def start(rank, size, port, function, *arguments):
    """(process, pipe) of one rank."""
    runs.warm()
    pipe, theirs = runs._CONTEXT.Pipe()
    process = runs._CONTEXT.Process(
        target=_serve, args=(theirs, environment(rank, size, port), function, arguments)
    )
    process.start()
    return process, pipe


def environment(rank, size, port):
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _serve(pipe, variables, function, arguments):
    import torch

    from opsdc.ranks import talk

    os.environ |= variables
    torch.set_num_threads(1)
    try:
        found = function(*arguments)
        talk.leave()
    except Exception as error:
        error.args = (f"{error}\n{traceback.format_exc()}",)
        found = error
    pipe.send(found)


def train(settings, size, prepare=None, *arguments):
    """Exit statuses of a whole run by so many ranks; `prepare(rank, *arguments)` goes before it."""
    processes = start_training(settings, size, prepare, *arguments)
    for process in processes:
        process.join(TIMEOUT_S)
        assert process.exitcode is not None, "a rank hangs: " + runs.log(settings["output_dir"])
    return [process.exitcode for process in processes]


def start_training(settings, size, prepare=None, *arguments):
    """The processes of such a run."""
    runs.warm()
    out = Path(settings["output_dir"])
    out.parent.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = []
    for rank in range(size):
        variables = environment(rank, size, port)
        given = (settings, variables, prepare, arguments)
        processes.append(runs._CONTEXT.Process(target=_train, args=given))
        processes[-1].start()
    return processes


def _train(settings, variables, prepare, arguments):
    os.environ |= variables
    rank = int(variables["RANK"])
    if prepare is not None:
        prepare(rank, *arguments)
    runs._run(settings, None, ())


# What a rank does in the tests: a step, five of them, with and without a checkpoint in between.


def batch(lengths, seed=3):
    """Recorded responses of these lengths behind one prompt."""
    import torch

    from opsdc.method.batch import Pair

    prompt, instruction = [1, 20, 21, 22], [50, 51, 52, 53, 54]
    generator = torch.Generator().manual_seed(seed)
    return [
        Pair(
            student_prompt_ids=prompt,
            teacher_prompt_ids=instruction + prompt,
            response_ids=torch.randint(3, 260, (n,), generator=generator).tolist(),
        )
        for n in lengths
    ]


class Run:
    """Model, teacher and optimizer of one rank, on the tiny model."""

    def __init__(self, settings):
        import torch

        from helpers.tiny import tiny_model
        from opsdc.config.settings import OPSDCConfig
        from opsdc.method.batch import Layout
        from opsdc.method.teacher import Teacher
        from opsdc.models.load import prepare_model
        from opsdc.ranks import shard, talk

        settings = dict(settings)
        kind, tied = settings.pop("kind", "llama"), settings.pop("tied", True)
        self.config = OPSDCConfig.from_dict(settings)
        self.ranks = talk.join(self.config.distributed)
        torch.manual_seed(0)
        self.model = prepare_model(
            tiny_model(kind, tied=tied, initializer_range=0.15), self.config.model
        )
        shard.shard_(self.model, self.config, self.ranks)
        self.model.train()
        self.teacher = Teacher(self.model, self.config.teacher)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=self.config.optim.lr
        )
        self.layout = Layout(
            packed=False,
            max_tokens=self.config.train.max_tokens_per_micro_batch,
            pad_id=0,
            dtype=getattr(torch, self.config.model.dtype),
        )
        self.step = 0

    def trained(self):
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def move_away(self):
        """The student leaves its teacher: gradients are then of the loss's own size."""
        import torch

        from opsdc.ranks.shard import full

        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.trained().values():
                noise = torch.randn(p.shape, generator=generator) * 0.1
                # Each rank draws for all, and adds what it holds.
                full(p)
                p.add_(_alike(noise, p))

    def take(self, pairs):
        """One step; (loss, gradients, measured)."""
        from opsdc.method.update import update
        from opsdc.ranks.shard import full

        gradients = {}

        def keep(*_):
            for name, p in self.trained().items():
                gradients[name] = full(p.grad).clone().numpy()

        hook = self.optimizer.register_step_pre_hook(keep)
        result = update(
            self.model, self.teacher, pairs, self.optimizer, self.layout, self.config,
            ranks=self.ranks,
        )  # fmt: skip
        hook.remove()
        self.step += 1
        self.teacher.after_update(self.step, [])
        return result, gradients


def _alike(tensor, p):
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(p, DTensor):
        return tensor
    return distribute_tensor(tensor, p.device_mesh, p.placements)


def five_steps(settings, lengths):
    """Losses, norms, gradients of the first step, parameters at the end."""
    from opsdc.ranks.shard import full

    run = Run(settings)
    run.move_away()
    found = {"loss": [], "grad_norm": [], "tokens": [], "entropy": []}
    for step in range(5):
        result, gradients = run.take(batch(lengths, seed=step))
        assert not result.skipped
        found["loss"].append(result.loss)
        found["grad_norm"].append(result.grad_norm)
        found["tokens"].append(len(result.divergence))
        found["entropy"].append(result.student_entropy)
        found.setdefault("gradients", gradients)
    found["weights"] = {n: full(p.detach()).clone().numpy() for n, p in run.trained().items()}
    return found


def distance(expected, found):
    """Of two sets of arrays, relative to the first."""
    square = sum(float(((found[n] - expected[n]) ** 2).sum()) for n in expected)
    return math.sqrt(square / sum(float((expected[n] ** 2).sum()) for n in expected))


def averaged(settings, lengths):
    """`five_steps` with the gradients averaged over ranks, as FSDP does unless told."""
    from torch.distributed.fsdp import FSDPModule

    factor = FSDPModule.set_gradient_divide_factor
    FSDPModule.set_gradient_divide_factor = lambda module, _: factor(module, 2.0)
    return five_steps(settings, lengths)


def talk():
    """Everything that ranks can tell each other, once."""
    import torch

    from opsdc import errors
    from opsdc.config.settings import DistributedConfig
    from opsdc.ranks import stop, talk

    ranks = talk.join(DistributedConfig())
    rank = ranks.rank
    found = {
        "gathered": ranks.gather({"rank": rank}),
        "first": ranks.from_first(f"from {rank}"),
        "sum": ranks.sum(rank + 0.1),
        "any": [ranks.any(rank == 2), ranks.any(False)],
        "rows": ranks.concat(torch.full((rank, 2), float(rank)))[:, 1].tolist(),
    }

    def fail():
        if rank == 1:
            raise errors.ConfigError("no")

    try:
        ranks.on_each_rank(fail)
    except errors.ConfigError as error:
        found["error"] = (type(error).__name__, str(error))

    def ask():
        if rank == 2:
            raise stop.Stopped("SIGTERM")

    try:
        ranks.on_each_rank(ask)
    except stop.Stopped as stopped:
        found["stopped"] = str(stopped)
    return found


def pushed_weights(settings):
    """What a sampler would be given of the model, by name; with an adapter that has learned."""
    import torch

    from opsdc.rollout.merge import check_merge
    from opsdc.rollout.weights import Weights

    run = Run(settings)
    check_merge(run.model, range(5, 25))
    run.move_away()
    weights = Weights(run.model, torch.float32)
    return weights.is_sharded, {name: tensor.numpy() for name, tensor in weights}


def not_finite_on_one(settings):
    """(skipped, unchanged): rank 1's loss is NaN, whose share holds every second token."""
    import torch

    from opsdc.method import update as module

    run = Run(settings)
    before = {n: p.detach().clone() for n, p in run.trained().items()}
    if run.ranks.rank == 1:
        original = module.distillation_loss

        def sick(*arguments, **keywords):
            loss, stats = original(*arguments, **keywords)
            return loss * math.nan, stats

        module.distillation_loss = sick
    result, _ = run.take(batch((5, 6, 7, 8)))
    same = [torch.equal(_local(p), _local(before[n])) for n, p in run.trained().items()]
    return result.skipped, all(same)


def _local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def right_by_length(rank):
    """Let a response be right where its text has an even length: a random model never is."""
    from opsdc.eval import answers
    from opsdc.eval.scorers import Score

    answers.score = lambda text, problem, scorer: Score(len(text) % 2 == 0, text)


# What goes wrong on one rank of a run.


def signal_one(rank, owner, name, n):
    """SIGTERM to rank 1 alone, at its n-th call."""
    _at_call(rank, owner, name, n, lambda: os.kill(os.getpid(), signal.SIGTERM))


def fail_on_one(rank, owner, name, n):
    def fail():
        raise RuntimeError("injected")

    _at_call(rank, owner, name, n, fail)


def no_memory_on_one(rank, owner, name, n):
    def fail():
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    _at_call(rank, owner, name, n, fail)


def kill_server_before_sampling(rank, n):
    """SIGKILL to the run's vLLM server, right before it is asked for the n-th batch."""
    from opsdc.rollout.vllm.client import VLLMClient

    sample, calls = VLLMClient.sample, 0

    def killing(server, *arguments):
        nonlocal calls
        calls += 1
        if calls == n:
            server._process.kill()
            server._process.wait()
            print("its server was killed", flush=True)
        return sample(server, *arguments)

    VLLMClient.sample = killing


def lose_push(rank, n):
    """The n-th push of rank 1 does not reach its engine, which says nothing."""
    from opsdc.rollout.vllm.engine import VLLMEngine

    load, calls = VLLMEngine.load, 0

    def losing(engine, weights, weights_id, probe):
        nonlocal calls
        calls += 1
        if rank == 1 and calls == n:
            engine._weights_id = weights_id
            return engine._score(probe)
        return load(engine, weights, weights_id, probe)

    VLLMEngine.load = losing


def _at_call(rank, owner, name, n, action):
    if rank != 1:
        return
    target = pkgutil.resolve_name(owner)
    original, calls = getattr(target, name), 0

    def acting(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == n:
            action()
        return original(*arguments, **keywords)

    setattr(target, name, acting)


def outcome(out):
    """As `runs.outcome`, for any number of files."""
    found = runs.outcome(out)
    (last,) = sorted((Path(out) / "checkpoints").glob("step-*"))[-1:]
    files = json.loads((last / "manifest.json").read_text())["files"]
    found["sha256"] = {n: f["sha256"] for n, f in files.items() if n.endswith(".safetensors")}
    return found
