"""How it is measured: weighted sum, heads, feature store, fit, metrics, statistics."""

if __name__ == "probes":
    raise ImportError("import superb_probe.probes (run `pip install -e .` once)")
