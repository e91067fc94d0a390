"""What an engine does beside its steps: it rests, sleeps, takes new weights, and ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from stepgraph.engine.exchange import Exchange
from stepgraph.errors import ConfigError, DeviceMemoryError, EngineDeadError, StepgraphError
from stepgraph.executor.base import Executor
from stepgraph.models.source import ModelSource, resolve

T = TypeVar("T")


class Lifecycle:
    """Steps are launched unless the engine is paused, asleep or without weights; nothing is done after a failure or its end.

    Args:
        executor: sleeps, and holds the weights.
        drain: finishes the steps under way and sends every running request back to wait, so that nothing counts on the KV cache.
        exchange: rests while the engine sleeps or gets new weights.
        model_impl: how names of new weights are read, see `stepgraph.config.ModelConfig`.
    """

    def __init__(self, executor: Executor, drain: Callable[[], None], exchange: Exchange, model_impl: str):
        self.is_paused = False
        self.is_shut_down = False
        self.has_weights = True
        """Whether the model's weights are there, or kept for `wake_up`."""
        self.failure: BaseException | None = None
        self._executor, self._drain, self._exchange, self._model_impl = executor, drain, exchange, model_impl
        self._sleep_level = 0

    @property
    def is_sleeping(self) -> bool:
        """Whether `sleep` was called, and `wake_up` not since."""
        return self._sleep_level > 0

    @property
    def idle_reason(self) -> str | None:
        """Why no step is launched whatever waits, and what ends that; None if steps are launched."""
        if self._sleep_level:
            return "it sleeps; call wake_up()"
        if not self.has_weights:
            return "it has no weights; call update_weights()"
        return "it is paused; call resume()" if self.is_paused else None

    def check_alive(self) -> None:
        """EngineDeadError after a failure, or the end."""
        if self.is_shut_down:
            raise EngineDeadError("the engine was shut down; create another one")
        if self.failure is not None:
            raise EngineDeadError(f"the engine stopped on an earlier error: {self.failure}") from self.failure

    def noting_failure(self, call: Callable[[], T]) -> T:
        """What fails in `call` leaves requests and the device in a state nobody knows: the engine ends."""
        try:
            return call()
        except BaseException as error:
            self.failure = error
            if not isinstance(error, Exception):
                raise
            if isinstance(error, StepgraphError) and not isinstance(error, DeviceMemoryError):
                raise
            raise EngineDeadError(f"the engine stopped on an error: {error}") from error

    def stop_running(self) -> None:
        """Have the steps under way finished, and every running request wait. A failure ends the engine."""
        self.noting_failure(self._drain)

    def sleep(self, level: int) -> None:
        """Give memory of the device back until `wake_up`, and launch no steps meanwhile. Captured graphs stay.

        Requests are kept: those that run are computed again after `wake_up` from the tokens known by now, and get the answers
        they would have got. What they got up to now is delivered by the next call of `step`.

        Args:
            level: 1 drops the KV cache and keeps the weights in host memory; 2 drops the weights too, and after `wake_up` no
                step is launched before `update_weights`. From level 1, the engine can be sent to 2. What is small stays on the
                device: graphs, buffers of steps, LoRA adapters.

        Raises:
            ConfigError: another level, `enable_sleep_mode` is off on a GPU, or another engine may still write into the cache.
        """
        self.check_alive()
        if level not in (1, 2):
            raise ConfigError(
                f"sleep level {level!r} is unknown; use 1 to keep the weights in host memory, 2 to drop them"
            )
        if not self._executor.specs.can_sleep:
            raise ConfigError(
                "sleep() needs memory that can be given back; start the engine with enable_sleep_mode=True"
            )
        self.stop_running()
        self._exchange.rest()
        self._executor.sleep(keep_weights=level == 1 and self.has_weights)
        self._sleep_level = max(self._sleep_level, level)
        self.has_weights = self.has_weights and level == 1

    def wake_up(self) -> None:
        """Take the memory back that `sleep` gave up, and go on with the requests.

        Raises:
            ConfigError: others use the memory now; the engine sleeps on, and this can be called again.
        """
        self.check_alive()
        if self._sleep_level:
            self._executor.wake()
            self._sleep_level = 0
            if self.has_weights:
                self._exchange.go_on()

    def update_weights(self, weights: str | Path | ModelSource | Iterable[tuple[str, Tensor]]) -> None:
        """Replace the model's weights; captured graphs stay. Requests that run go on, with the new weights from here on. Draft
        modules keep theirs, which are read again from where they came from.

        Args:
            weights: a checkpoint of the same model, named as the setting `model`, or all of its tensors under their names in
                transformers' checkpoints.

        Raises:
            ModelError: the weights do not fit the model, or cannot be read. If that shows only while they are written, no
                step is launched before another call has succeeded.
            ConfigError: the engine sleeps, or another engine may still write into the cache.
        """
        self.check_alive()
        if self._sleep_level:
            raise ConfigError("weights cannot be updated while the engine sleeps; call wake_up() first")
        if isinstance(weights, str | Path):
            weights = resolve(str(weights), model_impl=self._model_impl)
        self._executor.check_weights(weights)
        self.stop_running()
        self._exchange.rest()
        self.has_weights = False
        self._executor.write_weights()
        self.has_weights = True
        self._exchange.go_on_with(weights)
