"""Which replica a request goes to, in the terms of Ray Serve: the choice is that of `stepgraph.server.routing`.

Serve makes a router in each process that has a handle of the deployment, and each concludes from
what it has sent itself what is in the replicas' prefix caches.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from stepgraph.ray.prompts import Prompt, prompt_of
from stepgraph.server.routing import REQUEST_TOKENS, SPAN_TOKENS, LoadEstimate, Router

_DEFAULT_KV_TOKENS = 1_000_000
"""Of a replica that has not said how many it holds."""


class PrefixAwareRouter(RequestRouter):
    """A request router of Serve; see the module. Belongs to one event loop."""

    def initialize_state(self, *, max_adapters: int, keeps_prefixes: bool) -> None:  # type: ignore[override]  # by name
        """See `RequestRouter`.

        Args:
            max_adapters: LoRA adapters that a replica keeps.
            keeps_prefixes: replicas cache prefixes.
        """
        self._max_adapters = max_adapters
        self._keeps_prefixes = keeps_prefixes
        self._router: Router | None = None
        self._places: dict[ReplicaID, int] = {}  # of each replica, its number in the router
        self._free: list[int] = []
        self._loads: dict[ReplicaID, ReplicaLoad] = {}
        self._name = ""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """See `RequestRouter`."""
        here = {replica.replica_id: replica for replica in replicas}
        for gone in self._places.keys() - here.keys():
            self._free.append(self._places.pop(gone))
            del self._loads[gone]
        for replica_id in sorted(here.keys() - self._places.keys(), key=str):
            self._places[replica_id] = self._number(here[replica_id])
            self._loads[replica_id] = ReplicaLoad()
        for replica_id, replica in here.items():
            self._loads[replica_id].hear(replica.routing_stats, self._name)
        super().update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter`. The second rank is for when the first takes no more requests."""
        if pending_request is None or self._router is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # once all were tried
        candidates = {replica.replica_id: replica for replica in candidate_replicas}
        up = [replica_id for replica_id in candidates if self._loads[replica_id].is_up] or list(candidates)
        loads: list[int | None] = [None] * self._router.num_replicas
        for replica_id in up:
            loads[self._places[replica_id]] = self._loads[replica_id].tokens
        if pending_request.args:
            self._name = pending_request.args[0].sender
        prompt = _prompt_in(pending_request)
        number = self._router.route(
            prompt.token_ids, loads, salt=f"{prompt.model}\n{prompt.salt or ''}", session=prompt.session
        ).replica
        chosen = next(replica_id for replica_id in up if self._places[replica_id] == number)
        others = [replica for replica_id, replica in candidates.items() if replica_id != chosen]
        return [[candidates[chosen]], others]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """See `RequestRouter`."""
        if replica_id in self._loads:
            self._loads[replica_id].sent(
                pending_request.metadata.internal_request_id, len(_prompt_in(pending_request).token_ids)
            )

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """See `RequestRouter`."""
        if replica_id in self._loads:
            self._loads[replica_id].ended(internal_request_id)

    def _number(self, replica: RunningReplica) -> int:
        """The router's number of a replica that is new."""
        if self._router is None:
            num_spans = replica.replica_metadata.get("kv_tokens", _DEFAULT_KV_TOKENS) // SPAN_TOKENS
            self._router = Router(
                0,
                block_size=SPAN_TOKENS,
                num_kv_blocks=num_spans if self._keeps_prefixes else 0,
                max_adapters=self._max_adapters,
            )
        if not self._free:
            return self._router.add()
        number = self._free.pop()
        self._router.forget(number)
        return number


class ReplicaLoad:
    """What a replica has to do: this router's requests, and those of others, as it told last."""

    def __init__(self) -> None:
        self.is_up = True
        self._estimate = LoadEstimate()
        self._own: dict[str, bool] = {}  # whether the last report can have known of them
        self._num_others = 0
        self._told_at: float | None = None

    @property
    def tokens(self) -> int:
        """For `Router.route`."""
        return self._estimate.tokens + REQUEST_TOKENS * self._num_others

    def sent(self, id: str, num_prompt_tokens: int) -> None:
        """A request goes to the replica."""
        self._own[id] = False
        self._estimate.sent(id, 1, num_prompt_tokens)

    def ended(self, id: str) -> None:
        """It is done; or it was refused, so that it was never there."""
        if self._own.pop(id, None) is not None:
            self._estimate.ended(id)

    def hear(self, stats: dict[str, Any], name: str) -> None:
        """A report, or the last one again. A prompt that was sent before the one before is taken to be computed.

        Args:
            stats: of `EngineReplica.record_routing_stats`.
            name: whose requests are this router's.
        """
        if not stats or stats["time"] == self._told_at:
            return
        self._told_at, self.is_up = stats["time"], stats["is_up"]
        self._num_others = sum(count for sender, count in stats["num_by_sender"].items() if sender != name)
        for id, was_known in self._own.items():
            if was_known:
                self._estimate.began(id)
            self._own[id] = True


def _prompt_in(pending_request: PendingRequest) -> Prompt:
    """Of a request on its way to `EngineReplica.answer`."""
    arguments = pending_request.args
    return prompt_of(arguments[0].body) if arguments else Prompt([], "")
