"""`kill -9` of one of two engines while blocks go from one to the other.

`scripts/kill_transfers.py` makes more such trials.
"""

import pytest
from engine_processes import EngineProcesses
from kills import Killing

NUM_TRIALS = 10


@pytest.fixture(scope="module")
def processes():
    made = EngineProcesses()
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.skipif("sys.platform != 'linux'", reason="engines give their memory to others on Linux alone")
@pytest.mark.parametrize("killed", ["source", "sink"])
def test_the_other_engine_answers_right_and_keeps_nothing(killed, processes, tiny_model) -> None:
    killing = Killing(processes, tiny_model, killed)
    trials = [killing(number) for number in range(NUM_TRIALS)]
    killing.close()
    assert [trial for trial in trials if trial.wrong or trial.leaked] == []
    assert sum(sum(trial.failures.values()) for trial in trials) > 0, "nobody was killed in between"
