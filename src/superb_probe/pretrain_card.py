"""The model card of pre-trained weights: Markdown made of what the run recorded, and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from superb_probe.upstreams.checkpoints import read_checkpoint
from superb_probe.upstreams.hubert import HubertEncoder


def write_card(weights: Path, evidence: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Path:
    """Write `NAME.md` beside `NAME.safetensors`.

    Args:
        weights: the exported file.
        evidence: of every iteration, as `evidence.json` has it.
        facts: of the clips, as `clips.json` has them.

    Returns:
        The card.
    """
    checkpoint = read_checkpoint(weights)
    counts = HubertEncoder(checkpoint.config).parameter_counts()
    said = checkpoint.metadata
    config = checkpoint.config
    position = "causal" if config.causal_pos_conv else "centred"
    what = f"A {said['description']}, pre-trained as HuBERT (masked prediction of k-means units, {len(evidence)} iterations)"
    shape = (
        f"{config.num_layers} layers of width {config.dim}, {config.layer_type}; front end {config.extractor_mode!r}"
    )
    lines = [f"# {checkpoint.name}", "", f"{what} by superb-probe {said['version']}.", ""]
    lines += [
        "| | |",
        "| --- | --- |",
        f"| Parameters | {counts['encoder']:,} at inference, {counts['total']:,} with the pre-training head |",
        f"| Shape | {shape}, positional convolution {position} |",
        f"| Weights | {weights.stat().st_size / 1e6:.2f} MB, {checkpoint.revision} |",
        f"| Licence of the weights | {checkpoint.license} |",
        f"| Trained on | {facts['hours']:.2f} hours: {_hours(facts)} |",
        f"| Voices | {facts['voices']} |",
        f"| Measured on | {facts['hours_held_out']:.2f} hours of {', '.join(facts['held_out'])}, held out |",
        f"| Kept out | {_counts(facts)} of dev and test splits; list {facts['exclusion_digest']} |",
        f"| Clips | {facts['digest']} |",
        f"| Recipe | {said['recipe']}, {said['recipe_digest']} |",
        f"| Machine | {said['machine']} |",
        "",
        "## Iterations",
        "",
        "| | units | updates | hours heard | time | held-out loss | accuracy at masked frames | always the commonest unit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_iteration(each) for each in evidence),
        "",
    ]
    lines += _purity(evidence[-1].get("layers") or {})
    lines += ["## Command", "", "```", said["command"], "```", ""]
    lines += ["## Limits", "", f"{_limits(facts)}", ""]
    card = weights.with_suffix(".md")
    card.write_text("\n".join(lines), encoding="utf-8")
    return card


def read_evidence(folder: Path) -> list[dict[str, Any]]:
    """The evidence of a run's folder."""
    found = json.loads((folder / "evidence.json").read_text(encoding="utf-8"))
    return [dict(each) for each in found]


def _hours(facts: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name} {hours:.2f} h ({facts['licenses'].get(name, 'unknown')})" for name, hours in facts["corpora"].items()
    )


def _counts(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in facts["exclusion_counts"].items())


def _iteration(found: Mapping[str, Any]) -> str:
    held_out = found["held_out"]
    scores = (
        f"{held_out['entropy']:.3f} | {100 * held_out['accuracy']:.1f} % | {100 * held_out['chance']:.1f} %"
        if held_out
        else "not measured | | "
    )
    skipped = f", {found['skipped']} skipped" if found["skipped"] else ""
    return (
        f"| {found['iteration']} | {found['units']} | {found['steps']:,}{skipped} | {found['audio_hours']:.1f} | "
        f"{found['seconds']:.0f} s | {scores} |"
    )


def _purity(layers: Mapping[str, Any]) -> list[str]:
    if not layers:
        return []
    return [
        f"Phone purity of {layers['clusters']} k-means clusters on held-out speech (one cluster: {layers['chance']:.3f}):",
        "",
        "| MFCC | " + " | ".join(f"layer {number}" for number in range(len(layers["layers"]))) + " |",
        "| --- |" + " --- |" * len(layers["layers"]),
        f"| {layers['mfcc']['phone']:.3f} | " + " | ".join(f"{each['phone']:.3f}" for each in layers["layers"]) + " |",
        "",
    ]


def _limits(facts: Mapping[str, Any]) -> str:
    synthetic = {name for name in facts["corpora"] if name.startswith(("mini", "kokoro", "flite"))}
    hours = sum(facts["corpora"][name] for name in synthetic)
    text = (
        f"{100 * hours / max(1e-9, sum(facts['corpora'].values())):.0f} % of the hours are synthesised speech. "
        if hours
        else ""
    )
    return (
        text
        + "A model of this size on so little speech shows how methods compare; it is no substitute for published encoders."
    )
