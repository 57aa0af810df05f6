"""The fixed command: python run_superb.py --upstream mamba_hubert_causal --task asv (the same as `superb-probe run`)."""

import sys

try:
    from superb_probe.cli import main
except ModuleNotFoundError as error:
    if error.name != "superb_probe":
        raise
    sys.exit("superb_probe is not installed. Fix: run `pip install -e .` here once.")

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
