"""Decoding: retrospective resampling on rewindable key/value caches (REVERSE, arXiv 2504.13169), and baselines."""

from importlib import import_module

_HOME = {
    "Answer": "records",
    "CorrectionConfig": "correct",
    "Counts": "records",
    "OperaConfig": "opera",
    "RetrospectiveConfig": "records",
    "SearchConfig": "search",
    "SpanRecord": "records",
    "generate_dola": "contrastive",
    "generate_corrected": "correct",
    "generate_opera": "opera_hf",
    "generate_plain": "hf",
    "generate_retrospective": "hf",
    "generate_vcd": "contrastive",
    "generate_by": "search_hf",
    "generate_searched": "search_hf",
    "retrospective_custom_generate": "hf",
    "sample_many": "many",
    "write_trace_html": "trace",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
