import pytest
import serving


@pytest.mark.slow
def test_a_small_run_asks_everything_twice():
    result = serving.run(clients=4, requests=8, repeats=1)
    assert result["ratios"]["one_over_many"] > 0 and set(result["seconds"]) == {"one", "many"}
