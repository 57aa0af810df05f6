"""Fine-tuning: what is trained and when, the same curve after a stop, the same gradients with recomputed activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from superb_probe.downstreams.manifest import Utterance
from superb_probe.errors import CheckError, RequestError
from superb_probe.probes.ctc import BlstmCtc, FrameCtc
from superb_probe.probes.finetune import FinetuneRecipe, Finetuning, evaluations, parts, transcribe
from superb_probe.probes.finetune_data import Passage
from superb_probe.probes.finetune_heads import HEADS, ConvCtc, LstmCtc, make_head
from superb_probe.probes.finetune_model import FinetuneModel, Regularisation, encode
from superb_probe.probes.specaugment import SpecAugment
from superb_probe.upstreams.hubert_upstream import HubertUpstream
from superb_probe.upstreams.load import load_upstream
from superb_probe.upstreams.sizes import FAMILIES

TOKENS = ("<s>", "|", "A", "B", "</s>")
CPU = torch.device("cpu")
FRONT = "feature_extractor."
IDLE = ("mask_emb", "final_proj.", "label_embs_concat")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Passage], list[Tensor]]:
    """Six passages of noise of 0.3 to 0.8 s, the first of two stretches."""
    folder, generator = tmp_path_factory.mktemp("audio"), np.random.default_rng(0)
    found, targets = [], []
    for number in range(6):
        samples = 0.1 * generator.standard_normal(4800 + 1600 * number)
        soundfile.write(folder / f"{number}.wav", samples.astype(np.float32), 16_000)
        length = len(samples) / 16_000
        cut = [(0.0, 0.1), (0.1, round(length - 0.1, 6))] if number == 0 else [(0.0, length)]
        rows = tuple(Utterance(f"u{number}-{start}", f"{number}.wav", start, duration, {}) for start, duration in cut)
        found.append(Passage(f"p{number}", rows, folder, "A B", "x"))
        targets.append(torch.tensor([2, 1, 3, 1, 4]))
    return found, targets


def encoder_of(name: str = "mamba_hubert_causal") -> Any:
    upstream = load_upstream(name, size="test", random=0)
    assert isinstance(upstream, HubertUpstream)
    return upstream.encoder


def model_of(
    name: str = "mamba_hubert_causal", *, how: Regularisation | None = None, augment: bool = True
) -> FinetuneModel:
    torch.manual_seed(0)
    masks = SpecAugment(torch.Generator(), dim_mask_width=8, time_mask_frames=4) if augment else None
    head = make_head("lstm", 48, TOKENS, width=8, drop=("</s>",))
    return FinetuneModel(encoder_of(name), head, how or Regularisation(), masks)


def training(corpus: Any, model: FinetuneModel | None = None, **changes: Any) -> Finetuning:
    recipe = FinetuneRecipe(**{"steps": 10, "batch": 4, "lr": 1e-3, "frozen_share": 0.3, **changes})
    return Finetuning(model or model_of(), *corpus, recipe, CPU)


def weights(run: Finetuning) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in run.model.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def check_who_moves(run: Finetuning) -> None:
    """The head from the start; the encoder from the end of the frozen share on, its front end never."""
    start = weights(run)
    list(run.run(3))
    frozen = moved(start, weights(run))
    assert frozen == {name for name in start if name.startswith("head.")}
    middle = weights(run)
    list(run.run(6))
    free = moved(middle, weights(run))
    skipped = tuple(f"encoder.{prefix}" for prefix in (FRONT, *IDLE))
    assert free == {name for name in start if not name.startswith(skipped)}


def test_the_encoder_moves_when_it_should_and_not_before(corpus: Any) -> None:
    check_who_moves(training(corpus, model_of(how=Regularisation(layer_drop=0.0))))


@pytest.mark.parametrize("frozen_share", [0.0, 1.0])  # never frozen; frozen throughout, as the released code is
def test_an_encoder_that_moves_too_early_or_never_is_seen(frozen_share: float, corpus: Any) -> None:
    with pytest.raises(AssertionError):
        check_who_moves(training(corpus, model_of(how=Regularisation(layer_drop=0.0)), frozen_share=frozen_share))


def test_a_front_end_that_is_trained_is_seen(corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FinetuneModel, "unfreeze", lambda self: self.encoder.requires_grad_(True))
    with pytest.raises(AssertionError):
        check_who_moves(training(corpus, model_of(how=Regularisation(layer_drop=0.0))))


def resumed_difference(corpus: Any, path: Path, precision: str, forget: Callable[[Finetuning], None]) -> float:
    """Largest difference of weights between a run of 8 updates and one that stopped after 5 and went on."""
    whole = training(corpus, precision=precision)
    list(whole.run(8))
    first = training(corpus, precision=precision)
    list(first.run(5))
    first.save(path, {"best": 1.0})
    torch.manual_seed(99)
    second = training(corpus, precision=precision)
    assert second.load(path) == {"best": 1.0}
    forget(second)
    list(second.run(8))
    assert second.step == 8
    ours, theirs = {**whole.encoder_weights(), **weights(whole)}, {**second.encoder_weights(), **weights(second)}
    return max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in ours)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_run(precision: str, corpus: Any, tmp_path: Path) -> None:
    assert resumed_difference(corpus, tmp_path / "c.pt", precision, lambda run: None) == 0.0


def test_a_forgotten_optimiser_or_order_is_seen(corpus: Any, tmp_path: Path) -> None:
    def optimiser(run: Finetuning) -> None:
        run._optimizer.state.clear()

    def order(run: Finetuning) -> None:
        run._rows = run._batches(0)

    for forget in (optimiser, order):
        assert resumed_difference(corpus, tmp_path / "c.pt", "float32", forget) > 0.0


def test_another_models_checkpoint_is_refused(corpus: Any, tmp_path: Path) -> None:
    training(corpus).save(tmp_path / "c.pt", {})
    with pytest.raises(RequestError, match="another encoder or head"):
        training(corpus, model_of("transformer_hubert")).load(tmp_path / "c.pt")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_training_forward_is_the_encoders_own_without_dropout(name: str) -> None:
    upstream = load_upstream(name, size="test", random=0)
    assert isinstance(upstream, HubertUpstream)
    wavs, lengths = 0.1 * torch.randn(2, 9000, generator=torch.Generator().manual_seed(0)), torch.tensor([9000, 5001])
    with torch.no_grad():
        expected = upstream(wavs.masked_fill(torch.arange(9000) >= lengths[:, None], 0), lengths)
        states, num_frames = encode(upstream.encoder, wavs, lengths, Regularisation())
        assert torch.equal(num_frames, expected.num_frames)
        torch.testing.assert_close(states, expected.states[-1])
        upstream.encoder.train()
        disturbed, _ = encode(upstream.encoder, wavs, lengths, Regularisation(dropout=0.3))
        dropped, _ = encode(upstream.encoder, wavs, lengths, Regularisation(dropout=0.0, layer_drop=0.99))
    assert (disturbed - states).abs().max() > 0.01
    assert (dropped - states).abs().max() > 0.01


def gradients(how: Regularisation, name: str) -> dict[str, Tensor]:
    model = model_of(name, how=how, augment=False).train()
    model.unfreeze()
    torch.manual_seed(3)
    wavs = 0.1 * torch.randn(2, 6000, generator=torch.Generator().manual_seed(0))
    model(wavs, torch.tensor([6000, 4000])).logits.square().mean().backward()
    return {key: each.grad.clone() for key, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("name", ["mamba_hubert", "transformer_hubert_causal"])
def test_recomputed_activations_give_the_same_gradients(name: str) -> None:
    kept = gradients(Regularisation(dropout=0.2, layer_drop=0.3), name)
    again = gradients(Regularisation(dropout=0.2, layer_drop=0.3, recompute=True), name)
    assert kept.keys() == again.keys()
    for key, each in kept.items():
        torch.testing.assert_close(again[key], each)
    other = gradients(Regularisation(dropout=0.0, layer_drop=0.3, recompute=True), name)
    assert any(not torch.allclose(other[key], each) for key, each in kept.items())


def test_parts_of_a_batch_sum_to_the_batch(corpus: Any) -> None:
    """Memory is bounded by parts; the update is the same, whatever they are."""

    def after(part_s: float) -> dict[str, Tensor]:
        model = model_of(how=Regularisation(dropout=0.0, layer_drop=0.0), augment=False)
        model.head.dropout.p = 0.0  # type: ignore[union-attr, assignment]
        run = training(corpus, model, frozen_share=0.0, part_s=part_s)
        list(run.run(1))
        return {name: each.grad for name, each in run._masters.items() if each.grad is not None}

    whole, split = after(100.0), after(0.5)
    for name, each in whole.items():
        torch.testing.assert_close(split[name], each, rtol=1e-3, atol=1e-6)


def test_rows_are_parted_by_seconds_with_padding() -> None:
    assert parts([16_000] * 5, 2.0) == [[0, 1], [2, 3], [4]]
    assert parts([80_000, 16_000], 2.0) == [[1], [0]]


def test_bfloat16_updates_small_steps_too(corpus: Any) -> None:
    """Steps of 1e-5 of a weight vanish in bfloat16; the float32 masters keep them."""
    run = training(
        corpus, model_of(how=Regularisation(layer_drop=0.0)), precision="bfloat16", frozen_share=0.0, lr=1e-6
    )
    before = run.encoder_weights()
    list(run.run(2))
    kind = {each.dtype for name, each in run.model.encoder.named_parameters() if name.endswith("in_proj.weight")}
    assert kind == {torch.bfloat16}
    assert {each.dtype for each in run.encoder_weights().values()} == {torch.float32}
    name = "encoder.layers.0.mamba.in_proj.weight"
    assert not torch.equal(run.encoder_weights()[name], before[name])


def test_a_loss_that_is_not_finite_stops_it(corpus: Any) -> None:
    run = training(corpus, frozen_share=0.0)
    with torch.no_grad():
        run.model.head.linear.bias.fill_(math.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(CheckError, match="update 1: loss nan"):
        list(run.run(1))


def test_the_loss_falls(corpus: Any) -> None:
    run = training(corpus, model_of(augment=False), steps=40, lr=1e-2)
    losses = [update.loss for update in run.run(40)]
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    said = transcribe(run.model, corpus[0], 10.0, CPU)
    assert len(said) == 6 and run.model.training


def test_the_schedule() -> None:
    recipe = FinetuneRecipe(steps=100, lr=1.0)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[9] == rates[49] == 1.0 and max(rates) == 1.0
    assert rates[0] == pytest.approx(0.1) and rates[-1] == pytest.approx(0.02) and recipe.frozen_steps == 10
    assert evaluations(FinetuneRecipe(steps=400, evaluate_every=200)) == [200, 400]


def test_wrong_recipes() -> None:
    with pytest.raises(RequestError, match=r"steps is 0; lr is -1; warmup_share and hold_share"):
        FinetuneRecipe(steps=0, lr=-1, warmup_share=0.9)
    with pytest.raises(RequestError, match="bfloat16"):
        FinetuneRecipe(precision="half")
    with pytest.raises(RequestError, match="layer_drop is 1"):
        Regularisation(layer_drop=1.0)


@pytest.mark.parametrize("name", HEADS)
def test_heads_do_not_read_padding(name: str) -> None:
    torch.manual_seed(0)
    head = make_head(name, 6, TOKENS, width=8, drop=("</s>",)).eval()
    frames = torch.randn(2, 30, 6)
    frames[1, 20:] = 0.0
    with torch.no_grad():
        both = head(frames, torch.tensor([30, 20])).logits
        alone = head(frames[1:, :20], torch.tensor([20])).logits
    torch.testing.assert_close(both[1, :20], alone[0], rtol=1e-5, atol=1e-6)


def test_which_heads_see_the_future() -> None:
    torch.manual_seed(0)
    frames, changed = torch.randn(1, 60, 6, dtype=torch.float64), torch.randn(1, 60, 6, dtype=torch.float64)
    changed[:, :30] = frames[:, :30]
    reach = {}
    for name in HEADS:
        head = make_head(name, 6, TOKENS, width=8).eval().double()
        with torch.no_grad():
            first, second = (head(each, torch.tensor([60])).logits[0] for each in (frames, changed))
        differs = ((first - second).abs().amax(1) > 1e-15).nonzero()
        reach[name] = 30 - int(differs[0])
    assert reach == {"lstm": 0, "linear": 0, "conv": 24, "blstm": 30}  # 12 layers of two frames; the whole


def test_heads_by_name() -> None:
    kinds = {"lstm": LstmCtc, "blstm": BlstmCtc, "conv": ConvCtc, "linear": FrameCtc}
    assert {name: type(make_head(name, 6, TOKENS)) for name in HEADS} == kinds
    assert len(make_head("conv", 6, TOKENS, num_layers=3).convs) == 3  # type: ignore[arg-type]
    for wrong, what in ((("gru",), "lstm, blstm, conv, linear"), (("linear", 2), "no layers")):
        with pytest.raises(RequestError, match=what):
            make_head(wrong[0], 6, TOKENS, num_layers=wrong[1] if len(wrong) > 1 else None)
    with pytest.raises(RequestError, match="even"):
        ConvCtc(6, TOKENS, kernel=4)
