"""Exchange: what an engine does, beside its steps, so that blocks of prompts come from other engines and go to them."""

from __future__ import annotations

from stepgraph.engine.request import Request
from stepgraph.errors import RequestError
from stepgraph.transfer.reference import PARAM, Offer


class Exchange:
    """Belongs to the engine's thread."""

    def add(self, request: Request) -> None:
        """A request has been queued.

        Raises:
            RequestError: this engine does not do what it asks for.
        """
        if request.transfer is not None:
            what, role = (
                ("its prompt computed for another engine (do_remote_decode)", "prefill")
                if isinstance(request.transfer, Offer)
                else ("blocks that another engine has computed (do_remote_prefill)", "decode")
            )
            raise RequestError(
                f"{PARAM}: the request wants {what}, and this engine does not do that; start it with --splitwise-role {role}",
                param=PARAM,
            )
