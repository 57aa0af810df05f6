from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
import torch
from torch import Tensor

from superb_probe.downstreams import manifest as manifest_module
from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.errors import CheckError, RequestError
from superb_probe.probes import identity
from superb_probe.probes import store as store_module
from superb_probe.probes.store import FeatureStore, utterances_digest
from superb_probe.upstreams.base import LayerStates


@pytest.fixture
def train(corpus: Path) -> Manifest:
    return Manifest.read(corpus / "train.tsv")


def alone(upstream: Any, utterance: Utterance, root: Path) -> Tensor:
    return upstream.extract([torch.from_numpy(read_waveform(utterance, root))]).states[:, 0].clone()


def built(
    root: Path | None, upstream: Any, manifest: Manifest, max_batch_s: float = 1.0, **options: Any
) -> FeatureStore:
    store = FeatureStore(root, **{"dtype": "float32", **options})
    store.build(upstream, manifest, max_batch_s=max_batch_s)
    return store


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_states_are_those_of_each_utterance_alone(
    toy: SimpleNamespace, train: Manifest, tmp_path: Path, on_disk: bool, dtype: str
) -> None:
    upstream = toy.Upstream()
    store = built(tmp_path if on_disk else None, upstream, train, dtype=dtype)
    assert len(store) == len(train) and upstream.calls == store.encoder_passes == len(train)
    tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    for utterance in train:
        expected = alone(upstream, utterance, train.root)
        assert store[utterance.id].dtype == torch.float32 and store.stored(utterance.id).dtype == getattr(torch, dtype)
        torch.testing.assert_close(store[utterance.id], expected, rtol=tolerance, atol=tolerance)
        assert store.num_frames(utterance.id) == expected.shape[1]
    assert store.num_bytes == FeatureStore.estimate_bytes(upstream.info, train, "frames", dtype)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_mean_view_is_the_mean_of_the_frames_view(
    toy: SimpleNamespace, train: Manifest, tmp_path: Path, layer_norm: bool
) -> None:
    upstream = toy.Upstream()
    frames = built(None, upstream, train, layer_norm=layer_norm)
    means = built(tmp_path, upstream, train, view="mean", layer_norm=layer_norm)
    for utterance in train:
        expected = frames[utterance.id].mean(1)
        assert means[utterance.id].shape == (3, 6)
        error = (means[utterance.id] - expected).norm() / expected.norm()
        assert error <= 1e-5
        if layer_norm:  # the mean of normalised frames is not the normalised mean
            other = built(None, upstream, train, view="mean")[utterance.id]
            assert (torch.nn.functional.layer_norm(other, (6,)) - expected).norm() / expected.norm() > 1e-3
            break


def test_every_cause_is_in_the_key(toy: SimpleNamespace, train: Manifest, corpus: Path, tmp_path: Path) -> None:
    def folder(upstream: Any = None, manifest: Manifest = train, **options: Any) -> str:
        return str(built(tmp_path, upstream or toy.Upstream(), manifest, **{"view": "mean", **options}).folder)

    base = folder()
    assert folder() == base
    changed = toy.Upstream()
    changed.weight.data[0, 0, 0] += 1e-3
    renamed = toy.Upstream()
    renamed.info = dataclasses.replace(renamed.info, revision="sha256:0")

    relabelled = Manifest([dataclasses.replace(train[0], labels={"tone": "none"}), *train[1:]], train.root, train.name)
    assert folder(manifest=relabelled) == base  # labels change no state: tasks on the same utterances share a store
    shorter = Manifest([dataclasses.replace(train[0], duration_s=0.1), *train[1:]], train.root, train.name)
    keys = [
        folder(changed),
        folder(renamed),
        folder(manifest=shorter),
        folder(layer_norm=True),
        folder(view="frames"),
    ]
    keys += [folder(dtype="float16"), folder(waveform="gain_trim"), folder(dtype="int8")]
    keys += [folder(crops=2, crop_s=0.1), folder(crops=3, crop_s=0.1), folder(crops=2, crop_s=0.2)]
    keys += [folder(crops=2, crop_s=0.1, crop_seed=1)]
    assert len({base, *keys}) == len(keys) + 1


def test_changed_audio_under_the_same_manifest_is_another_store(toy: SimpleNamespace, tmp_path: Path) -> None:
    toy.write_corpus(tmp_path, {"train": 3})
    manifest = Manifest.read(tmp_path / "train.tsv")
    first = built(tmp_path / "store", toy.Upstream(), manifest)
    wav, rate = soundfile.read(tmp_path / manifest[0].audio)
    soundfile.write(tmp_path / manifest[0].audio, wav * 0.5, rate, subtype="PCM_16")
    assert built(tmp_path / "store", toy.Upstream(), manifest).folder != first.folder


def test_weights_and_audio_are_hashed_again_only_when_they_changed(
    toy: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.write_corpus(tmp_path, {"train": 3})
    manifest = Manifest.read(tmp_path / "train.tsv")
    hashed, weigh, read = [], identity._weights_digest, manifest_module._hash_files
    monkeypatch.setattr(identity, "_weights_digest", lambda each: hashed.append("weights") or weigh(each))
    monkeypatch.setattr(manifest_module, "_hash_files", lambda keys: hashed.extend(keys) or read(keys))
    upstream = toy.Upstream()
    causes = [FeatureStore().causes(upstream, manifest) for _ in range(3)]
    assert causes[0] == causes[1] == causes[2] and hashed.count("weights") == 1 and len(hashed) == 4
    upstream.weight.data[0, 0, 0] += 1e-3
    assert FeatureStore().causes(upstream, manifest)["weights"] != causes[0]["weights"]
    assert hashed.count("weights") == 2 and len(hashed) == 5
    path = tmp_path / manifest[0].audio
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert FeatureStore().causes(upstream, manifest)["audio"] != causes[0]["audio"] and len(hashed) == 6


@pytest.mark.parametrize("change", ["doubled", "one bit", "two exchanged", "another type"])
def test_a_fingerprint_shows_a_change_of_weights(change: str) -> None:
    layer: Any = torch.nn.Linear(2048, 1024)
    with torch.no_grad():
        layer.weight.fill_(
            0.5
        )  # a sum of plain bits would not notice an exchange, nor 2**21 equal steps of one modulo 2**64
        layer.weight[7, 7] = 0.25
    before = identity.fingerprint(layer)
    assert identity.fingerprint(layer) == before
    if change == "doubled":
        layer.weight.data.mul_(2.0)
    elif change == "one bit":
        layer.weight.data.view(torch.int32)[-1, -1] ^= 1
    elif change == "two exchanged":
        layer.weight.data[7, 7], layer.weight.data[900, 3] = 0.5, 0.25
    else:
        layer.bfloat16()
    assert identity.fingerprint(layer) != before


def interrupt_after(upstream: Any, calls: int) -> None:
    """Make an upstream fail once it has encoded that many utterances."""
    forward = upstream.forward

    def failing(wavs: Tensor, num_samples: Tensor) -> LayerStates:
        if upstream.calls >= calls:
            raise KeyboardInterrupt
        return forward(wavs, num_samples)

    upstream.forward = failing


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_an_interrupted_build_goes_on_and_ends_in_the_same_bytes(
    toy: SimpleNamespace, train: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SHARD_BYTES", 10_000)
    whole = built(tmp_path / "whole", toy.Upstream(), train)
    assert whole.folder is not None and len(list(whole.folder.glob("*.bin"))) > 3
    broken = toy.Upstream()
    interrupt_after(broken, 12)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "broken", broken, train)
    (folder,) = (tmp_path / "broken").iterdir()
    done = len(list(folder.glob("shard-*.json")))
    assert 0 < done < len(list(whole.folder.glob("shard-*.json")))
    (folder / "shard-00000.bin.deadbeef.tmp").write_bytes(b"left by a killed process")
    resumed = built(tmp_path / "broken", toy.Upstream(), train)
    assert 0 < resumed.encoder_passes < len(train)  # what was there was not extracted again
    assert not list(folder.glob("*.tmp"))
    assert resumed.folder == folder and contents(folder) == contents(whole.folder)
    again = built(tmp_path / "broken", toy.Upstream(), train)
    assert again.encoder_passes == 0 and torch.equal(again[train[0].id], whole[train[0].id])


def test_data_without_its_index_is_not_taken_for_a_shard(toy: SimpleNamespace, train: Manifest, tmp_path: Path) -> None:
    store = built(tmp_path, toy.Upstream(), train)
    assert store.folder is not None
    (store.folder / "shard-00000.json").unlink()  # a crash between the two writes
    assert built(tmp_path, toy.Upstream(), train).encoder_passes == len(train)


@pytest.mark.parametrize("damage", ["one bit", "cut short", "gone"])
def test_a_damaged_shard_is_found_when_the_store_is_opened(
    toy: SimpleNamespace, train: Manifest, tmp_path: Path, damage: str
) -> None:
    store = built(tmp_path, toy.Upstream(), train)
    assert store.folder is not None
    path = store.folder / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    if damage == "one bit":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut short":
        path.write_bytes(data[:-4])
    else:
        path.unlink()
    with pytest.raises(CheckError, match="checksum.*delete"):
        built(tmp_path, toy.Upstream(), train)


def test_two_builds_at_once_end_with_one_good_store(
    toy: SimpleNamespace, train: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SHARD_BYTES", 10_000)
    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(lambda _: built(tmp_path / "both", toy.Upstream(), train), range(2)))
    assert sum(store.encoder_passes for store in stores) == len(train)  # one built, the other waited for it
    one = built(tmp_path / "one", toy.Upstream(), train)
    (folder,) = (tmp_path / "both").iterdir()
    assert one.folder is not None and contents(folder) == contents(one.folder)
    assert built(tmp_path / "both", toy.Upstream(), train).encoder_passes == 0


def test_states_in_memory_are_shared_between_manifests(toy: SimpleNamespace, train: Manifest) -> None:
    upstream, memory = toy.Upstream(), {}
    first = built(None, upstream, train, memory=memory)
    other = Manifest(
        [dataclasses.replace(u, id=f"new-{u.id}", labels={"text": "x"}) for u in train[:5]], train.root, "other"
    )
    second = built(None, upstream, other, memory=memory)
    assert second.encoder_passes == 0 and torch.equal(second[f"new-{train[0].id}"], first[train[0].id])
    upstream.weight.data.mul_(2.0)
    assert built(None, upstream, other, memory=memory).encoder_passes == 5


def test_states_that_are_not_finite_are_refused_with_the_utterance(toy: SimpleNamespace, train: Manifest) -> None:
    upstream = toy.Upstream()
    upstream.weight.data[1, 3, 2] = float("nan")
    with pytest.raises(CheckError, match=r"toy, utterance train-0\d\d: states that are not finite"):
        built(None, upstream, train)
    large = toy.Upstream()
    large.forward = lambda wavs, num_samples, f=large.forward: LayerStates(
        f(wavs, num_samples).states * 1e6, num_samples // toy.HOP
    )
    with pytest.raises(CheckError, match="overflow float16: keep them as float32"):
        built(None, large, train, dtype="float16")
    assert len(built(None, large, train, dtype="float32")) == len(train)


def test_a_frame_count_that_is_not_the_declared_one_is_refused_with_both(toy: SimpleNamespace, train: Manifest) -> None:
    upstream = toy.Upstream()
    upstream.num_frames = lambda num_samples: num_samples // toy.HOP + 1
    with pytest.raises(CheckError, match=r"utterance train-\d+: \d+ frames, `num_frames` says \d+"):
        built(None, upstream, train)


def test_utterances_too_short_for_a_frame_are_all_named(toy: SimpleNamespace, train: Manifest) -> None:
    short = [dataclasses.replace(u, duration_s=0.005) for u in train[:3]]
    with pytest.raises(RequestError, match="(?s)3 problems.*train-000.*train-001.*train-002"):
        built(None, toy.Upstream(), Manifest(short, train.root, "short"))


def test_ready_made_states_are_read_by_utterance_id(toy: SimpleNamespace, train: Manifest) -> None:
    upstream = toy.Upstream()
    upstream.states_for = lambda name: torch.full((3, 4, 6), float(name[-3:]))
    store = built(None, upstream, train)
    assert upstream.calls == 0 and float(store["train-007"][0, 0, 0]) == 7.0
    upstream.states_for = lambda name: torch.zeros(4, 3, 6)
    with pytest.raises(CheckError, match=r"shape \(4, 3, 6\), expected \(L=3, T, D=6\)"):
        built(None, upstream, train)


def test_an_unknown_id_and_a_folder_that_cannot_be_made_are_said(
    toy: SimpleNamespace, train: Manifest, tmp_path: Path
) -> None:
    with pytest.raises(KeyError, match="no states of utterance 'nobody'"):
        built(None, toy.Upstream(), train)["nobody"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot write the store"):
        built(tmp_path / "file", toy.Upstream(), train)
    with pytest.raises(RequestError, match="unknown feature dtype"):
        FeatureStore(dtype="int3")


def test_the_causes_stand_beside_the_states(toy: SimpleNamespace, train: Manifest, tmp_path: Path) -> None:
    store = built(tmp_path, toy.Upstream(), train)
    assert store.folder is not None
    causes = json.loads((store.folder / "causes.json").read_text())
    assert (
        causes["utterances"] == utterances_digest(train)
        and causes["first_manifest"] == "train"
        and causes["view"] == "frames"
    )
