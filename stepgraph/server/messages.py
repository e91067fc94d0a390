"""What the supervisor, the HTTP fronts and an engine's process tell each other, in MessagePack.

Both sides are started together from the same installation, so messages have no versions. Times are `time.monotonic()` seconds, a
clock that all processes of a machine share.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, NamedTuple

import msgspec

from stepgraph.engine.guided_text import MAX_TEXT_BYTES, check_text
from stepgraph.engine.request import TokenLogprobs
from stepgraph.engine.sampling_params import SamplingParams, StructuredOutputs
from stepgraph.engine.step_recorder import SeenRequest, SeenStep
from stepgraph.errors import Fault, RequestError
from stepgraph.transfer.reference import Offer, Reference


class Start(msgspec.Struct, tag=True):
    """To the engine's process, on its standard input: the one message before the socket is there."""

    address: str
    settings: dict[str, Any]
    """As `EngineConfig.from_settings` takes them."""
    progress: bool
    curve_server_key: str | None
    """Key of the socket's other end if it is a TCP port, which others on the machine could connect to."""
    weights: str | None = None
    """Folder of those that replaced the model's own; see `UpdateWeights`."""
    fronts: str | None = None
    """Where the engine is to listen for front processes of their own."""


# From the supervisor or a front to the engine.


class Add(msgspec.Struct, tag=True):
    """Queue requests for one prompt: all of them, or none."""

    group: str
    """Names them in `Accepted` and `Refused`."""
    requests: list[tuple[str, dict[str, Any]]]
    """Ids and the fields of their SamplingParams that are not at their defaults."""
    prompt_token_ids: list[int]
    priority: int = 0
    cache_salt: str | None = None
    adapter: str | None = None
    bad_words: list[list[int]] | None = None
    """Tokens of the texts of the same name."""
    offer: Offer | None = None
    reference: Reference | None = None
    """At most one of these two: where the blocks of the prompt go, or come from."""


class Abort(msgspec.Struct, tag=True):
    """End requests, if they still run. There is no answer."""

    ids: list[str]


class Hello(msgspec.Struct, tag=True):
    """A front process is there, and is to hear of the load. There is no answer."""


class FrontGone(msgspec.Struct, tag=True):
    """A front process has ended: its requests end. There is no answer."""

    front: str
    """The name of its socket."""


class AskGraphs(msgspec.Struct, tag=True):
    """For the captured graphs; see `/graphs`. This and what follows with a number is answered by `Answer` or `Declined`."""

    number: int


class AskRanks(msgspec.Struct, tag=True):
    """For a `RankInfo` of each process that shares the model."""

    number: int


class Pause(msgspec.Struct, tag=True):
    """See `Engine.pause`; answered when the steps under way are done and delivered."""

    number: int


class Resume(msgspec.Struct, tag=True):
    """See `Engine.resume`."""

    number: int


class Sleep(msgspec.Struct, tag=True):
    """See `Engine.sleep`."""

    number: int
    level: int


class WakeUp(msgspec.Struct, tag=True):
    """See `Engine.wake_up`. Weights that were dropped are read again; if that fails, the engine sleeps on."""

    number: int


class UpdateWeights(msgspec.Struct, tag=True):
    """See `Engine.update_weights`."""

    number: int
    folder: str


class ResetPrefixCache(msgspec.Struct, tag=True):
    """See `Engine.reset_prefix_cache`, whose result is the answer."""

    number: int
    preempt: bool


class LoadAdapter(msgspec.Struct, tag=True):
    """Read a LoRA adapter, to have it when requests ask for it; declined if the model cannot run it."""

    number: int
    folder: str
    anew: bool
    """Also if it is in memory."""


class ForgetAdapter(msgspec.Struct, tag=True):
    """See `Engine.forget_adapter`. There is no answer."""

    folder: str


class AbortAll(msgspec.Struct, tag=True):
    """End all requests, which are told so; see `FinishReason.ABORT`. There is no answer."""


class Watch(msgspec.Struct, tag=True):
    """Tell what steps ran and who took part in them: somebody looks. There is no answer but `Seen`, now and then."""

    until: float
    """When nobody looks any more, unless it is said anew."""
    first: int
    stride: int
    """These two: how the process is to number requests; said anew, they change nothing."""


class Stop(msgspec.Struct, tag=True):
    """End the process; what runs gets no answer."""


Question = AskGraphs | AskRanks | Pause | Resume | Sleep | WakeUp | UpdateWeights | ResetPrefixCache | LoadAdapter
ToEngine = Add | Abort | Hello | FrontGone | Question | ForgetAdapter | AbortAll | Watch | Stop


# From the engine to the supervisor and the fronts.


class Door(NamedTuple):
    """These three: see `stepgraph.transfer.reference.Reference`."""

    engine: str
    host: str
    port: int


class Ready(msgspec.Struct, tag=True):
    """The engine takes requests."""

    max_model_len: int
    max_num_seqs: int
    backend: str
    device: str
    precision: str
    num_kv_blocks: int
    block_size: int
    max_drafts: int
    """Most proposals per request and step; 0 without speculative decoding."""
    end_token_ids: tuple[int, ...]
    """Those with which the model ends an answer."""
    longest_step_s: float
    """No step takes longer, nor anything else that the loop does, but for captures."""
    num_ranks: int = 1
    collectives: str = ""
    """These two: see `ExecutorSpecs`."""
    role: str = "mixed"
    """See `TransferConfig.splitwise_role`."""
    door: Door | None = None
    """Where other engines ask for the blocks that it has; None if it has to do with none."""
    max_adapters: int = 0
    """LoRA adapters that the device's memory holds at once; 0 if it takes none."""
    max_tokens: int = 0
    """Most tokens of a step."""


class Beat(msgspec.Struct, tag=True):
    """The engine's loop goes round, though there may be nothing else to tell."""

    captures: bool = False
    """It is about to capture a graph: until it says something else, it may be silent for minutes."""
    reads: bool = False
    """It is about to move or read weights, which may take as long as a start."""


class Failed(msgspec.Struct, tag=True):
    """The last word of an engine that cannot start or go on."""

    message: str
    is_users: bool
    """The settings or the model are unusable: starting again would not help."""


class Accepted(msgspec.Struct, tag=True):
    """The requests of an `Add` are queued."""

    group: str


class Refused(msgspec.Struct, tag=True):
    """The requests of an `Add` cannot run."""

    group: str
    error: Fault


class TokenUpdate(msgspec.Struct, array_like=True, gc=False):  # never part of a cycle, and there are many
    """New tokens of a request, or its end."""

    id: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_token: int | None = None
    error: Fault | None = None
    logprobs: list[TokenLogprobs] | None = None
    """Of the new tokens, if asked for."""
    first: FirstToken | None = None
    """With a request's first update."""
    num_draft_tokens: int = 0
    """Proposals that were verified for the request by now."""
    num_accepted: int = 0
    """The first so many of `token_ids` are proposals that stood."""
    kv_transfer_params: dict[str, Any] | None = None
    """With the end of a request whose prompt was computed for another engine: what that must be told."""


class FirstToken(msgspec.Struct, array_like=True):
    """What is known of a request once it runs."""

    admitted_at: float | None
    """When it got a slot; None if it ended before."""
    num_cached_tokens: int
    prompt_logprobs: list[TokenLogprobs | None] | None


class StepInfo(NamedTuple):
    """One step as it ran. `num_tokens`, `num_rows` and `num_drafts` are those of its graph, of which `num_ranks` ran one each on
    rows of their own."""

    kind: str
    variant: str
    num_tokens: int
    num_rows: int
    num_drafts: int
    num_real_tokens: int
    eager_reason: str | None
    seconds: float
    host_seconds: float
    num_ranks: int = 1


class TransferLoad(NamedTuple):
    """What an engine has to do with others and with host memory, and counts since its process started."""

    num_leases: int
    """Prompts whose blocks are held for others."""
    num_fetches: int
    """Prompts whose blocks are on their way here."""
    num_quarantined: int
    """Blocks that were to be filled by others and are not, but may still be written."""
    blocks_sent: int
    bytes_sent: int
    blocks_received: int
    bytes_received: int
    recomputed_tokens: int
    """Of prompts that were computed elsewhere."""
    leases_ended: dict[str, int]
    """By `LossReason`."""
    failures: dict[str, int]
    """Prompts of which less came than was computed elsewhere, by the reason."""
    fetch_counts: tuple[int, ...]
    """Fetches that brought their blocks, by their seconds: one number for each of `FETCH_SECONDS`, and one for more."""
    fetch_seconds: float
    """Of all these together."""
    wait_counts: tuple[int, ...]
    wait_seconds: float
    """These two: the same of what their requests waited before."""
    host_blocks: int
    """Of prefixes, in host memory."""
    host_bytes: int
    """All of that memory."""
    host_hits: int
    """Blocks that came back from it."""
    host_evictions: int
    """That made room there for others."""


FETCH_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0),
)


class Load(NamedTuple):
    """How full the engine is, and counts since its process started."""

    num_running: int
    num_waiting: int
    kv_usage: float
    """Share of the KV blocks that requests hold."""
    preemptions: int
    prompt_tokens: int
    """Of prompts that began to run: those looked up in the prefix cache."""
    cached_prompt_tokens: int
    """Of these, found there."""
    num_graphs: int
    graph_bytes: int
    capture_seconds: float
    failed_captures: int = 0
    """Of those for steps that waited, or for steps to come; see `GraphStore`."""
    num_grammars: int = 0
    """Grammars of structured outputs that have a process."""
    grammar_bytes: int = 0
    """What they take, compiled."""
    drafts: int = 0
    draft_tokens: int = 0
    saved_steps: int = 0
    accepted_per_position: tuple[int, ...] = ()
    """One for each proposal that a row may have. These four: see `stepgraph.engine.speculation`."""
    transfers: TransferLoad | None = None
    """None if the engine has to do with no other, nor with host memory."""
    adapters: tuple[str, ...] = ()
    """Folders of the LoRA adapters that are in the device's memory."""
    awaited_adapters: tuple[str, ...] = ()
    """Folders of those that are being read for requests."""


class RankInfo(NamedTuple):
    """One of the processes that share the model; see `RankReport`."""

    rank: int
    device: str
    graph_bytes: int
    free_memory_bytes: int
    total_memory_bytes: int
    cpu_share: float
    waiting_share: float
    num_expert_tokens: int = 0
    """Of the experts that it keeps: tokens that chose them, each counted once for each."""
    expert_tokens: tuple[int, ...] = ()
    num_running: int = 0
    """Requests that it runs; without requests of its own, all of the engine's."""
    num_waiting: int = 0
    """Likewise, those that wait for it."""


class Progress(msgspec.Struct, tag=True):
    """What the steps of one turn of the engine's loop gave, and where that leaves it."""

    updates: list[TokenUpdate]
    steps: list[StepInfo]
    load: Load


class Seen(msgspec.Struct, tag=True):
    """What somebody who looks sees; see `StepRecorder.take`."""

    steps: list[SeenStep]
    requests: list[SeenRequest]
    begins: bool
    """Nothing was noted before: requests have new numbers."""


class Answer(msgspec.Struct, tag=True):
    """To the question of this number."""

    number: int
    content: Any = None


class Declined(msgspec.Struct, tag=True):
    """What the question of this number asks for cannot be done."""

    number: int
    error: Fault


FromEngine = Ready | Beat | Failed | Accepted | Refused | Progress | Seen | Answer | Declined

encode = msgspec.msgpack.Encoder().encode
decode_start = msgspec.json.Decoder(Start).decode
encode_start = msgspec.json.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


_MAX_SCHEMA_LEN = {"json": 3 * MAX_TEXT_BYTES, "structural_tag": 2**20}
"""Characters as JSON: of a schema, what its limit in bytes may be once its characters beyond ASCII are escaped."""
_SAMPLING_DEFAULTS = {f.name: f.default for f in fields(SamplingParams)}
_GUIDANCE_DEFAULTS = {f.name: f.default for f in fields(StructuredOutputs)}


def settings_of(params: SamplingParams) -> dict[str, Any]:
    """The fields of SamplingParams that are not at their defaults, for an `Add`."""
    settings = _given(params, _SAMPLING_DEFAULTS)
    if params.structured_outputs is not None:
        settings["structured_outputs"] = {
            name: _short(name, value) for name, value in _given(params.structured_outputs, _GUIDANCE_DEFAULTS).items()
        }
    return settings


def _short(name: str, value: Any) -> Any:
    """What the form of an answer says under a name, which each of a request's answers brings to the engine: a schema as text, as
    it may hold numbers of any size. RequestError if it is longer than any that can be followed."""
    where = f"structured_outputs.{name}"
    if isinstance(value, dict):
        value, most = json.dumps(value), _MAX_SCHEMA_LEN[name]
        if len(value) > most:
            raise RequestError(
                f"{where} has {len(value)} characters as JSON; at most {most} are allowed: shorten it", param=where
            )
    elif isinstance(value, str | tuple):
        check_text("".join(value), where)
    return value


def _given(values: object, defaults: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, default in defaults.items() if (value := getattr(values, name)) != default}
