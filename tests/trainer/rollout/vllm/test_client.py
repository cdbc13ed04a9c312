"""A server that misbehaves in every way a socket allows: a named error, soon, and never a batch.

The server here is the adversary; the real one is in test_vllm.py.
"""

import contextlib
import json
import signal
import socket
import struct
import threading
import time

import pytest
import torch
from helpers.tiny import tiny_model

from opsdc.errors import ConfigError, RolloutError, WeightSyncError
from opsdc.ranks import stop
from opsdc.rollout.base import Request, SamplingParams
from opsdc.rollout.vllm import wire
from opsdc.rollout.vllm.client import VLLMClient
from opsdc.rollout.vllm.messages import EngineOptions
from opsdc.rollout.vllm.sampler import VLLMSampler
from opsdc.rollout.vllm.server import check_place
from opsdc.rollout.weights import sequence_logprobs

TIMEOUT_S = 1.0
EOS = 2
PROBE = [5, 6, 7, 8]
PARAMS = SamplingParams(max_new_tokens=3)


def frame(message) -> bytes:
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack(">Q", len(body)) + body


class Adversary:
    """Answers pushes as it should (it holds the model's own probe), and samples as `answer` says.

    `answer(message)` gives the bytes to send, or is an iterator of bytes to trickle; None closes.
    """

    def __init__(self, answer, probe):
        self.answer, self.probe = answer, probe
        self.seen = []
        self.delay_s = 0.0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.open = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.open.append(connection)
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection):
        (size,) = struct.unpack(">Q", connection.recv(8, socket.MSG_WAITALL))
        message = json.loads(connection.recv(size, socket.MSG_WAITALL))
        self.seen.append(message["op"])
        time.sleep(self.delay_s)
        if message["op"] == "load":
            reply = frame({"weights_id": message["weights_id"], "probe": self.probe})
            self.weights_id = message["weights_id"]
        else:
            reply = self.answer(message, self)
        try:
            if isinstance(reply, bytes):
                connection.sendall(reply)
            elif reply is not None:
                for part in reply:
                    connection.sendall(part)
                return
            connection.close()
        except OSError:
            pass

    def close(self):
        # Closing alone leaves a thread in accept() one more connection.
        with contextlib.suppress(OSError):  # closed before
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self.open:
            connection.close()


def good(message, server, **changes):
    row = {"ids": [9, 10, EOS], "logprobs": [-1.0, -2.0, -0.5], "finished": True}
    rows = [{"key": r["key"], **row} for r in message["requests"]]
    reply = {"weights_id": server.weights_id, "probe": server.probe, "rows": rows}
    return frame(reply | changes)


def with_row(**changes):
    def answer(message, server):
        row = {"ids": [9, 10, EOS], "logprobs": [-1.0, -2.0, -0.5], "finished": True} | changes
        rows = [{"key": r["key"], **row} for r in message["requests"]]
        return good(message, server, rows=rows)

    return answer


def trickle(message, server):
    def bytes_now_and_then():
        yield struct.pack(">Q", 1000)
        while True:
            yield b"["
            time.sleep(0.05)

    return bytes_now_and_then()


def never(message, server):
    time.sleep(60)


FAULTS = {
    "closes": lambda message, server: None,
    "never answers": never,
    "a byte now and then": trickle,
    "not JSON": lambda message, server: frame(b"\xff\xfe nonsense"),
    "endless nesting": lambda message, server: frame(b"[" * 100_000),
    "JSON but no message": lambda message, server: frame([1, 2]),
    "half a message": lambda message, server: good(message, server)[:-5],
    "a length of exabytes": lambda message, server: struct.pack(">Q", 1 << 62),
    "HTTP 500": lambda message, server: b"HTTP/1.1 500 Internal Server Error\r\n\r\n",
    "HTTP 503": lambda message, server: b"HTTP/1.1 503 Service Unavailable\r\n\r\n",
    "an error": lambda message, server: frame({"error": "out of memory"}),
    "no rows": lambda message, server: frame({"weights_id": server.weights_id}),
    "too few rows": lambda message, server: good(message, server, rows=[]),
    "rows to other requests": with_row(key="somebody else's"),
    "text for ids": with_row(ids="abc"),
    "ids beyond the vocabulary": with_row(ids=[9, 10_000, EOS]),
    "negative ids": with_row(ids=[9, -1, EOS]),
    "booleans for ids": with_row(ids=[9, True, EOS]),
    "cut short": with_row(ids=[9], logprobs=[-1.0], finished=False),
    "goes on behind the end": with_row(ids=[9, EOS, 10]),
    "more than the cap": with_row(ids=[9, 9, 9, 9], logprobs=[-1.0] * 4, finished=False),
    "nothing": with_row(ids=[], logprobs=[], finished=False),
    "too few log-probabilities": with_row(logprobs=[-1.0]),
    "NaN": with_row(logprobs=[-1.0, float("nan"), -0.5]),
    "probabilities above 1": with_row(logprobs=[-1.0, 2.0, -0.5]),
    "other weights": lambda message, server: good(message, server, weights_id="old"),
    "no weights": lambda message, server: good(message, server, weights_id=""),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


@pytest.fixture
def start(model, tmp_path):
    made = []

    def start(answer, probe=None):
        probe = sequence_logprobs(model, PROBE, torch.float32) if probe is None else probe
        adversary = Adversary(answer, probe)
        made.append(adversary)
        options = EngineOptions(
            folder="",
            dtype="float32",
            vocab_size=264,
            max_model_len=64,
            max_num_seqs=4,
            memory_share=0.1,
            trust_remote_code=False,
            sleeps=False,
        )
        server = VLLMClient(
            options,
            key="k",
            weights_dir=tmp_path,
            timeout_s=TIMEOUT_S,
            address=adversary.address,
        )
        sampler = VLLMSampler(
            server, seed=0, eos_ids=[EOS], probe_ids=PROBE, dtype=torch.float32, run="r"
        )
        return adversary, sampler

    yield start
    for adversary in made:
        adversary.close()


REQUESTS = [Request(key=f"r{i}", prompt_ids=[5, 6, 7 + i]) for i in range(2)]


def test_the_good_answer_is_taken(start, model):
    _, sampler = start(good)
    sampler.push(model, 0)
    rollouts = sampler.generate(REQUESTS, PARAMS, label="test")
    assert [list(r.response_ids) for r in rollouts] == [[9, 10, EOS]] * 2
    assert [r.weights_version for r in rollouts] == [0, 0]


def test_a_stop_waits_for_the_end_of_a_push_but_not_of_a_batch(start, model, monkeypatch):
    """A push follows an update: left there, the new weights would be saved as the old step's."""
    adversary, sampler = start(good)
    adversary.delay_s = 0.2
    monkeypatch.setattr(wire, "POLL_S", 0.01)
    monkeypatch.setattr(stop, "_requested", signal.SIGTERM)
    sampler.push(model, 0)
    with pytest.raises(stop.Stopped, match="SIGTERM"):
        sampler.generate(REQUESTS, PARAMS, label="test")


@pytest.mark.whole
@pytest.mark.parametrize("name", FAULTS)
def test_faults_end_in_a_named_error_within_twice_the_timeout(start, model, name):
    adversary, sampler = start(FAULTS[name])
    sampler.push(model, 0)
    began = time.monotonic()
    with pytest.raises(RolloutError, match="failed twice"):
        sampler.generate(REQUESTS, PARAMS, label="test")
    assert time.monotonic() - began < 2 * TIMEOUT_S + 0.5
    # The second attempt trusts nothing: weights first.
    assert adversary.seen[:3] == ["load", "sample", "load"]


@pytest.mark.parametrize(
    "fault", ["closes", "not JSON", "HTTP 503", "an error", "other weights", "cut short"]
)
def test_a_fault_that_passes_ends_in_the_answer(start, model, fault):
    calls = []

    def once(message, server):
        calls.append(message)
        return (FAULTS[fault] if len(calls) == 1 else good)(message, server)

    _, sampler = start(once)
    sampler.push(model, 3)
    rollouts = sampler.generate(REQUESTS, PARAMS, label="test")
    assert [r.weights_version for r in rollouts] == [3, 3]
    assert calls[0]["requests"] == calls[1]["requests"]


def test_refused_connections(start, model):
    adversary, sampler = start(good)
    adversary.close()
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match="failed twice"):
        sampler.push(model, 0)
    assert time.monotonic() - began < 2 * TIMEOUT_S
    with pytest.raises(WeightSyncError, match="push before"):
        sampler.generate(REQUESTS, PARAMS, label="test")


def test_a_probe_of_other_weights_is_refused(start, model):
    own = sequence_logprobs(model, PROBE, torch.float32)
    _, sampler = start(good, probe=[own[0] + 1e-3, *own[1:]])
    with pytest.raises(WeightSyncError, match="does not compute with these weights"):
        sampler.push(model, 0)


def test_a_batch_whose_probe_moved_since_the_push_is_refused(start, model):
    own = sequence_logprobs(model, PROBE, torch.float32)
    _, sampler = start(lambda m, s: good(m, s, probe=[own[0] + 1e-4, *own[1:]]))
    sampler.push(model, 0)
    with pytest.raises(WeightSyncError, match="have changed"):
        sampler.generate(REQUESTS, PARAMS, label="test")


def test_a_repeated_push_never_sends_other_numbers_under_the_same_version(start, model):
    """The model was updated, the new version not pushed, and the server lost its weights."""
    changing = tiny_model(seed=1)
    own = sequence_logprobs(changing, PROBE, torch.float32)
    _, sampler = start(FAULTS["closes"], probe=own)
    sampler.push(changing, 0)
    with torch.no_grad():
        next(changing.parameters()).add_(1e-3)
    with pytest.raises(WeightSyncError, match="was updated"):
        sampler.generate(REQUESTS, PARAMS, label="test")


def test_other_machines_need_a_key():
    for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost"):
        check_place(host, "")
    check_place("10.0.0.7", "secret")
    for host in ("10.0.0.7", "::", "", "example.org", "127.0.0.1.example.org", "127.1.example"):
        with pytest.raises(ConfigError, match="OPSDC_SERVER_KEY"):
            check_place(host, "")
