"""What was found: records, leaderboard, plots, reference numbers."""

if __name__ == "results":
    raise ImportError("import superb_probe.results (run `pip install -e .` once)")
