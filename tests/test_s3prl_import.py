"""Experiment folders of s3prl 0.4.18, in miniature: keys, names and files as its runner writes them."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from superb_probe import cli, s3prl_import, verification
from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.downstreams.manifest import Manifest
from superb_probe.errors import RequestError
from superb_probe.export import export_upstream
from superb_probe.results.record import read_record
from superb_probe.s3prl_import import Imported, import_s3prl
from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.load import load_upstream

SLOTS = ("action", "object", "location")
SIZES = {"train": 60, "dev": 8, "test": 10}


@dataclasses.dataclass
class Made:
    """An experiment, and what was needed to make it."""

    folder: Path
    manifests: dict[str, Path]
    root: Path

    def take(self, out: Path, **options: Any) -> Imported:
        return import_s3prl(self.folder, out, manifest=self.manifests, root=self.root, **options)


def their_vectors(upstream: Upstream, rows: Manifest, logits: Tensor) -> Tensor:
    """(U, D) mean over frames of the weighted sum, as s3prl's Featurizer and MeanPooling have it."""
    vectors = []
    for utterance in rows:
        wav = torch.from_numpy(read_waveform(utterance, rows.root, 16000))
        states = upstream.extract([wav]).states[:, 0]
        vectors.append((logits.softmax(0)[:, None, None] * states).sum(0).mean(0))
    return torch.stack(vectors)


def some_of_mini() -> tuple[dict[str, Manifest], dict[str, list[str]]]:
    """Utterances of IC by split, and the values of every slot in the order they appear in train."""
    fold = load_folds(load_task("ic"), dataset="mini")[0]
    train = fold.manifests["train"].keep(fold.manifests["train"].ids[: SIZES["train"]][::-1])
    known = {slot: list(dict.fromkeys(train.labels(f"slot_{slot}"))) for slot in SLOTS}
    splits = {"train": train}
    for split in ("dev", "test"):
        rows = fold.manifests[split]
        fit = [u.id for u in rows if all(u.labels[f"slot_{slot}"] in known[slot] for slot in SLOTS)]
        splits[split] = rows.keep(fit[: SIZES[split]])
    return splits, known


def write_answers(
    folder: Path, split: str, rows: Manifest, known: dict[str, list[str]], out: tuple[Tensor, ...]
) -> float:
    """The files of predictions and truths of a split, from the logits of every slot; their accuracy."""
    said = [[known[slot][part[n].argmax()] for slot, part in zip(SLOTS, out, strict=True)] for n in range(len(rows))]
    truth = [[u.labels[f"slot_{slot}"] for slot in SLOTS] for u in rows]
    for name, answers in (("predict", said), ("truth", truth)):
        text = "".join(f"{u.id},{','.join(row)}\n" for u, row in zip(rows, answers, strict=True))
        (folder / f"{split}_{name}.csv").write_text(text)
    return float(torch.tensor([a == b for a, b in zip(said, truth, strict=True)]).float().mean())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An IC experiment: a random head on a random encoder, evaluated by the few lines here."""
    base = tmp_path_factory.mktemp("s3prl")
    torch.manual_seed(3)
    upstream = load_upstream("transformer_hubert", size="test", random=3)
    checkpoint = export_upstream(upstream, "s3prl", base).path
    splits, known = some_of_mini()
    train = splits["train"]
    paths = {}
    for split, rows in splits.items():
        paths[split] = base / f"{split}.tsv"
        rows.write(paths[split])
    (base / "corpus" / "data").mkdir(parents=True)
    with (base / "corpus" / "data" / "train_data.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("path", *SLOTS))
        writer.writerows((f"wavs/{u.id}.wav", *(u.labels[f"slot_{slot}"] for slot in SLOTS)) for u in train)
    counts = [len(names) for names in known.values()]
    projector, linear, logits = nn.Linear(48, 16), nn.Linear(16, sum(counts)), torch.tensor([0.5, -1.0, 2.0])
    with torch.no_grad():  # rows far apart, so that who is said differs by utterance
        linear.weight.mul_(50)
    folder = base / "experiment"
    folder.mkdir()
    lines = []
    for split in ("dev", "test"):
        with torch.no_grad():
            out = linear(projector(their_vectors(upstream, splits[split], logits))).split(counts, dim=1)
        accuracy = write_answers(folder, split, splits[split], known, out)
        lines.append(f"{split} at step 20: {accuracy}\n")
    (folder / "log.log").write_text("train at step 20: 0.5\n" + "".join(lines))
    states = {
        "Optimizer": {},
        "Step": 20,
        "Epoch": 0,
        "Args": argparse.Namespace(
            mode="train", upstream="hubert_local", upstream_ckpt=str(checkpoint), upstream_trainable=False,
            upstream_layer_selection=None, upstream_feature_normalize=False, downstream="fluent_commands",
            downstream_variant=None, seed=1337,
        ),
        "Config": {
            "downstream_expert": {
                "datarc": {"file_path": str(base / "corpus"), "train_batch_size": 32},
                "modelrc": {"projector_dim": 16, "select": "UtteranceLevel"},
            },
            "runner": {"total_steps": 20, "gradient_accumulate_steps": 1},
            "optimizer": {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": 1e-3},
        },
        "Featurizer": {"weights": logits},
        "Downstream": {
            "best_score": torch.zeros(1),
            **{f"projector.{name}": tensor for name, tensor in projector.state_dict().items()},
            **{f"model.post_net.linear.{name}": tensor for name, tensor in linear.state_dict().items()},
        },
    }  # fmt: skip
    torch.save(states, folder / "dev-best.ckpt")
    return Made(folder, paths, Path(splits["train"].root))


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Made:
    """The experiment, to spoil."""
    folder = tmp_path / "spoilt"
    folder.mkdir()
    for file in made.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return dataclasses.replace(made, folder=folder)


def test_a_record_marked_imported_whose_head_agrees_here(made: Made, tmp_path: Path) -> None:
    found = made.take(tmp_path)
    record = read_record(found.path)
    assert [each.verdict for each in found.findings] == ["equal", "equal"]
    assert found.agrees
    assert record.imported_from is not None and record.imported_from.startswith(
        "s3prl experiment/dev-best.ckpt sha256:"
    )
    assert (record.probe.lr, record.probe.seed, record.probe.steps, record.probe.batch) == (1e-3, 1337, 20, 32)
    assert record.layer_weights == pytest.approx(torch.tensor([0.5, -1.0, 2.0]).softmax(0).tolist())
    assert any("scored again here: test score" in each and "equal" in each for each in record.warnings)
    # and it stands by itself: verify finds items, probe and encoder
    data = verification.Data(made.root, made.manifests)
    checked = verification.verify(found.path, data=data, checkpoint=made.folder.parent / "transformer_hubert.pt")
    assert [each.verdict for each in checked] == ["equal"] * 3


def test_classes_in_another_order_are_noticed(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: rows of the last layer as they stand in s3prl's file."""
    monkeypatch.setattr(s3prl_import, "_our_order", lambda experiment, task, head, *rest: dict(head.state_dict()))
    assert s3prl_import.read_experiment(made.folder).task == "ic"
    items = verification.load_probe(made.take(tmp_path / "a").path, verification.Data(made.root, made.manifests))
    monkeypatch.undo()
    right = verification.load_probe(made.take(tmp_path / "b").path, verification.Data(made.root, made.manifests))
    assert not torch.equal(items.head.state_dict()["linear.weight"], right.head.state_dict()["linear.weight"])


def test_a_changed_head_is_told(copy: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log says all is right; the head says something else."""
    log = copy.folder / "log.log"
    log.write_text("dev at step 20: 1.0\ntest at step 20: 1.0\n")
    words = [
        "import",
        "s3prl",
        str(copy.folder),
        "--out",
        str(tmp_path / "runs"),
        "--root",
        str(copy.root),
        "--manifest",
    ]
    words += [f"{split}={path}" for split, path in copy.manifests.items()]
    assert cli.main(words) == 1
    said = capsys.readouterr().out
    assert "different" in said
    assert "-m evaluate -e CKPT" in said
    (path,) = (tmp_path / "runs").rglob("*.json")
    assert read_record(path).items is None  # the predictions are not those of the logged score


def test_without_data_it_says_what_was_not_scored(made: Made, tmp_path: Path) -> None:
    found = import_s3prl(made.folder, tmp_path)
    assert [each.verdict for each in found.findings] == ["not checked"]
    assert "no data were given" in found.findings[0].detail
    assert found.record.probe_weights is None
    assert found.record.task.dataset == "s3prl:fluent_commands"


def test_without_the_encoder_the_head_is_kept(copy: Made, tmp_path: Path) -> None:
    change(copy, "Args", upstream_ckpt="/nowhere/model.pt")
    found = copy.take(tmp_path)
    assert [each.verdict for each in found.findings] == ["not checked"]
    assert "the encoder hubert_local is not here" in found.findings[0].detail
    assert found.record.upstream.name == "s3prl:hubert_local"
    assert found.record.upstream.num_layers == 3
    assert found.record.probe_weights is not None


def change(made: Made, part: str, **values: Any) -> None:
    path = made.folder / "dev-best.ckpt"
    states = torch.load(path, weights_only=False)  # the test's own file
    target = states[part] if isinstance(states[part], dict) else vars(states[part])
    target.update(values)
    torch.save(states, path)


@pytest.mark.parametrize(
    ("part", "values", "told"),
    [
        ("Args", {"downstream": "separation_stft"}, "cannot be imported"),
        ("Args", {"upstream_trainable": True}, "fine-tuned"),
        ("Downstream", {"model.extra": torch.zeros(1)}, "model.extra|extra"),
        ("Featurizer", {"weights": torch.zeros(4)}, "reads 4 layers of width 48"),
    ],
)
def test_what_does_not_fit(copy: Made, tmp_path: Path, part: str, values: dict[str, Any], told: str) -> None:
    change(copy, part, **values)
    with pytest.raises(RequestError, match=told):
        copy.take(tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_other_data_are_refused_and_other_classes_told(made: Made, tmp_path: Path) -> None:
    swapped = {**made.manifests, "test": made.manifests["dev"], "dev": made.manifests["test"]}
    with pytest.raises(RequestError, match="tested on 10 items, the data have 8"):
        import_s3prl(made.folder, tmp_path, manifest=swapped, root=made.root)


class Evil:
    """Runs code when it is unpickled the ordinary way."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (Path("evil"),))


def test_no_code_of_the_file_is_run(copy: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    change(copy, "Config", evil=Evil())
    with pytest.raises(RequestError):
        copy.take(tmp_path / "runs")
    assert not Path("evil").exists()


def test_no_checkpoint_names_those_that_are_there(copy: Made, tmp_path: Path) -> None:
    (copy.folder / "dev-best.ckpt").rename(copy.folder / "states-20.ckpt")
    with pytest.raises(RequestError, match=r"It has states-20\.ckpt"):
        copy.take(tmp_path)
    assert import_s3prl(copy.folder / "states-20.ckpt", tmp_path, manifest=copy.manifests, root=copy.root).agrees


def test_scores_of_arks_and_trials(tmp_path: Path) -> None:
    """PR, ASR and ASV keep no log: their scores are those of the prediction files."""
    from superb_probe.s3prl_experiment import Experiment
    from superb_probe.s3prl_scores import stored_score

    def experiment(task: str) -> Experiment:
        config = {"downstream_expert": {"datarc": {}}}
        return Experiment(tmp_path, tmp_path / "dev-best.ckpt", task, {}, config, 20, None, {}, None)

    (tmp_path / "test-hyp.ark").write_text("a AH0 B\nb \n")
    (tmp_path / "test-ref.ark").write_text("a AH0 K\nb T\n")
    score, _ = stored_score(experiment("pr"), "test")
    assert score is not None and score.value == pytest.approx(100 * 2 / 3)
    (tmp_path / "test-clean-noLM-hyp.ark").write_text("a THE CAT\n")
    (tmp_path / "test-clean-noLM-ref.ark").write_text("a THE CAR\n")
    score, _ = stored_score(experiment("asr"), "test")
    assert score is not None and score.value == 50.0
    (tmp_path / "test_predict.txt").write_text("x-1_y-1 0.9\nx-1_x-2 0.8\nz-1_z-2 0.1\nz-1_y-1 0.0\n")
    (tmp_path / "test_truth.txt").write_text("x-1_y-1 0\nx-1_x-2 1\nz-1_z-2 1\nz-1_y-1 0\n")
    score, _ = stored_score(experiment("asv"), "test")
    assert score is not None and score.value == 50.0
    assert score.items["id"][0] == "x-1 y-1"
    (tmp_path / "test-ref.ark").write_text("a AH0 K\n")
    with pytest.raises(RequestError, match="not of the same items"):
        stored_score(experiment("pr"), "test")
    assert json.dumps(stored_score(experiment("ic"), "dev")[0]) == "null"
