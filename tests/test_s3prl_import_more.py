"""SF, SD and QbE of s3prl 0.4.18, in miniature: keys, names and files as its experts write them.

`tools/s3prl_experiments.py` makes the same with s3prl's own code.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from superb_probe import verification
from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.base import Fold
from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.downstreams.sf import decode, encode, is_tag
from superb_probe.errors import RequestError
from superb_probe.export import export_upstream
from superb_probe.probes.states import States
from superb_probe.probes.store import FeatureStore
from superb_probe.probes.untrained import search_split
from superb_probe.results.record import read_items, read_record
from superb_probe.s3prl_import import Imported, import_s3prl
from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.load import load_upstream

LOGITS = torch.tensor([0.5, -1.0, 2.0])
SIZES = {"train": 16, "dev": 4, "test": 6}


@dataclasses.dataclass
class Made:
    """Experiments are made below one folder with one encoder."""

    base: Path
    upstream: Upstream
    checkpoint: Path

    def fold(self, task: str) -> tuple[Fold, dict[str, Path]]:
        """A few utterances of the embedded corpus, and their manifests."""
        fold = load_folds(load_task(task), dataset="mini", protocol="superb")[0]
        manifests, paths = {}, {}
        for split, rows in fold.manifests.items():
            chosen = Manifest(list(rows[: SIZES[split]]), rows.root, rows.name)
            paths[str(split)] = self.base / f"{task}.{split}.tsv"
            chosen.write(paths[str(split)])
            manifests[split] = chosen
        return dataclasses.replace(fold, manifests=manifests), paths

    def states(self, utterance: Utterance, root: Path) -> Tensor:
        """(1, T, D) s3prl's weighted sum."""
        wav = torch.from_numpy(read_waveform(utterance, root, 16000))
        states = self.upstream.extract([wav]).states[:, 0]
        return (LOGITS.softmax(0)[:, None, None] * states).sum(0)[None]

    def write(self, name: str, downstream: str, expert: dict[str, Any], tensors: dict[str, Tensor], file: str) -> Path:
        """The folder of an experiment with its checkpoint."""
        folder = self.base / name
        folder.mkdir()
        arguments = argparse.Namespace(
            mode="train", upstream="hubert_local", upstream_ckpt=str(self.checkpoint), upstream_trainable=False,
            upstream_layer_selection=None, upstream_feature_normalize=False, downstream=downstream,
            downstream_variant=None, seed=1337,
        )  # fmt: skip
        config = {
            "downstream_expert": expert,
            "runner": {"total_steps": 20, "gradient_accumulate_steps": 4},
            "optimizer": {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": 1e-4},
        }
        states = {
            "Optimizer": {}, "Step": 20, "Epoch": 0, "Args": arguments, "Config": config,
            "Featurizer": {"weights": LOGITS}, "Downstream": tensors,
        }  # fmt: skip
        torch.save(states, folder / file)
        return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    base = tmp_path_factory.mktemp("s3prl")
    torch.manual_seed(3)
    upstream = load_upstream("transformer_hubert", size="test", random=3)
    return Made(base, upstream, export_upstream(upstream, "s3prl", base).path)


def taken(folder: Path, out: Path, paths: dict[str, Path], root: Path) -> Imported:
    return import_s3prl(folder, out, manifest=paths, root=root)


def verdicts(found: Imported) -> list[str]:
    return [each.verdict for each in found.findings]


def as_best(value: float) -> Tensor:
    return torch.full((1,), value, dtype=torch.float32)


class Slots(nn.Module):
    """What s3prl's `RNNs` computes of one utterance."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.projector = nn.Linear(48, 10)
        self.rnns = nn.ModuleList([nn.LSTM(size, 8, bidirectional=True, batch_first=True) for size in (10, 16)])
        self.linear = nn.Linear(16, num_tokens)

    def forward(self, states: Tensor) -> Tensor:
        hidden = self.projector(states)
        for layer in self.rnns:
            hidden = layer(hidden)[0]
        return self.linear(hidden)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def slots(made: Made) -> tuple[Path, dict[str, Path], Path]:
    """SF, with a slot of s3prl's list that no training text has, and slots in another order than ours.

    The head begins and ends one kind of slot, so that some are right.
    """
    fold, paths = made.fold("sf")
    ours = load_task("sf").labels(fold.manifests["train"]).classes["tokens"]
    kinds = [*sorted({token[2:] for token in ours if is_tag(token)})[::-1], "never"]
    characters = [token for token in ours[3:] if not is_tag(token)]
    (made.base / "character.txt").write_text("\n".join(characters) + "\n")
    (made.base / "slots.txt").write_text("\n".join(["slots", *kinds]))
    tokens = [*ours[:3], *characters, *(f"{end}-{kind}" for kind in kinds for end in "BE")]
    head = Slots(len(tokens))
    with torch.no_grad():
        head.linear.weight.mul_(0.0)
        head.linear.bias.fill_(-1e4)
        begin, middle, end = (tokens.index(token) for token in ("B-date", "A", "E-date"))
        head.linear.weight[begin] = torch.randn(16)  # begins where it is large, ends where it is small
        head.linear.weight[end] = -head.linear.weight[begin]
        head.linear.bias[[begin, middle, end]] = 0.0
        for rows in fold.manifests.values():
            heard = torch.cat([head(made.states(u, rows.root))[0, :, begin] for u in rows])
        head.linear.bias[begin], head.linear.bias[end] = -heard.quantile(0.6), heard.quantile(0.4)
    names = {"linear": "model.linear", "projector": "projector"}
    tensors = {"best_score": as_best(0.5)}
    for name, tensor in head.state_dict().items():
        first, _, rest = name.partition(".")
        if first == "rnns":
            number, _, rest = rest.partition(".")
            tensors[f"model.rnns.{number}.layer.{rest}"] = tensor
        else:
            tensors[f"{names[first]}.{rest}"] = tensor
    text = {"mode": "character-slot", "vocab_file": str(made.base / "character.txt")}
    text["slots_file"] = str(made.base / "slots.txt")
    expert = {"corpus": {"name": "snips", "batch_size": 32}, "text": text}
    folder = made.write("sf", "ctc", expert, tensors, "states-20.ckpt")
    for split in ("dev", "test"):
        rows = fold.manifests[split]
        hypotheses, references = [], []
        for u in rows:
            with torch.no_grad():
                best = head(made.states(u, rows.root))[0].argmax(-1).unique_consecutive().tolist()
            hypotheses.append(f"{u.id} {decode([tokens[n] for n in best if n not in (0, 1)])}\n")
            references.append(f"{u.id} {decode(encode(u.labels['text'], u.labels['iob']))}\n")
        (folder / f"{split}-hyp.ark").write_text("".join(hypotheses))
        (folder / f"{split}-ref.ark").write_text("".join(references))
    return folder, paths, Path(fold.manifests["test"].root)


def test_slot_filling(slots: tuple[Path, dict[str, Path], Path], tmp_path: Path, made: Made) -> None:
    folder, paths, root = slots
    found = taken(folder / "states-20.ckpt", tmp_path, paths, root)
    assert verdicts(found) == ["not checked", "equal", "equal"]
    assert "'B-never', 'E-never'" in found.findings[0].detail
    record = read_record(found.path)
    assert record.task.name == "sf" and record.score is not None and 0 < record.score.value < 100
    assert set(record.score.extra) == {"slot_value_cer", "slot_value_wer"}
    assert record.probe.head_options == {"width": 8, "projection": 10, "num_layers": 2}
    checked = verification.verify(found.path, data=verification.Data(root, paths), checkpoint=made.checkpoint)
    assert [each.verdict for each in checked] == ["equal"] * 3


def test_a_changed_slot_head_is_told(slots: tuple[Path, dict[str, Path], Path], tmp_path: Path) -> None:
    folder, paths, root = slots
    states = torch.load(folder / "states-20.ckpt", weights_only=False)  # the test's own file
    states["Downstream"]["model.linear.bias"] = states["Downstream"]["model.linear.bias"].roll(7)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.glob("*.ark"):
        (copy / file.name).write_bytes(file.read_bytes())
    torch.save(states, copy / "states-20.ckpt")
    assert not taken(copy / "states-20.ckpt", tmp_path / "runs", paths, root).agrees


class Speakers(nn.Module):
    """What s3prl's diarization `Model` computes."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(48, 6, batch_first=True)
        self.linear = nn.Linear(6, 2)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear(self.rnn(states)[0])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def mixtures(made: Made) -> tuple[Path, dict[str, Path], Path]:
    h5py = pytest.importorskip("h5py")
    fold, paths = made.fold("sd")
    head = Speakers()
    with torch.no_grad():
        head.linear.weight.mul_(6)
    tensors = {f"model.{name}": tensor for name, tensor in head.state_dict().items()}
    expert = {
        "datarc": {"frame_shift": 320, "num_speakers": 2},
        "loaderrc": {"train_batchsize": 8, "eval_batchsize": 1},
    }
    folder = made.write("sd", "diarization", expert, tensors | {"best_score": as_best(0.6)}, "states-20.ckpt")
    (folder / "frame_shift").write_text("320\n")
    (folder / "scoring" / "predictions").mkdir(parents=True)
    rows = fold.manifests["test"]
    for u in rows:
        states, wanted = made.states(u, rows.root), round(u.duration_s * 16000) // 320
        lacking = wanted - states.shape[1]
        assert 0 <= lacking <= 4
        with torch.no_grad():
            predicted = head(torch.cat([states, states[:, -1:].repeat(1, lacking, 1)], 1))[0]
        with h5py.File(folder / "scoring" / "predictions" / f"{u.labels['recording']}.h5", "w") as file:
            file.create_dataset("T_hat", data=predicted.sigmoid().numpy())
    return folder, paths, Path(rows.root)


def test_diarization(mixtures: tuple[Path, dict[str, Path], Path], tmp_path: Path) -> None:
    folder, paths, root = mixtures
    found = taken(folder / "states-20.ckpt", tmp_path, paths, root)
    assert verdicts(found) == ["equal", "equal"]
    record = read_record(found.path)
    assert (
        record.task.name == "sd" and record.selection is not None and record.selection.split == "test"
    )  # not its best on dev
    assert (record.probe.batch, record.probe.accumulate) == (8, 4)
    assert record.probe.head_options == {"width": 6, "repeat_last": True}
    assert all(read_items(found.path)["levels"])  # what a submission needs
    # its best checkpoint was chosen by frames on dev, where s3prl may have averaged over batches
    (folder / "best-states-dev.ckpt").write_bytes((folder / "states-20.ckpt").read_bytes())
    best = taken(folder, tmp_path / "best", paths, root)
    (folder / "best-states-dev.ckpt").unlink()
    assert verdicts(best) == ["not checked", "equal"]
    assert best.record.selection is not None
    assert (best.record.selection.metric, best.record.selection.value) == ("frame_error", pytest.approx(40.0))


def test_posteriors_of_other_recordings(mixtures: tuple[Path, dict[str, Path], Path], tmp_path: Path) -> None:
    """A recording too few, one of another length, none of the data at all, no data."""
    h5py = pytest.importorskip("h5py")
    folder, paths, root = mixtures
    with pytest.raises(RequestError, match="its folder does not hold what is right"):
        import_s3prl(folder / "states-20.ckpt", tmp_path)
    swapped = {**paths, "test": paths["dev"], "dev": paths["test"]}
    with pytest.raises(RequestError, match="no mix-dev-"):
        taken(folder / "states-20.ckpt", tmp_path, swapped, root)
    copy = tmp_path / "copy"
    (copy / "scoring" / "predictions").mkdir(parents=True)
    for file in folder.rglob("*.*"):
        if file.is_file():
            (copy / file.relative_to(folder)).write_bytes(file.read_bytes())
    longer = next(iter(sorted((copy / "scoring" / "predictions").glob("*.h5"))))
    longer.unlink()
    with h5py.File(longer, "w") as file:
        file.create_dataset("T_hat", data=np.zeros((900, 2), np.float32))
    (copy / "frame_shift").write_text("320\n")
    with pytest.raises(RequestError, match=f"{longer.name} has 900 frames, the recording 300"):
        taken(copy / "states-20.ckpt", tmp_path, paths, root)


@pytest.fixture(scope="module")
def searches(made: Made) -> tuple[Path, dict[str, Path], Path]:
    """QbE: queries are stretches of documents; layers 1 and 2 on both splits, the documents in no order."""
    fold = load_folds(load_task("qbe"), dataset="mini")[0]
    folder, paths = made.base / "qbe", {}
    for split in ("dev", "test"):
        rows = fold.manifests[split]
        documents = [u for u in rows if u.labels["role"] == "document"][:9]
        queries = [
            dataclasses.replace(
                u,
                id=f"{u.id}-q",
                start_s=0.6,
                duration_s=0.7,
                labels={**u.labels, "role": "query", "occurrences": u.id},
            )
            for u in documents[:4]
        ]
        manifest = Manifest([*queries, *documents], rows.root, split)
        paths[split] = made.base / f"qbe.{split}.tsv"
        manifest.write(paths[split])
        store = FeatureStore(dtype="float32", waveform="gain")
        store.build(made.upstream, manifest)
        for layer in (1, 2):
            states = States(store, manifest.ids, layer, torch.device("cpu"))
            place = folder / f"layer{layer}_{split}"
            place.mkdir(parents=True)
            root = ElementTree.Element("stdlist")
            for query, scores in search_split(states, manifest).items():
                values = scores[0].numpy()
                values = (values - values.mean()) / values.std()
                terms = ElementTree.SubElement(root, "detected_termlist", termid=query)
                for number in np.random.default_rng(layer).permutation(len(documents)):
                    ElementTree.SubElement(terms, "term", file=documents[number].id, score=f"{values[number]:.4f}")
            ElementTree.ElementTree(root).write(place / "benchmark.stdlist.xml")
            arguments = {
                "upstream": "hubert_local", "upstream_ckpt": str(made.checkpoint), "evaluate_split": split,
                "upstream_layer_selection": layer, "downstream": "quesst14_dtw", "upstream_feature_normalize": False,
            }  # fmt: skip
            rules = {
                "step_pattern": "asymmetric",
                "minmax_norm": True,
                "subsequence": True,
                "dist_method": "cosine_exp",
            }
            config = {"downstream_expert": {"feature_normalization": True, "silence_frame": None, "dtwrc": rules}}
            (place / "args_2026-01-01.yaml").write_text(yaml.dump(arguments))
            (place / "config_2026-01-01.yaml").write_text(yaml.dump(config))
    return folder, paths, Path(fold.manifests["test"].root)


def test_query_by_example(searches: tuple[Path, dict[str, Path], Path], tmp_path: Path, made: Made) -> None:
    folder, paths, root = searches
    found = taken(folder, tmp_path, paths, root)
    assert verdicts(found) == ["equal", "equal"]
    record = read_record(found.path)
    assert record.score is not None and record.score.value > 0
    assert record.selection is not None and record.selection.split == "dev"
    singles = [taken(folder / f"layer{layer}_test", tmp_path / str(layer), paths, root) for layer in (1, 2)]
    assert record.probe.layer in (1, 2)
    assert record.score.value == singles[record.probe.layer - 1].record.score.value  # type: ignore[union-attr]
    assert all(each.record.selection.split == "test" for each in singles)  # type: ignore[union-attr]
    checked = verification.verify(found.path, data=verification.Data(root, paths), checkpoint=made.checkpoint)
    assert [each.verdict for each in checked] == ["equal"] * 3


def test_searches_that_are_not_what_they_say(searches: tuple[Path, dict[str, Path], Path], tmp_path: Path) -> None:
    folder, paths, root = searches
    with pytest.raises(RequestError, match="layers 1, 2, and the data are needed to choose one"):
        import_s3prl(folder, tmp_path)
    with pytest.raises(RequestError, match="of dev only"):
        taken(folder / "layer1_dev", tmp_path, paths, root)
    with pytest.raises(RequestError, match="4 queries and 9 documents, the data have 4 and 9: only there"):
        taken(folder, tmp_path, {"dev": paths["test"], "test": paths["dev"]}, root)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (folder / "layer1_test").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    text = (copy / "config_2026-01-01.yaml").read_text()
    (copy / "config_2026-01-01.yaml").write_text(text.replace("minmax_norm: true", "minmax_norm: false"))
    with pytest.raises(RequestError, match="minmax_norm False: not SUPERB's search"):
        taken(copy, tmp_path, paths, root)
    (copy / "config_2026-01-01.yaml").write_text(text)
    lines = (copy / "benchmark.stdlist.xml").read_text()
    (copy / "benchmark.stdlist.xml").write_text('<!DOCTYPE a [<!ENTITY b "c">]>' + lines)
    with pytest.raises(RequestError, match="document type declaration"):
        taken(copy, tmp_path, paths, root)
    for number in range(1, 9):  # another search than the one the encoder gives here
        lines = lines.replace(f'score="{number % 3}.', f'score="-{number % 3}.')
    (copy / "benchmark.stdlist.xml").write_text(lines)
    assert not taken(copy, tmp_path / "runs", paths, root).agrees
