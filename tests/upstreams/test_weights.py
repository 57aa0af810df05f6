"""The weights that ship: whole, small, known, what a name is without a checkpoint, and trained as the packaged recipe says."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from superb_probe.downstreams.mini import mini_root
from superb_probe.errors import RequestError
from superb_probe.results.overlap import training_overlap
from superb_probe.upstreams.checkpoints import read_checkpoint
from superb_probe.upstreams.hubert import HubertEncoder
from superb_probe.upstreams.hubert_upstream import WEIGHTS
from superb_probe.upstreams.load import load_upstream
from superb_probe.upstreams.pretrain_model import HubertPretraining
from superb_probe.upstreams.pretrain_recipe import read_recipe

NAMES = ("mamba_hubert", "mamba_hubert_causal", "transformer_hubert", "transformer_hubert_causal")
FILES = (*NAMES, *(f"{name}-published-front-end" for name in NAMES if name.endswith("causal")))


def facts(stem: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((WEIGHTS / f"{stem}.json").read_text(encoding="utf-8"))
    return found


def test_six_and_a_recogniser_ship_and_nothing_else() -> None:
    recogniser = WEIGHTS / "recogniser"
    names = {"encoder.safetensors", "encoder.json", "head.safetensors", "finetuned.json", "README.md"}
    assert {path.name for path in recogniser.iterdir()} == names
    assert sum(path.stat().st_size for path in recogniser.iterdir()) <= 4_000_000
    assert {path.name for path in WEIGHTS.iterdir()} - {recogniser.name} == {
        f"{stem}{ending}" for stem in FILES for ending in (".safetensors", ".json", ".md")
    }


@pytest.mark.parametrize("stem", FILES)
def test_each_is_whole_small_and_known(stem: str) -> None:
    path = WEIGHTS / f"{stem}.safetensors"
    assert path.stat().st_size <= 4_000_000
    assert hashlib.sha256(path.read_bytes()).hexdigest() == facts(stem)["weights_sha256"]
    checkpoint = read_checkpoint(path)
    assert all(tensor.isfinite().all() for tensor in checkpoint.tensors.values())
    assert HubertEncoder(checkpoint.config).parameter_counts()["encoder"] <= 2_000_000
    assert checkpoint.license == "Apache-2.0" and training_overlap(checkpoint.trained_on, "mini", "asr").kind == "train"
    metadata = facts(stem)["metadata"]
    assert metadata["recipe_digest"] == read_recipe("tiny").digest
    assert {metadata[name] for name in ("clips_digest", "exclusion_digest")} == {
        facts(FILES[0])["metadata"][name] for name in ("clips_digest", "exclusion_digest")
    }
    card = (WEIGHTS / f"{stem}.md").read_text(encoding="utf-8")
    assert metadata["command"] in card and checkpoint.revision in card


def test_a_changed_weight_is_found(tmp_path: Path) -> None:
    for ending in (".safetensors", ".json"):
        shutil.copy(WEIGHTS / f"{NAMES[0]}{ending}", tmp_path)
    path = tmp_path / f"{NAMES[0]}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RequestError):
        read_checkpoint(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_its_trained_encoder(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upstream = load_upstream(name)
    assert upstream.info.revision == read_checkpoint(WEIGHTS / f"{name}.safetensors").revision
    assert upstream.info.lookahead_samples == (0 if name.endswith("causal") else None)
    sentence = min((mini_root() / "audio" / "read").rglob("*.opus"))
    wav = torch.from_numpy(soundfile.read(sentence, dtype="float32")[0])[None, :48000]
    lengths = torch.tensor([wav.shape[1]])
    with torch.inference_mode():
        states = upstream(wav, lengths).states
        random = load_upstream(name, random=0)(wav, lengths).states
    assert states.isfinite().all() and states.shape == random.shape
    # the trained head knows units: with its encoder's states it is sure of them, on random states it is not
    sure, unsure = sureness(upstream, states[-1]), sureness(upstream, random[-1])
    assert sure > 2 * unsure, (sure, unsure)


def sureness(upstream: Any, states: torch.Tensor) -> float:
    """The mean probability of the likeliest unit, by the pre-training head of an encoder."""
    head = HubertPretraining(upstream.encoder, read_recipe("tiny"))
    with torch.inference_mode():
        return float(head.logits(states).softmax(-1).amax(-1).mean())
