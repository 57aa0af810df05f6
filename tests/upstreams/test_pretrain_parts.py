"""The parts of pre-training: recipes, masks, the loss and its gradients, k-means, purity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from superb_probe.errors import RequestError
from superb_probe.upstreams import pretrain_targets
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.pretrain_conv import grouped_conv
from superb_probe.upstreams.pretrain_evidence import purity
from superb_probe.upstreams.pretrain_mask import span_mask
from superb_probe.upstreams.pretrain_model import SPECIAL_SYMBOLS, HubertPretraining, lower_precision_, new_encoder
from superb_probe.upstreams.pretrain_recipe import RECIPES, Recipe, read_recipe, recipe_from_dict

KINDS = ("transformer", "mamba", "ext_bi_mamba", "inn_bi_mamba", "mamba2")
CONFIG = HubertConfig(
    conv_layers=((8, 10, 5), *((8, 3, 2),) * 4, *((8, 2, 2),) * 2), dim=16, num_layers=2, num_heads=2, ffn_dim=16, conv_pos=6,
    conv_pos_groups=4, state_dim=4, expand=2, head_dim=8, final_dim=8, num_classes=12, frame_multiple=1,
)  # fmt: skip
RECIPE = Recipe(precision="float32")


def model_of(config: HubertConfig = CONFIG, recipe: Recipe = RECIPE) -> HubertPretraining:
    return HubertPretraining(new_encoder(config, recipe), recipe)


# Recipes


def test_packaged_recipes_are_read_and_the_paper_is_the_default() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} >= {"paper", "tiny", "test"}
    assert read_recipe("paper") == Recipe()
    assert read_recipe("tiny").digest != read_recipe("test").digest


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"learning_rat": 1}, "did you mean learning_rate"),
        ({"seed": "x"}, "seed: expected int"),
        ({"seed": True}, "seed: expected int"),
        ({"clip_lengths_s": [2.0, 1.0]}, "clip_lengths_s: rising"),
        ({"batch_s": 1}, "does not hold a clip"),
        ({"precision": "fp16"}, "precision"),
        ({"iterations": [{"targets": "layer", "clusters": 5, "steps": 1}]}, "an iteration before it"),
        ({"iterations": [{"targets": "mfcc", "steps": 1}]}, "clusters: missing"),
        ({"dropout": 1.0}, "dropout: in [0, 1)"),
        ({"learning_rate": "nan"}, "learning_rate: expected float"),
    ],
)
def test_wrong_recipes_are_refused(found: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError, match=said.replace("[", r"\[").replace("(", r"\(").replace(")", r"\)")):
        recipe_from_dict(found, "here")


def test_every_problem_of_a_recipe_is_said_at_once() -> None:
    with pytest.raises(RequestError, match="2 problems"):
        recipe_from_dict({"a": 1, "seed": "x"}, "here")


# Masks


def test_masks_are_spans_in_equal_numbers() -> None:
    generator = np.random.default_rng(0)
    counts = []
    for _ in range(50):
        mask = span_mask(20, 250, generator)
        assert len(set(mask.sum(1))) == 1
        counts.append(mask.mean())
    assert (
        0.48 < np.mean(counts) < 0.56
    )  # 0.8 x T / 10 spans of 10 with overlaps, as few as the row with the fewest has


def reference_mask(rows: int, frames: int, generator: np.random.Generator) -> np.ndarray:
    """fairseq's way, row by row: draw starts, join spans, drop frames at random down to the smallest row."""
    spans = int(0.8 * frames / 10 + generator.random())
    drawn = []
    for _ in range(rows):
        starts = generator.choice(frames - 10, spans, replace=False)
        drawn.append(np.unique((starts[:, None] + np.arange(10)).ravel()))
    least = min(map(len, drawn))
    mask = np.zeros((rows, frames), bool)
    for row, index in enumerate(drawn):
        mask[row, generator.choice(index, least, replace=False)] = True
    return mask


def test_masks_are_distributed_as_fairseqs() -> None:
    ours, theirs = np.random.default_rng(1), np.random.default_rng(2)
    mine = np.stack([span_mask(8, 100, ours) for _ in range(600)]).mean((0, 1))
    reference = np.stack([reference_mask(8, 100, theirs) for _ in range(600)]).mean((0, 1))
    assert np.abs(mine[:88] - reference[:88]).max() < 0.05  # 4,800 rows: a standard error of 0.007
    assert mine[0] < 0.5 * mine[50]  # the edges are masked less


@pytest.mark.parametrize(("rows", "frames"), [(1, 2), (3, 9), (2, 11), (5, 24)])
def test_short_crops_are_masked_too(rows: int, frames: int) -> None:
    mask = span_mask(rows, frames, np.random.default_rng(0))
    assert mask.shape == (rows, frames) and 0 < mask.sum(1)[0] <= frames


# The loss


def test_the_loss_is_cosine_logits_over_masked_frames_and_the_penalty() -> None:
    recipe = replace(RECIPE, feature_gradient=1.0)
    model = model_of(recipe=recipe).eval()
    wavs, mask = torch.randn(2, 8000) * 0.1, torch.zeros(2, 24, dtype=torch.bool)
    mask[:, 3:9] = True
    targets = torch.randint(0, 8, (2, 24))
    score = model(wavs, mask, targets)
    encoder = model.encoder
    features = encoder.feature_extractor(wavs, [8000, 8000])
    x = encoder.post_extract_proj(encoder.layer_norm(features))
    x[mask] = encoder.mask_emb
    states = encoder.encoder(x, torch.tensor([24, 24]))[-1]
    # As fairseq: the positive against every class, on masked frames only.
    projected = encoder.final_proj(states)[mask]
    logits = torch.cosine_similarity(projected[:, None], encoder.label_embs_concat[None], dim=-1) / 0.1
    entropy = F.cross_entropy(logits, targets[mask] + SPECIAL_SYMBOLS, reduction="sum")
    expected = entropy + 10 * features.square().mean() * 12
    assert torch.allclose(score.loss, expected, rtol=1e-5)
    assert score.sums[2] == 12
    right = (logits.argmax(-1) == targets[mask] + SPECIAL_SYMBOLS).sum()
    assert score.sums[1] == right
    mutant = model(wavs, ~mask, targets)
    assert not torch.allclose(mutant.loss, expected, rtol=1e-2)  # a loss over the other frames would be seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_training_forward_is_the_encoders(kind: str, norm_first: bool) -> None:
    config = replace(CONFIG, layer_type=kind, layer_norm_first=norm_first, ffn_dim=16)
    model = model_of(config).eval()
    wavs, mask = torch.randn(2, 8000) * 0.1, torch.zeros(2, 24, dtype=torch.bool)
    targets = torch.zeros(2, 24, dtype=torch.long)
    said = model(wavs, mask, targets).likeliest
    with torch.no_grad():
        states = model.encoder(wavs, torch.tensor([8000, 8000])).states[-1]
        expected = model.logits(states).argmax(-1) - SPECIAL_SYMBOLS
    assert torch.equal(said, expected)


def test_the_front_end_gets_a_scaled_gradient() -> None:
    gradients = {}
    for scale in (1.0, 0.1):
        model = model_of(recipe=replace(RECIPE, feature_gradient=scale)).eval()
        torch.manual_seed(0)
        mask = torch.zeros(2, 24, dtype=torch.bool)
        mask[:, ::2] = True
        model(torch.randn(2, 8000) * 0.1, mask, torch.zeros(2, 24, dtype=torch.long)).loss.backward()
        conv = model.encoder.feature_extractor.conv_layers[1].get_submodule("0")
        gradients[scale] = (conv.weight.grad.clone(), model.encoder.layer_norm.weight.grad.clone())
    assert torch.allclose(gradients[0.1][0], 0.1 * gradients[1.0][0], rtol=1e-4, atol=1e-8)
    assert torch.allclose(gradients[0.1][1], gradients[1.0][1])  # what lies behind it is not scaled


def test_recomputed_activations_give_the_same_gradients() -> None:
    found = []
    for recompute in (False, True):
        model = model_of(recipe=replace(RECIPE, recompute_activations=recompute)).train()
        torch.manual_seed(1)
        mask = torch.ones(2, 24, dtype=torch.bool)
        wavs = torch.randn(2, 8000, generator=torch.Generator().manual_seed(2)) * 0.1
        model(wavs, mask, torch.zeros(2, 24, dtype=torch.long)).loss.backward()
        found.append([each.grad.clone() for each in model.parameters() if each.grad is not None])
    assert len(found[0]) == len(found[1]) > 20
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("frames", "kernel", "left"), [(9, 3, 1), (21, 6, 5), (30, 32, 16), (5, 4, 2)])
def test_the_positional_products_have_the_convolutions_gradients(frames: int, kernel: int, left: int) -> None:
    generator = torch.Generator().manual_seed(0)
    draw: Callable[..., torch.Tensor] = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, weight = draw(2, frames, 8).requires_grad_(), draw(8, 2, kernel).requires_grad_()
    y = grouped_conv(x, weight, 4, left)
    expected = F.conv1d(F.pad(x.transpose(1, 2), (left, kernel - 1 - left)), weight, groups=4).transpose(1, 2)
    upper = draw(*y.shape)
    assert torch.allclose(y, expected)
    for ours, theirs in zip(
        torch.autograd.grad(y, (x, weight), upper), torch.autograd.grad(expected, (x, weight), upper), strict=True
    ):
        assert torch.allclose(ours, theirs)


def test_mixers_start_as_the_recipe_says() -> None:
    config = replace(CONFIG, layer_type="ext_bi_mamba")
    biases = {}
    for redraw in (True, False):
        encoder = new_encoder(config, replace(RECIPE, redraw_mixer_projections=redraw))
        mixer = encoder.encoder.layers[0].mamba_rev
        biases[redraw] = F.softplus(mixer.dt_proj.bias.detach())
    assert torch.allclose(biases[True], torch.full_like(biases[True], math.log(2)))
    assert bool((biases[False] >= 0.99e-3).all()) and bool((biases[False] <= 0.101).all())


def test_bfloat16_keeps_decays_and_biases_of_the_scan() -> None:
    model = model_of(replace(CONFIG, layer_type="mamba"))
    lower_precision_(model)
    wide = {name.split("mamba.")[1] for name, each in model.named_parameters() if each.dtype == torch.float32}
    assert wide == {"A_log", "D", "dt_proj.bias"}


# Targets


def blobs(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, 6, generator=generator) * 2 + 50
    return torch.cat([centres[i] + torch.randn(200 + 40 * i, 6, generator=generator) for i in range(12)])


def test_kmeans_in_full_batches_is_as_good_as_scikit_learns() -> None:
    points = blobs()
    ours = float(pretrain_targets.assign(points, pretrain_targets.lloyd(points, 20, 0))[1].mean())
    theirs = float(pretrain_targets.assign(points, pretrain_targets.fit_kmeans(points, 20, 0))[1].mean())
    assert ours < 1.02 * theirs
    drawn = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(1))[:20]]
    assert (
        float(pretrain_targets.assign(points, drawn)[1].mean()) > 1.2 * theirs
    )  # centres that were not fitted are seen


def test_too_few_frames_are_refused() -> None:
    with pytest.raises(RequestError, match="3 frames for 5 clusters"):
        pretrain_targets.fit_kmeans(torch.randn(3, 2), 5, 0)


def test_cepstra_are_thirty_nine_every_ten_milliseconds_and_not_normalised() -> None:
    features, counts = pretrain_targets.cepstra()(torch.randn(1, 16000) * 0.1, torch.tensor([16000]))
    assert features.shape == (1, 98, 39) and counts.tolist() == [98]
    assert features[0, :, 0].mean().abs() > 1  # normalised columns would have mean zero


def test_purity_needs_labels_that_go_with_phones() -> None:
    phones = np.repeat(np.arange(4), 25)
    assert purity(phones.copy(), phones).phone == 1.0
    shuffled = np.random.default_rng(0).permutation(phones)
    assert purity(shuffled, phones).phone < 0.6
    assert purity(np.zeros(100, int), phones).phone == purity(phones, phones).chance == 0.25


# On a GPU


@pytest.mark.cuda
def test_kmeans_on_a_gpu_is_as_good() -> None:
    points = blobs()
    centres = pretrain_targets.fit_kmeans(points.cuda(), 20, 0)
    ours = float(pretrain_targets.assign(points.cuda(), centres)[1].mean())
    theirs = float(pretrain_targets.assign(points, pretrain_targets.fit_kmeans(points, 20, 0))[1].mean())
    assert ours < 1.02 * theirs
