"""What stores keep besides whole float states: int8, crops, nothing at all; and their files: limits, cleaning, killed builds."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.manifest import Manifest
from superb_probe.errors import CheckError, RequestError
from superb_probe.probes import store as store_module
from superb_probe.probes import store_codec, store_extract, store_files
from superb_probe.probes.plan import readable_bytes
from superb_probe.probes.states import States
from superb_probe.probes.store import FeatureStore
from superb_probe.probes.store_stream import StreamStore

CPU = torch.device("cpu")


@pytest.fixture
def train(corpus: Path) -> Manifest:
    return Manifest.read(corpus / "train.tsv")


def built(root: Path | None, upstream: Any, manifest: Manifest, kind: Any = FeatureStore, **options: Any) -> Any:
    store = kind(root, **{"dtype": "float32", **options})
    store.build(upstream, manifest, max_batch_s=1.0)
    return store


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("view", ["frames", "mean"])
def test_int8_errs_by_half_a_scale_of_each_frame(
    toy: SimpleNamespace, train: Manifest, tmp_path: Path, on_disk: bool, view: str
) -> None:
    upstream = toy.Upstream()
    exact = built(None, upstream, train, view=view)
    store = built(tmp_path if on_disk else None, upstream, train, view=view, dtype="int8")
    assert store.num_bytes == FeatureStore.estimate_bytes(upstream.info, train, view, "int8")  # type: ignore[arg-type]
    for name in train.ids:
        scale = exact[name].abs().amax(-1, keepdim=True) / 127
        assert bool(((store[name] - exact[name]).abs() <= 0.501 * scale).all())
        assert not torch.equal(store[name], exact[name])
    states = States(store, train.ids, None, CPU).batch([3, 1])[0]
    length = exact.num_frames(train.ids[3])
    expected = exact[train.ids[3]] if view == "frames" else exact[train.ids[3]][:, None]
    torch.testing.assert_close(states[:, 0, :length], expected, atol=0.01, rtol=0)


def test_one_scale_for_a_whole_layer_would_err_more() -> None:
    states = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 50)[:, None]
    one_scale = (states / (scale := states.abs().amax((1, 2), keepdim=True) / 127)).round() * scale
    ours = store_codec.unpack(store_codec.pack(states, "int8"), "int8")
    error, other = (
        ((ours - states).norm(dim=-1) / states.norm(dim=-1)),
        ((one_scale - states).norm(dim=-1) / states.norm(dim=-1)),
    )
    assert error.max() < 0.01 and other.max() > 0.5


def test_int8_keeps_zeros_and_refuses_what_is_not_finite(toy: SimpleNamespace, train: Manifest) -> None:
    assert store_codec.unpack(store_codec.pack(torch.zeros(2, 3), "int8"), "int8").tolist() == [[0.0] * 3] * 2
    upstream = toy.Upstream()
    upstream.weight.data[1, 3, 2] = float("nan")
    with pytest.raises(CheckError, match="not finite"):
        built(None, upstream, train, dtype="int8")


@pytest.mark.parametrize("on_disk", [False, True])
def test_crops_are_stretches_of_the_waveform_encoded_alone(
    toy: SimpleNamespace, train: Manifest, tmp_path: Path, on_disk: bool
) -> None:
    upstream = toy.Upstream()
    options: dict[str, Any] = {"view": "mean", "crops": 4, "crop_s": 0.2}
    store = built(tmp_path if on_disk else None, upstream, train, **options)
    whole = built(None, toy.Upstream(), train, view="mean")
    long = [u for u in train if u.duration_s > 0.2]
    assert long and len(long) < len(train)
    assert store.encoder_passes == len(train) + 3 * len(long)
    assert store.num_bytes == FeatureStore.estimate_bytes(upstream.info, train, "mean", "float32", crops=4, crop_s=0.2)
    for utterance in train:
        means = store[utterance.id]
        if utterance.duration_s <= 0.2:
            torch.testing.assert_close(means, whole[utterance.id])
            continue
        assert means.shape == (4, 3, 6) and len({tuple(row.flatten().tolist()) for row in means}) > 1
        wave = torch.from_numpy(read_waveform(utterance, train.root))
        for piece, mean in zip(store.keeping.cut(wave, utterance, 16000), means, strict=True):
            assert bool((wave.unfold(0, 3200, 1) == piece).all(1).any())  # 0.2 s of it, in one piece
            torch.testing.assert_close(mean, upstream.extract([piece]).states[:, 0].mean(1), atol=1e-5, rtol=1e-5)
    again = built(None, toy.Upstream(), train, **options)
    assert all(torch.equal(again[name], store[name]) for name in train.ids)
    other = built(None, toy.Upstream(), train, **options, crop_seed=1)
    assert not torch.equal(other[long[0].id], store[long[0].id])


def test_training_draws_among_the_crops_with_its_generator(toy: SimpleNamespace, train: Manifest) -> None:
    store = built(None, toy.Upstream(), train, view="mean", crops=3, crop_s=0.2)
    states = States(store, train.ids, None, CPU)
    rows = list(range(len(train)))
    generator = torch.Generator().manual_seed(0)
    drawn = [states.batch(rows, None, generator)[0] for _ in range(30)]
    for row, utterance in enumerate(train):
        seen = {tuple(batch[:, row, 0].flatten().tolist()) for batch in drawn}
        assert len(seen) == (3 if utterance.duration_s > 0.2 else 1)
    again = states.batch(rows, None, torch.Generator().manual_seed(0))[0]
    assert torch.equal(again, drawn[0])
    layer = States(store, train.ids, 1, CPU).batch(rows, None, torch.Generator().manual_seed(0))[0]
    assert torch.equal(layer[0], again[1])
    with pytest.raises(ValueError, match="need a generator"):
        states.batch(rows)


def test_crops_of_many_batches_are_those_of_one_after_another(toy: SimpleNamespace, train: Manifest) -> None:
    """Batches without a choice between them draw nothing, in one go as one by one."""
    states = States(built(None, toy.Upstream(), train, view="mean", crops=3, crop_s=0.2), train.ids, None, CPU)
    short = [row for row, utterance in enumerate(train) if utterance.duration_s <= 0.2]
    long = [row for row, utterance in enumerate(train) if utterance.duration_s > 0.2]
    batches = [long[:3], short[:2], [short[0], *long[:2]], short[:1], long[1:3]]
    generator = torch.Generator().manual_seed(4)
    expected = [states.draw_means(torch.tensor(rows), torch.tensor([len(rows)]), generator) for rows in batches]
    rows, sizes = torch.tensor([row for rows in batches for row in rows]), torch.tensor([len(rows) for rows in batches])
    assert torch.equal(states.draw_means(rows, sizes, torch.Generator().manual_seed(4)), torch.cat(expected))
    assert len(set(torch.cat(expected).tolist())) > len(set(rows.tolist())), (
        "different crops of one utterance are drawn"
    )


@pytest.mark.parametrize("view", ["frames", "mean"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_on_the_fly_gives_what_a_store_gives(toy: SimpleNamespace, train: Manifest, view: str, dtype: str) -> None:
    upstream = toy.Upstream()
    kept = States(built(None, toy.Upstream(), train, view=view, dtype=dtype), train.ids, None, CPU)
    store = built(None, upstream, train, StreamStore, view=view, dtype=dtype)
    states = States(store, train.ids, None, CPU)
    assert upstream.calls == 0 and states.num_frames == kept.num_frames
    states.prefetch([1, 2])
    for rows in ([7, 2, 5], [2, 2, 9]):
        got, frames = states.batch(rows)
        expected, expected_frames = kept.batch(rows)
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
        assert frames.tolist() == expected_frames.tolist()
    assert upstream.calls == 5 and store.num_bytes == 0 and len(store) == len(train)  # a repeated utterance once
    store.close()


def test_on_the_fly_crops_are_new_each_time(toy: SimpleNamespace, train: Manifest) -> None:
    store = built(None, toy.Upstream(), train, StreamStore, view="mean", crop_s=0.2)
    states = States(store, train.ids, None, CPU)
    row = max(range(len(train)), key=lambda each: train[each].duration_s)
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(states.batch([row], None, generator)[0].flatten().tolist()) for _ in range(8)}
    assert len(drawn) > 4
    whole = built(None, toy.Upstream(), train, view="mean")
    torch.testing.assert_close(states.batch([row])[0][:, 0, 0], whole[train.ids[row]])  # evaluation reads all of it
    store.close()


def test_the_batch_of_an_utterance_changes_nothing(toy: SimpleNamespace, train: Manifest) -> None:
    for view in ("frames", "mean"):
        together = built(None, toy.Upstream(), train, view=view)
        alone = FeatureStore(None, view=view, dtype="float32")  # type: ignore[arg-type]
        alone.build(toy.Upstream(), train, max_batch_s=0.01)
        for name in train.ids:
            assert (together[name] - alone[name]).norm() / alone[name].norm() <= 1e-5


def test_frames_past_the_end_would_change_the_mean(
    toy: SimpleNamespace, train: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = built(None, toy.Upstream(), train, view="mean")
    reduce = store_extract._reduce
    monkeypatch.setattr(
        store_extract,
        "_reduce",
        lambda states, lengths, frames, keeping: reduce(states, lengths * 0 + states.shape[2], frames, keeping),
    )
    wrong = built(None, toy.Upstream(), train, view="mean")
    assert max(float((wrong[name] - right[name]).norm() / right[name].norm()) for name in train.ids) > 1e-3


def test_a_store_keeps_to_its_limit_and_writes_nothing_when_it_cannot(
    toy: SimpleNamespace, train: Manifest, tmp_path: Path
) -> None:
    needed = FeatureStore.estimate_bytes(toy.Upstream().info, train, "frames", "float32")
    said: list[str] = []
    with pytest.raises(RequestError, match=r"--store-limit.*store clean"):
        built(tmp_path, toy.Upstream(), train, limit_bytes=needed - 1)
    assert not list(tmp_path.rglob("*.bin"))
    store = FeatureStore(tmp_path, dtype="float32", limit_bytes=needed + 10_000)
    store.build(toy.Upstream(), train, say=said.append)
    assert said == [f"writing {readable_bytes(needed)} of states to {store.folder}"]
    store.build(toy.Upstream(), train, say=said.append)
    assert len(said) == 1  # nothing is written the second time
    with pytest.raises(RequestError, match="--store-limit"):  # what is there counts
        built(tmp_path, toy.Upstream(1), train, limit_bytes=needed + 10_000)


def test_cleaning_deletes_what_was_not_used_longest(toy: SimpleNamespace, train: Manifest, tmp_path: Path) -> None:
    stores = [built(tmp_path, toy.Upstream(seed), train, view="mean") for seed in range(3)]
    for age, store in ((300, stores[0]), (200, stores[1]), (100, stores[2])):
        os.utime(store.folder / store_files.USED, (1e9 - age, 1e9 - age))
    built(tmp_path, toy.Upstream(0), train, view="mean")  # reading counts as use
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("not a store")
    listed = store_files.list_stores(tmp_path)
    assert [each.path for each in listed] == [stores[0].folder, stores[2].folder, stores[1].folder]
    assert store_files.clean_stores(tmp_path, sum(each.num_bytes for each in listed)) == []
    deleted = store_files.clean_stores(tmp_path, listed[0].num_bytes + listed[1].num_bytes)
    assert [each.path for each in deleted] == [stores[1].folder] and not stores[1].folder.exists()
    with store_files.one_builder(stores[2].folder):  # being built: stays
        assert [each.path for each in store_files.clean_stores(tmp_path, 0)] == [stores[0].folder]
    assert stores[2].folder.exists() and (tmp_path / "photos" / "cat.txt").exists()


def _build_and_die(root: Path, upstream: Any, manifest: Manifest, calls: int) -> None:
    forward = upstream.forward

    def killed(wavs: Any, num_samples: Any) -> Any:
        if upstream.calls >= calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(wavs, num_samples)

    upstream.forward = killed
    built(root, upstream, manifest)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_leaves_a_store_that_is_resumed_to_the_same_bytes(
    toy: SimpleNamespace, train: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SHARD_BYTES", 10_000)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_build_and_die, args=(tmp_path / "broken", toy.Upstream(), train, 20))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (folder,) = (tmp_path / "broken").iterdir()
    whole = built(tmp_path / "whole", toy.Upstream(), train)
    assert len(list(folder.glob("shard-*.json"))) < len(list(whole.folder.glob("shard-*.json")))
    resumed = built(tmp_path / "broken", toy.Upstream(), train)  # the dead process holds no lock
    assert 0 < resumed.encoder_passes <= len(train)
    names = sorted(path.name for path in whole.folder.iterdir())
    assert names == sorted(path.name for path in folder.iterdir())
    assert all((folder / name).read_bytes() == (whole.folder / name).read_bytes() for name in names)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_end_with_one_good_store(
    toy: SimpleNamespace, train: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SHARD_BYTES", 10_000)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=built, args=(tmp_path / "both", toy.Upstream(), train)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    (folder,) = (tmp_path / "both").iterdir()
    whole = built(tmp_path / "whole", toy.Upstream(), train)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in whole.folder.iterdir()
    }


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_one_poisoned_byte_is_found_wherever_it_is(
    toy: SimpleNamespace, train: Manifest, tmp_path: Path, dtype: str
) -> None:
    store = built(tmp_path, toy.Upstream(), train, dtype=dtype)
    path = store.folder / "shard-00000.bin"
    clean = path.read_bytes()
    for place in (0, len(clean) // 3, len(clean) - 1):
        poisoned = bytearray(clean)
        poisoned[place] ^= 0x10
        path.write_bytes(bytes(poisoned))
        with pytest.raises(CheckError, match="checksum"):
            built(tmp_path, toy.Upstream(), train, dtype=dtype)
    path.write_bytes(clean)
    assert built(tmp_path, toy.Upstream(), train, dtype=dtype).encoder_passes == 0


def test_what_is_on_disk_can_be_brought_into_memory(toy: SimpleNamespace, train: Manifest, tmp_path: Path) -> None:
    store = built(tmp_path, toy.Upstream(), train)
    before = {name: store[name] for name in train.ids}
    store.load(CPU)
    (store.folder / "shard-00000.bin").unlink()
    assert all(torch.equal(store[name], states) for name, states in before.items())
    assert len(store) == len(train) and store.num_frames(train.ids[0]) == before[train.ids[0]].shape[1]


def test_the_slow_stage_is_named(toy: SimpleNamespace, train: Manifest, tmp_path: Path) -> None:
    store = built(None, toy.Upstream(), train)
    on_disk = built(tmp_path, toy.Upstream(), train)
    for clock in (store.clock, on_disk.clock):
        assert clock.total_s >= clock.decode_s + clock.write_s and clock.limiting().startswith("limited by")
    assert store_extract.Clock(decode_s=9.0, total_s=10.0).limiting() == "limited by decoding, 90 % of the time"
    assert store_extract.Clock().limiting() == ""


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_bytes_of_a_part_of_a_batch_come_back_without_a_copy_on_the_way(dtype: str) -> None:
    batch = store_codec.pack(torch.randn(3, 4, 7, 6, generator=torch.Generator().manual_seed(0)), dtype)
    part = batch[:, 2, :5]
    pieces = store_codec.byte_pieces(part)
    start, end = batch.data_ptr(), batch.data_ptr() + batch.nbytes
    assert all(start <= piece.ctypes.data < end for piece in pieces)
    before = torch.zeros(8 * 6, dtype=torch.uint8)  # another utterance's bytes before these
    data = torch.cat([before, *map(torch.from_numpy, pieces)])
    assert torch.equal(store_codec.of_bytes(data, len(before), tuple(part.shape), dtype), part)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 777, -1])
def test_one_number_that_is_not_finite_is_found_and_large_ones_are_not(wrong: float, place: int) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        numbers = torch.full((2000,), torch.finfo(dtype).max, dtype=dtype)  # their sum is not finite, each of them is
        assert bool(store_codec.finite(numbers))
        numbers[place] = wrong
        assert not bool(store_codec.finite(numbers))


def test_what_is_kept_of_a_batch_is_one_piece_of_memory(toy: SimpleNamespace, train: Manifest) -> None:
    store = built(None, toy.Upstream(), train)
    pieces = {store.stored(name).untyped_storage().data_ptr() for name in train.ids}
    assert len(pieces) == len(store_module.duration_batches(train, 1.0)) < len(train)


def test_reading_fills_the_padding_with_zeros_whatever_was_there(
    toy: SimpleNamespace, train: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = States(built(None, toy.Upstream(), train), train.ids, None, CPU)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(float("nan")))
    batch, num_frames = states.batch(range(len(train)))
    assert len(set(num_frames.tolist())) > 3
    for row, length in enumerate(num_frames.tolist()):
        assert bool(batch[:, row, :length].isfinite().all()) and not batch[:, row, length:].any()


def test_a_reader_that_changes_what_it_got_does_not_change_the_file(
    toy: SimpleNamespace, train: Manifest, tmp_path: Path
) -> None:
    store = built(tmp_path, toy.Upstream(), train)
    before = (store.folder / "shard-00000.bin").read_bytes()
    store.stored(train.ids[0]).zero_()
    assert (store.folder / "shard-00000.bin").read_bytes() == before
    assert bool(built(tmp_path, toy.Upstream(), train).stored(train.ids[0]).any())


def test_damage_in_any_of_many_shards_is_found(
    toy: SimpleNamespace, train: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SHARD_BYTES", 10_000)
    store = built(tmp_path, toy.Upstream(), train)
    shards = sorted(store.folder.glob("shard-*.bin"))
    assert len(shards) > 3
    for path in (shards[1], shards[-1]):
        clean = path.read_bytes()
        path.write_bytes(clean[:-1] + bytes([clean[-1] ^ 1]))
        with pytest.raises(CheckError, match=f"{path.name}: checksum"):
            built(tmp_path, toy.Upstream(), train)
        path.write_bytes(clean)


def test_a_shard_that_cannot_be_written_ends_the_build_and_leaves_nothing_half(
    toy: SimpleNamespace, train: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SHARD_BYTES", 10_000)
    sync, calls = os.fsync, []

    def full(number: int) -> None:
        calls.append(number)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        sync(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        built(tmp_path, toy.Upstream(), train)
    monkeypatch.setattr(os, "fsync", sync)
    (folder,) = tmp_path.iterdir()
    data = {path.stem for path in folder.glob("shard-*.bin")}
    assert {path.stem for path in folder.glob("shard-*.json")} <= data and not list(folder.glob("*.bin.*.tmp"))
    whole = built(tmp_path / "whole", toy.Upstream(), train)
    again = built(tmp_path, toy.Upstream(), train)
    assert all(torch.equal(again.stored(name), whole.stored(name)) for name in train.ids)
