"""One request, from arrival to its last token."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from enum import StrEnum
from functools import cached_property, partial
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, NamedTuple, cast, overload

from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import Fault
from stepgraph.step.shape import Variant
from stepgraph.step.slot_sampling import SlotSampling
from stepgraph.transfer.reference import Offer, Reference

if TYPE_CHECKING:
    from stepgraph.engine.adapters import Adapter
    from stepgraph.engine.grammars import RemoteGuide


class FinishReason(StrEnum):
    """Why a request ended, in the words of the OpenAI API (`abort` and `error` are ours)."""

    STOP = "stop"  # a stop token or stop string
    LENGTH = "length"  # max_tokens or the end of the context
    ABORT = "abort"
    ERROR = "error"  # see `Request.error`


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position, of the model's raw logits."""

    token: int
    logprob: float
    rank: int  # 1 is the most likely token
    top: tuple[tuple[int, float], ...]  # (token, log-probability), most likely first


@dataclass(eq=False)
class AnsweredRequest:
    """What a user asked for, and what has come of it: all that those who read the answer see. The engine's own requests are such,
    and their likenesses in other processes."""

    id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    _: KW_ONLY
    output_token_ids: list[int] = field(default_factory=list)
    output_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One per output token if `params.logprobs` is set, else empty."""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    """If `params.prompt_logprobs` is set: None for the first prompt token, then one per further prompt token."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The stop token it ended on, also the last of `output_token_ids`."""
    error: Fault | None = None
    """What went wrong, if it ended with `FinishReason.ERROR`."""
    num_draft_tokens: int = 0
    """Proposals that were verified for it."""
    accepted: list[int] = field(default_factory=list)
    """Of these, those that stood: their places in `output_token_ids`, ascending."""
    kv_transfer_params: dict[str, Any] | None = None
    """If its prompt was computed for another engine: what that must be told, once the prompt is done."""
    admitted_at: float | None = None
    """`time.monotonic()` when it first got a slot."""

    def count_accepted(self, num_tokens: int) -> None:
        """The next `num_tokens` that `output_token_ids` gains are proposals that stood."""
        if num_tokens:
            start = len(self.output_token_ids)
            self.accepted += range(start, start + num_tokens)

    def num_accepted(self, end: int) -> int:
        """Proposals that stood among the first `end` tokens of the answer."""
        return bisect_left(self.accepted, end)

    def drop_tokens(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` of its answer."""
        if num_tokens:
            del self.output_token_ids[-num_tokens:]
            del self.output_logprobs[-num_tokens:]
            del self.accepted[self.num_accepted(len(self.output_token_ids)) :]


@dataclass(eq=False)
class Request(AnsweredRequest):
    """A request in the engine, and how far it has come. The device has its own view in SlotState."""

    max_length: int
    """Tokens of prompt and answer at which it ends."""
    sampling: SlotSampling
    """`params` as the device wants them."""
    packed_prompt: array[int] | None = None
    """`prompt_token_ids` as int32, if whoever made the request has it: slices of it cost next to nothing."""
    variant: Variant = Variant.PLAIN
    """The least its steps need."""
    priority: int = 0
    """Lower runs first."""
    cache_salt: str | None = None
    """Only requests of the same salt share cached prefixes."""
    adapter: Adapter | None = None
    """The LoRA adapter it uses, held in memory until it ends."""
    transfer: Offer | Reference | None = None
    """Where the blocks of its prompt go, or come from."""
    guide: RemoteGuide | None = None
    """Where it stands in its grammar, if it follows one."""

    slot: int | None = None
    """Index of its device-side state while it runs."""
    generation: int = 0
    draft_token_ids: Sequence[int] = ()
    """Proposals that wait for its next step, if it follows a grammar."""
    blocks: list[int] = field(default_factory=list)
    """KV blocks granted, in order: those of a place (see `stepgraph.abi.block_groups`) one behind the other."""
    num_unseen: int = 0
    """Places, from the first on, whose windowed blocks are null: no further token sees anything of them."""
    line: int = 0
    """Where the last step planned leaves its state; 0: layers have none, or it does not run."""
    read_line: int = 0
    """The checkpoint that its next row reads; 0: it reads `line`."""
    start_lines: tuple[int, ...] = ()
    """The lines that its first row in its slot reads and writes; none: those that come with its slot."""
    borders: list[int] = field(default_factory=list)
    """Positions in its prompt where a row is to end so that its state there can be kept, ascending."""
    arrival: int = 0
    """Its number in the order of arrivals."""
    arrived_at: float | None = None
    """When it was queued first, in seconds of the engine's clock."""
    overtaken: int = 0
    """Later arrivals that got a slot while it waited, or its blocks while it ran."""
    num_preemptions: int = 0
    block_keys: list[bytes] = field(default_factory=list)
    """Prefix-cache keys of its full blocks, as far as computed."""
    num_found: int = 0
    """Places, from the first on, whose blocks were found in the prefix cache when it got its slot."""
    num_published: int = 0
    """Places, from the first on, whose blocks can be found in the prefix cache."""
    awaits_host: bool = False
    """It cannot run another token before the host has done something: compiled its grammar, prepared its token mask."""
    awaits_blocks: bool = False
    """It waits for blocks of its prompt that are brought here."""
    was_snapped: bool = False
    """A chunk of its prompt was cut to a captured size, which costs it one step; it happens once."""

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def is_kept_waiting(self) -> bool:
        """Whether it could not run if there were room for it."""
        return self.awaits_host or self.awaits_blocks

    @property
    def num_known(self) -> int:
        """Tokens of prompt and answer that the host knows."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def tokens(self, start: int, end: int) -> array[int]:
        """Known tokens start … end - 1, as int32."""
        of_prompt, of_answer = self.token_parts(start, end)
        tokens = array("i", of_prompt)
        tokens.extend(of_answer)
        return tokens

    def token_parts(self, start: int, end: int) -> tuple[Sequence[int], Sequence[int]]:
        """Known tokens start … end - 1: those of the prompt, and those of the answer behind it."""
        prompt = self.prompt_token_ids if self.packed_prompt is None else self.packed_prompt
        answer = self.output_token_ids[max(0, start - len(prompt)) : end - len(prompt)] if end > len(prompt) else ()
        return prompt[start:end], answer


class RequestUpdate(NamedTuple):
    """A token of a request, or its end."""

    request: Request
    new_token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


class StepUpdates(Sequence[RequestUpdate]):
    """What requests gained in a step. Updates of those that gained tokens and go on are made when first looked at, as many
    callers wait for the end only.

    Args:
        requests: R that go on.
        tokens: R times, what each has gained.
        others: updates of other requests.
    """

    def __init__(
        self, requests: Sequence[Request], tokens: Iterable[tuple[int, ...]], others: Sequence[RequestUpdate] = ()
    ):
        self._requests, self._tokens, self.others = requests, tokens, others

    @classmethod
    def joined(cls, parts: Sequence[StepUpdates]) -> StepUpdates:
        """Those of all."""
        requests = tuple(chain.from_iterable(part._requests for part in parts))
        others = tuple(chain.from_iterable(part.others for part in parts))
        return cls(requests, chain.from_iterable(part._tokens for part in parts), others)

    @cached_property
    def _updates(self) -> list[RequestUpdate]:
        # RequestUpdate._make, without a call into Python for each
        make = cast(Callable[[Any], RequestUpdate], partial(tuple.__new__, RequestUpdate))
        return [*map(make, zip(self._requests, self._tokens, repeat(None))), *self.others]

    def __len__(self) -> int:
        return len(self._requests) + len(self.others)

    def __iter__(self) -> Iterator[RequestUpdate]:
        return iter(self._updates)

    @overload
    def __getitem__(self, index: int) -> RequestUpdate: ...
    @overload
    def __getitem__(self, index: slice) -> list[RequestUpdate]: ...
    def __getitem__(self, index: int | slice) -> RequestUpdate | list[RequestUpdate]:
        return self._updates[index]
