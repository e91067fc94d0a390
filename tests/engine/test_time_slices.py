from stepgraph.engine.time_slices import SLICE_SECONDS, TimeSlices


class Crew:
    """Workers by name, and what was done with them."""

    def __init__(self, limit: int):
        self.log: list[str] = []
        self.refuses: set[str] = set()
        self.slices = TimeSlices[str](limit, start=self.start, pause=self.note("pause"), slow=self.note("slow"))

    def start(self, worker: str) -> bool:
        if worker in self.refuses:
            return False
        self.log.append(f"start {worker}")
        return True

    def note(self, what: str):
        return lambda worker: self.log.append(f"{what} {worker}")

    def turn(self, now: float) -> list[str]:
        self.log.clear()
        self.slices.turn(now)
        return list(self.log)


def test_those_in_line_start_in_their_order_as_places_get_free() -> None:
    crew = Crew(2)
    for worker in "abc":
        crew.slices.enter(worker)
    assert crew.turn(0.0) == ["start a", "start b"]
    assert crew.turn(0.01) == []
    crew.slices.leave("a")
    assert crew.turn(0.02) == ["start c"]
    assert len(crew.slices) == 2


def test_after_a_shift_one_that_has_worked_less_takes_over() -> None:
    crew = Crew(1)
    crew.slices.enter("slow")
    crew.turn(0.0)
    crew.slices.enter("quick")
    assert crew.turn(SLICE_SECONDS / 2) == []
    assert crew.turn(SLICE_SECONDS * 1.1) == ["slow slow", "start quick", "pause slow"]
    crew.slices.leave("quick")
    assert crew.turn(SLICE_SECONDS * 1.2) == ["start slow"]
    assert crew.turn(SLICE_SECONDS * 9) == []  # nobody waits


def test_slow_ones_take_turns() -> None:
    crew = Crew(1)
    for worker in "ab":
        crew.slices.enter(worker)
    started = [line for i in range(40) for line in crew.turn(i * SLICE_SECONDS * 0.6) if line.startswith("start")]
    assert started[:4] == ["start a", "start b", "start a", "start b"]


def test_what_was_worked_for_a_part_that_is_done_does_not_count() -> None:
    crew = Crew(1)
    for worker in "ab":
        crew.slices.enter(worker)
    crew.turn(0.0)
    crew.slices.begin_anew("a", SLICE_SECONDS)
    assert crew.turn(SLICE_SECONDS * 1.5) == []


def test_one_that_cannot_start_keeps_its_place_in_line_and_holds_up_nobody() -> None:
    crew = Crew(1)
    crew.refuses.add("a")
    for worker in "abc":
        crew.slices.enter(worker)
    assert crew.turn(0.0) == ["start b"]
    assert crew.turn(SLICE_SECONDS * 1.1) == ["slow b", "start c", "pause b"]
    crew.slices.leave("c")
    assert crew.turn(SLICE_SECONDS * 1.2) == ["start b"]
    crew.slices.leave("b")
    crew.refuses.clear()
    assert crew.turn(SLICE_SECONDS * 1.3) == ["start a"]
