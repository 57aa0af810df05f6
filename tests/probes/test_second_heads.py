"""Second heads: what sets them apart from the first, that a result does not depend on its batch, and how they are asked for."""

from __future__ import annotations

import builtins

import pytest
import torch

from superb_probe.downstreams.base import Batch, Budget
from superb_probe.downstreams.load import load_task
from superb_probe.errors import RequestError
from superb_probe.probes import second_heads
from superb_probe.probes.heads import UtteranceLinear
from superb_probe.probes.second_heads import EcapaTdnn, UtteranceMlp
from superb_probe.upstreams.torchaudio_stub import install_torchaudio_stub

CLASSES = {"answer": ("no", "yes")}
CORNERS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])[:, None]  # means (B, 1, D)
EXCLUSIVE = torch.tensor([0, 1, 1, 0])


def accuracy(kind: type[UtteranceLinear]) -> float:
    """Of a head trained on "exclusive or" of two features, which no linear head can answer."""
    torch.manual_seed(0)
    head = kind(2, CLASSES, width=16)
    ones = torch.ones(4, dtype=torch.long)
    batch = Batch(tuple("abcd"), ones, {"answer": EXCLUSIVE})
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(150):
        loss = head.loss(head(CORNERS, ones), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    answers = [CLASSES["answer"].index(each["answer"]) for each in head.predict(head(CORNERS, ones))]
    return float((torch.tensor(answers) == EXCLUSIVE).float().mean())


def test_the_mlp_answers_what_no_linear_head_can():
    assert accuracy(UtteranceMlp) == 1.0
    assert accuracy(UtteranceLinear) < 1.0


def test_the_mlp_reads_the_mean_and_has_one_hidden_layer():
    torch.manual_seed(0)
    head = UtteranceMlp(3, CLASSES, width=5)
    frames, num_frames = torch.randn(2, 4, 3), torch.tensor([4, 2])
    means = torch.stack([frames[0].mean(0), frames[1, :2].mean(0)])[:, None]
    assert torch.allclose(head(frames, num_frames), head(means, torch.ones(2, dtype=torch.long)), atol=1e-6)
    by_hand = torch.relu(means[:, 0] @ head.projector.weight.T + head.projector.bias) @ head.linear.weight.T
    assert torch.allclose(head(frames, num_frames), by_hand + head.linear.bias, atol=1e-6)


def test_the_options_of_another_head_are_its_own():
    budget = Budget(1, 1, 1, 1, head={"width": 9, "margin": 0.1}, second_heads={"mlp": {"width": 7}})
    assert budget.for_head("mlp").head == {"head": "mlp", "width": 7}
    assert budget.for_head("other").head == {"head": "other"} and budget.head == {"width": 9, "margin": 0.1}


@pytest.mark.parametrize("name", ["ks", "sid", "er", "ic"])
def test_pooled_tasks_build_the_head_that_is_asked_for(name):
    task = load_task(name)
    column = task.info.label_columns[0].replace("*", "a")
    labels = type("Labels", (), {"classes": {column: ("a", "b")}})()
    assert type(task.head(4, labels)) is UtteranceLinear and type(task.head(4, labels, {"head": "mlp"})) is UtteranceMlp
    assert task.head(4, labels, {"head": "mlp", "width": 6}).projector.out_features == 6
    assert task.head(4, labels).projector.out_features == 256, "SUPERB's"
    with pytest.raises(RequestError, match="has no head 'ecapa'. Fix: --head with one of utterance_linear, mlp"):
        task.head(4, labels, {"head": "ecapa"})


def test_ecapa_without_speechbrain_says_what_to_install(monkeypatch):
    def absent(name, *rest, **named):
        if name.startswith("speechbrain"):
            raise ImportError(f"No module named {name!r}")
        return builtins.__import__(name, *rest, **named)

    monkeypatch.setattr(second_heads.importlib, "import_module", absent)
    with pytest.raises(RequestError, match=r"pip install 'superb-probe\[speechbrain\]'"):
        EcapaTdnn(4, 3)


@pytest.fixture
def ecapa() -> EcapaTdnn:
    install_torchaudio_stub()
    pytest.importorskip("speechbrain.lobes.models.ECAPA_TDNN")
    torch.manual_seed(0)
    return EcapaTdnn(6, 3, width=16, attention=8)


def test_an_embedding_does_not_depend_on_its_batch(ecapa):
    frames = torch.randn(2, 40, 6)
    frames[1, 25:] = 0.0
    ecapa.eval()
    together = ecapa(frames, torch.tensor([40, 25])).embedding
    alone = ecapa(frames[1:, :25], torch.tensor([25])).embedding
    assert together.shape == (2, 192) and torch.allclose(together[1], alone[0], atol=1e-6)
    assert torch.allclose(together.norm(dim=1), torch.ones(2))
    padded = ecapa.network(frames, torch.tensor([1.0, 25 / 40]))[:, 0]  # what a padded batch gives: not the same
    assert not torch.allclose(torch.nn.functional.normalize(padded, dim=1)[1], alone[0], atol=1e-3)


def test_it_learns_speakers_with_the_x_vectors_objective(ecapa):
    torch.manual_seed(1)
    speakers = torch.tensor([0, 1, 2, 0, 1, 2])
    frames = torch.randn(6, 30, 6) + 2 * torch.randn(3, 6)[speakers][:, None]
    num_frames = torch.full((6,), 30)
    batch = Batch(tuple("abcdef"), num_frames, {"speaker": speakers})
    assert ecapa.objective.shape == (192, 3) and ecapa.margin == 0.4 and ecapa.scale == 30.0
    optimizer = torch.optim.Adam(ecapa.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        loss = ecapa.loss(ecapa(frames, num_frames), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_utterances_and_widths_that_it_cannot_take_are_refused(ecapa):
    ecapa.eval()
    assert ecapa(torch.randn(1, 5, 6), torch.tensor([5])).embedding.isfinite().all()
    with pytest.raises(RequestError, match="an utterance of 4 frames; the head needs 5"):
        ecapa(torch.randn(2, 9, 6), torch.tensor([9, 4]))
    with pytest.raises(RequestError, match="a multiple of 8"):
        EcapaTdnn(4, 3, width=12)
    with pytest.raises(RequestError, match="at least two"):
        EcapaTdnn(4, 1)
