import pytest
from sctune import PEAKED, _Bench


@pytest.mark.slow
@pytest.mark.parametrize("sharpness", [1.0, PEAKED])
def test_a_timed_step_makes_its_updates_and_asks_for_the_reference(tmp_path, sharpness):
    bench = _Bench(str(tmp_path), 2, 0, "cpu", sharpness=sharpness)
    # the first step makes live and frozen model two networks, as they are in all but the first step of a phase
    for _ in range(2):
        bench.ours()
        bench.released()
    assert bench.trainer._metrics["train"]["describer/updates"] == [2, 2]
    assert not bench.trainer.frozen.equals_live()
