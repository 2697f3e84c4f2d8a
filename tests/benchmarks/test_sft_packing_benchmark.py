from sft_packing import compare, make_rows


def test_figures_are_of_the_same_rows():
    rows = make_rows([3, 4, 5, 6], each=2, side=4, seed=0)
    assert rows[0]["images"][0].tobytes() == rows[1]["images"][0].tobytes() != rows[2]["images"][0].tobytes()
    figures = compare("image", rows, batch_size=4, side=4, steps=2, seed=0, device="cpu")
    assert (
        figures["loss_difference"] < 1e-5
        and figures["speedup_low"] <= figures["speedup"] <= figures["speedup_high"]
    )
    # 16 image tokens stand twice and not four times
    assert 1.2 < figures["token_ratio"] < 2 and figures["memory_ratio"] > 1
