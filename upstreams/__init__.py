"""What turns audio into layer states."""

if __name__ == "upstreams":
    raise ImportError("import superb_probe.upstreams (run `pip install -e .` once)")
