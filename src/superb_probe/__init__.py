"""superb-probe: trustworthy SUPERB scores for any speech encoder.

Names are imported when they are first used, so that `import superb_probe` costs milliseconds.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load_upstream": "superb_probe.upstreams.load",
    "Upstream": "superb_probe.upstreams.base",
    "UpstreamInfo": "superb_probe.upstreams.base",
    "LayerStates": "superb_probe.upstreams.base",
    "selective_scan": "superb_probe.upstreams.scan",
    "Utterance": "superb_probe.downstreams.manifest",
    "Manifest": "superb_probe.downstreams.manifest",
    "Problem": "superb_probe.downstreams.manifest",
    "Task": "superb_probe.downstreams.base",
    "TaskInfo": "superb_probe.downstreams.base",
    "Head": "superb_probe.downstreams.base",
    "load_task": "superb_probe.downstreams.load",
    "FeatureStore": "superb_probe.probes.store",
    "WeightedSum": "superb_probe.probes.weighted_sum",
    "Trial": "superb_probe.probes.plan",
    "run": "superb_probe.engine",
    "RunRecord": "superb_probe.results.record",
    "load_records": "superb_probe.results.frame",
    "load_probe": "superb_probe.verification",
    "verify": "superb_probe.verification",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'superb_probe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
