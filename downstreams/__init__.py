"""What is asked of the states: tasks, manifests, corpora."""

if __name__ == "downstreams":
    raise ImportError("import superb_probe.downstreams (run `pip install -e .` once)")
