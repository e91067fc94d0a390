"""Which tokens each request may sample next: the host's side of token masks, from allowed tokens and grammars."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stepgraph.engine.guidance import CompiledGuide, GuidanceCompiler, Guide, require_xgrammar
from stepgraph.engine.request import Request
from stepgraph.errors import StepgraphError
from stepgraph.step import slot_line

if TYPE_CHECKING:
    from stepgraph.engine.sampling_params import StructuredOutputs

logger = logging.getLogger(__name__)

_COMPILERS = 2
"""Threads that compile grammars, so that one slow grammar holds up neither the steps nor every other grammar."""


class TokenMasks:
    """Masks of the requests that have one. Used by the engine's thread; grammars compile in threads of their own.

    Args:
        create_compiler: makes the grammar compiler, when the first request needs it.
        vocab_size: V.
        max_drafts: most proposals of a step, K.
    """

    def __init__(self, create_compiler: Callable[[], GuidanceCompiler], vocab_size: int, max_drafts: int = 0):
        self._create_compiler = create_compiler
        self._max_drafts = max_drafts
        self._num_words = -(-vocab_size // slot_line.MASK_BITS)
        self._threads = ThreadPoolExecutor(_COMPILERS, thread_name_prefix="stepgraph-grammar")
        self._compiling: dict[Request, Future[CompiledGuide]] = {}
        self._compiler: GuidanceCompiler | None = None  # made by the first thread that needs it, which takes seconds
        self._creation = threading.Lock()

    def _compile(self, spec: StructuredOutputs) -> CompiledGuide:
        with self._creation:
            if self._compiler is None:
                self._compiler = self._create_compiler()
        return self._compiler.compile(spec)

    def start(self, request: Request, spec: StructuredOutputs) -> None:
        """Compile a request's grammar; it waits for `collect` until that is done.

        Raises:
            ConfigError: xgrammar is not installed.
        """
        require_xgrammar()
        request.awaits_host = True
        self._compiling[request] = self._threads.submit(self._compile, spec)

    def collect(self) -> list[Request]:
        """Let requests go whose grammar is compiled; returns those whose grammar is unusable, their `error` set."""
        failed = []
        for request in [request for request, future in self._compiling.items() if future.done()]:
            future = self._compiling.pop(request)
            try:
                request.guide = Guide(future.result())
            except Exception as error:
                request.error_is_users = isinstance(error, StepgraphError)
                if not request.error_is_users:
                    logger.exception("a grammar failed to compile")
                request.error = str(error) or repr(error)
                failed.append(request)
            request.awaits_host = False
        return failed

    def drop(self, request: Request) -> None:
        """The request has ended."""
        future = self._compiling.pop(request, None)
        if future is not None:
            future.cancel()

    def masks(self, request: Request) -> npt.NDArray[np.int32]:
        """What the request may sample next, and after each of its proposals: [n, ceil(V / MASK_BITS)] int32, see
        `stepgraph.step.slot_line.MASK_BITS`. Without a grammar that holds for all its steps, and n = 1 + K."""
        if request.guide is None:
            masks = np.full((1 + self._max_drafts, self._num_words), -1, dtype=np.int32)
        else:
            masks = np.zeros((1 + len(request.draft_token_ids), self._num_words), dtype=np.int32)
            request.guide.fill_along(masks, request.draft_token_ids)
        if request.params.allowed_token_ids is not None:
            masks &= pack_tokens(request.params.allowed_token_ids, self._num_words)
        return masks

    def shutdown(self) -> None:
        """Stop the compiling threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def pack_tokens(tokens: Iterable[int], num_words: int) -> npt.NDArray[np.int32]:
    """The mask that allows just these tokens."""
    bits = np.zeros(num_words * slot_line.MASK_BITS, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
