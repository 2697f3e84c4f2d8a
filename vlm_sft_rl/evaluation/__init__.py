"""From samples to numbers: metrics, bootstrap intervals, the runner, comparisons and reports.

Import from the modules: `bootstrap`, `specs`, `runner`, `compare`, `sweep`, `report`, `plots`, `metrics`. Nothing is
imported here, so that `from vlm_sft_rl.evaluation.bootstrap import bootstrap` stays free of torch.
"""
