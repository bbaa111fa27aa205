"""Two real processes train together and save; one is killed, both start again and go on bit for bit."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
multihost = pytest.importorskip("multihost", reason="the examples are not here")
pytest.importorskip("orbax.checkpoint")

EVERYONE = range(multihost.PROCESSES)


def assert_resumed(before, after, last):
    """From a step that was saved before the kill, in every process, to the end."""
    resumed = min(step for _, step in after)
    assert 1 < resumed <= multihost.LAST and (resumed - 1) % multihost.EVERY == 0
    assert set(after) == {(i, step) for i in EVERYONE for step in range(resumed, multihost.STEPS + 1)}
    assert all(line.startswith(f"from {resumed - 1} ") for line in last)
    assert max(step for _, step in before) < multihost.STEPS


def test_steps_done_again_after_a_kill_are_bit_equal(tmp_path):
    before, _ = multihost.launch(tmp_path, kill_after=multihost.LAST)
    after, last = multihost.launch(tmp_path)
    assert_resumed(before, after, last)
    again = set(before) & set(after)
    assert {i for i, _ in again} == set(EVERYONE)
    assert {at: before[at] for at in again} == {at: after[at] for at in again}
    assert len(set(after.values())) == len(after), "every step and process holds other values"


@pytest.mark.slow
def test_a_killed_run_ends_bit_equal_to_an_undisturbed_one(tmp_path):
    runs = multihost.compare(tmp_path)
    assert_resumed(runs["before"], runs["after"], runs["last"])
    assert set(runs["undisturbed"]) == {(i, step) for i in EVERYONE for step in range(1, multihost.STEPS + 1)}
    for part in ("before", "after"):
        assert runs[part] == {at: runs["undisturbed"][at] for at in runs[part]}
