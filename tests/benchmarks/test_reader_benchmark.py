import pytest
import reader


@pytest.mark.slow
def test_reader_benchmark(tmp_path):
    result = reader.run(20_000, tmp_path)
    assert result["rows"] == 20_000 and result["rows_per_s"] > 1000
    assert result["peak_rss_bytes"] < 1.5e9 and result["peak_rss_warm_bytes"] < 1.5e9
    assert result["first_batch_warm_s"] < result["first_batch_cold_s"]
    assert list(tmp_path.iterdir()) == []
