from sft import run


def test_figures_are_of_the_same_work():
    figures = run(steps=4, batch_size=2, warmup=1, packing_steps=0)
    ratios = figures["ratios"]
    assert ratios["step_time_low"] <= ratios["step_time"] <= ratios["step_time_high"]
    assert 0.3 < ratios["step_cpu_time"] < 3  # a sane figure; its size is for a quiet machine to tell
    assert figures["max_loss_difference"] == 0
    assert figures["peak_bytes"]["trl"] > 1e6 and ratios["peak_memory"] <= 1.03
