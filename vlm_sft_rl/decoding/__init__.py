"""Decoding: retrospective resampling on rewindable key/value caches (REVERSE, arXiv 2504.13169), and baselines."""

from importlib import import_module

_HOME = {
    "Answer": "answers",
    "CorrectionConfig": "config",
    "Counts": "answers",
    "DoLaConfig": "config",
    "OperaConfig": "config",
    "RetrospectiveConfig": "config",
    "SamplingConfig": "config",
    "SearchConfig": "config",
    "SpanRecord": "answers",
    "VCDConfig": "config",
    "generate_dola": "contrastive",
    "generate_corrected": "correct",
    "generate_opera": "opera",
    "generate_plain": "generate",
    "generate_retrospective": "generate",
    "generate_vcd": "contrastive",
    "generate_by": "candidates",
    "generate_searched": "candidates",
    "retrospective_custom_generate": "generate",
    "sample_distinct": "generate",
    "sample_many": "generate",
    "write_trace_html": "trace",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
