"""One of two engines is killed at a random moment while blocks go from one to the other; what must be true of the other one."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass, field
from typing import Any

from engine_pairs import ONE_TOKEN, build, check_at_rest, failures, go_on, reference_to, settle
from engine_processes import EngineProcess, EngineProcesses
from tiny import TINY_SETTINGS, VOCAB_SIZE, drain

from stepgraph.engine.engine import Engine
from stepgraph.engine.request import Request
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.transfer.reference import Offer, Reference

LIMIT_S = 60
"""No request takes so long, whoever dies."""
_GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
_ONE = {"temperature": 0, "max_tokens": 1, "ignore_eos": True}
_NUM_PROMPTS, _MOST_AT_ONCE = 10, 4
SETTINGS = TINY_SETTINGS | {"device": "cpu", "num_kv_blocks": 129, "kv_lease": 0.5, "kv_transfer_timeout": 5.0}


@dataclass
class Trial:
    """What came of one."""

    number: int
    killed: str
    after_ms: float
    requests: int
    wrong: int = 0
    """Requests with other tokens, at either engine, than those of an engine alone."""
    ended_before: int = 0
    """Requests that the other engine had answered when the one was killed."""
    blocks_before: int = 0
    """That had gone from one engine to the other by then."""
    failures: dict[str, int] = field(default_factory=dict)
    """Fetches of the sink's that came to nothing, or leases of the source's that ended, by reason."""
    leaked: str = ""
    """What the other engine still had of them afterwards."""
    seconds: float = 0.0


class Killing:
    """Trials of one kind, with one engine that lives through all of them.

    Args:
        processes: where the others come from.
        model: folder of it.
        killed: "source" or "sink".
    """

    def __init__(self, processes: EngineProcesses, model: str, killed: str) -> None:
        self._processes, self._model, self._killed = processes, model, killed
        mixed = build({"model": model})
        rng = random.Random(0)
        self._prompts = [
            [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(60, 300))] for _ in range(_NUM_PROMPTS)
        ]
        self._expected = []
        for prompt in self._prompts:
            request = mixed.add_request("request", prompt, SamplingParams(**_GREEDY))
            drain(mixed)
            self._expected.append(request.output_token_ids)
        mixed.shutdown()
        self.survivor = build(self._settings("sink" if killed == "source" else "source"))
        whole = self._try(-1, list(range(_MOST_AT_ONCE)), None)
        assert not whole.failures, whole
        assert whole.blocks_before > 0, whole
        assert (whole.wrong, whole.leaked) == (0, ""), whole
        self._usual_s = whole.after_ms / 1e3
        """What four requests take that nobody disturbs."""

    def __call__(self, number: int) -> Trial:
        """Always the same requests for the same number; the moment is what the machine makes of it."""
        rng = random.Random(number)
        chosen = [rng.randrange(_NUM_PROMPTS) for _ in range(rng.randint(1, _MOST_AT_ONCE))]
        return self._try(number, chosen, rng.uniform(0, self._usual_s))

    def _try(self, number: int, chosen: list[int], after_s: float | None) -> Trial:
        """None: kill it when all is done."""
        num_open = _num_open_files()
        victim = self._processes.start(self._settings(self._killed))
        before, blocks_before = failures(self.survivor), self._num_blocks()
        started = time.monotonic()
        added = self._add(victim, number, chosen)
        if after_s is None:
            _run(self.survivor, added)
            victim.wait_for([request.id for request in added], LIMIT_S)
            after_s = time.monotonic() - started
        while time.monotonic() < started + after_s:
            go_on(self.survivor)
        trial = Trial(number, self._killed, 1e3 * after_s, len(added))
        trial.ended_before = sum(request.finish_reason is not None for request in added)
        trial.blocks_before = self._num_blocks() - blocks_before
        victim.kill()
        _run(self.survivor, added)
        for request, index in zip(added, chosen, strict=True):
            first, answer = self._expected[index][:1], self._expected[index]
            its, mine = (first, answer) if self._killed == "source" else (answer, first)
            theirs = victim.answers.get(request.id, {"tokens": its})["tokens"]
            trial.wrong += (request.output_token_ids, theirs) != (mine, its)
        settle(self.survivor, LIMIT_S)
        trial.failures = dict(failures(self.survivor) - before)
        trial.leaked = self._leaks(num_open)
        trial.seconds = time.monotonic() - started
        return trial

    def close(self) -> None:
        """End the engine that lived."""
        self.survivor.shutdown()

    def _settings(self, role: str) -> dict[str, Any]:
        return SETTINGS | {"model": self._model, "splitwise_role": "prefill" if role == "source" else "decode"}

    def _add(self, victim: EngineProcess, number: int, chosen: list[int]) -> list[Request]:
        """Requests to both engines; returns the survivor's."""
        added = []
        for place, index in enumerate(chosen):
            name = f"{number}/{place}"
            # No prefix of an earlier trial is found.
            prompt, salt = self._prompts[index], {"cache_salt": name}
            if self._killed == "source":
                offer = {"do_remote_decode": True, "remote_request_id": name}
                victim.add(name, prompt, _ONE, transfer=offer, **salt)
                at = victim.address
                reference = Reference(at["remote_engine_id"], at["remote_host"], at["remote_port"], name)
                added.append(
                    self.survivor.add_request(name, prompt, SamplingParams(**_GREEDY), transfer=reference, **salt)
                )
            else:
                added.append(self.survivor.add_request(name, prompt, ONE_TOKEN, transfer=Offer(name), **salt))
                reference = reference_to(self.survivor, name).params(0, 1)
                victim.add(name, prompt, _GREEDY, transfer=reference, **salt)
        return added

    def _num_blocks(self) -> int:
        counts = self.survivor.transfers.counts()
        return counts.blocks_received + counts.blocks_sent

    def _leaks(self, num_open: int) -> str:
        """What is left of a trial, when threads of links have had time to end: so many files were open before."""
        deadline = time.monotonic() + 10
        while _num_open_files() > num_open and time.monotonic() < deadline:
            time.sleep(1e-3)
        problems = check_at_rest(self.survivor)
        if (count := _num_open_files()) > num_open:
            problems.append(f"{count} open files, {num_open} before")
        return "; ".join(problems)


def _num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _run(engine: Engine, requests: list[Request]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while any(request.finish_reason is None for request in requests):
        assert time.monotonic() < deadline, "requests hang"
        go_on(engine)
