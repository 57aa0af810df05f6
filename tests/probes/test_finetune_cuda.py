"""Fine-tuning on a GPU: the updates of a CPU in float32, and finite ones near them in bfloat16, with recomputed activations too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from superb_probe.downstreams.manifest import Utterance
from superb_probe.probes.finetune import FinetuneRecipe, Finetuning
from superb_probe.probes.finetune_data import Passage
from superb_probe.probes.finetune_heads import make_head
from superb_probe.probes.finetune_model import FinetuneModel, Regularisation
from superb_probe.upstreams.hubert_upstream import HubertUpstream
from superb_probe.upstreams.load import load_upstream

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
TOKENS = ("<s>", "|", "A", "B", "</s>")


@pytest.fixture
def rows(tmp_path: Path) -> list[Passage]:
    found = []
    for number in range(3):
        samples = 0.1 * np.random.default_rng(number).standard_normal(16_000 + 4000 * number)
        soundfile.write(tmp_path / f"{number}.wav", samples.astype(np.float32), 16_000)
        part = Utterance(f"u{number}", f"{number}.wav", 0.0, len(samples) / 16_000, {})
        found.append(Passage(f"p{number}", (part,), tmp_path, "A B", "x"))
    return found


def losses(name: str, rows: list[Passage], device: str, precision: str, recompute: bool) -> list[float]:
    upstream = load_upstream(name, size="test", random=0)
    assert isinstance(upstream, HubertUpstream)
    torch.manual_seed(0)
    head = make_head("conv", 48, TOKENS, width=16, num_layers=2)
    head.dropout.p = 0.0  # type: ignore[union-attr, assignment]
    model = FinetuneModel(upstream.encoder, head, Regularisation(0.0, 0.0, recompute), None)
    recipe = FinetuneRecipe(steps=6, batch=3, lr=1e-3, frozen_share=0.2, precision=precision)
    targets = [torch.tensor([2, 1, 3, 1, 4])] * 3
    return [update.loss for update in Finetuning(model, rows, targets, recipe, torch.device(device)).run(6)]


@pytest.mark.parametrize(
    "name", ["mamba_hubert", "mamba_hubert_causal", "transformer_hubert", "transformer_hubert_causal"]
)
@pytest.mark.parametrize("recompute", [False, True])
def test_losses_are_those_of_a_cpu(name: str, recompute: bool, rows: list[Passage]) -> None:
    expected = losses(name, rows, "cpu", "float32", False)
    assert losses(name, rows, "cuda", "float32", recompute) == pytest.approx(expected, rel=1e-3)
    assert losses(name, rows, "cuda", "bfloat16", recompute) == pytest.approx(expected, rel=5e-2)
