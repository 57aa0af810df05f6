"""True experiments of s3prl 0.4.18 on a few utterances of the embedded corpus, for `superb-probe import s3prl` to read.

    python tools/s3prl_experiments.py DIR --peer-python PYTHON --task sf sd qbe ic pr asr

arranges the corpus as s3prl reads it, runs s3prl's own `run_downstream.py` in the environment of PYTHON (which has s3prl, and for SD
h5py, for QbE dtw-python and lxml), and prints the command that imports each experiment. An encoder with random weights, 20 updates.
Stand-ins for what s3prl's wheel lacks: `s3prl_peer_stand_ins.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

UPDATES = 20
SLOT_UPDATES = 900  # long before that, slot filling says nothing at all
SIZE = {"train": 30, "dev": 10, "test": 12}
LAYERS = 3  # of the test encoder
NUM_UTTERANCES = {"dev": (6, 12), "test": (8, 16)}  # queries and documents of QbE
QUERY_S = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the experiments that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an empty folder")
    parser.add_argument("--peer-python", required=True, help="the interpreter that has s3prl 0.4.18")
    parser.add_argument("--task", nargs="+", choices=sorted(ARRANGED), default=sorted(ARRANGED))
    args = parser.parse_args(arguments)
    from superb_probe.export import export_upstream
    from superb_probe.upstreams.load import load_upstream

    args.folder.mkdir(parents=True, exist_ok=True)
    encoder = load_upstream("transformer_hubert", size="test", random=3)
    checkpoint = args.folder / "transformer_hubert.pt"
    if not checkpoint.is_file():
        export_upstream(encoder, "s3prl", args.folder)
    for task in args.task:
        folder = args.folder / task
        commands, data = ARRANGED[task](folder)
        for words in commands:
            encoder_words = ["-u", "hubert_local", "-k", str(checkpoint.resolve())]
            job = [args.peer_python, __file__, "--peer", "1" if task == "qbe" else "0", *words, "--device", "cpu"]
            job += [] if "-e" in words else encoder_words
            with (folder / "log.txt").open("a", encoding="utf-8") as log:
                done = subprocess.run(job, stdout=log, stderr=subprocess.STDOUT, check=False)
            if done.returncode:
                print(f"{task}: s3prl ended with status {done.returncode}: {folder / 'log.txt'}", file=sys.stderr)
                return 1
        print(f"superb-probe import s3prl {folder / 'experiment'} {data}", flush=True)
    return 0


def _fold(task: str, folder: Path) -> Any:
    """A part of the task's embedded data, dev and test with labels of train only, and its manifests in a folder."""
    from superb_probe.bench_corpus import choose_corpus
    from superb_probe.downstreams.load import load_task

    return choose_corpus(load_task(task), SIZE["train"], folder / "manifests", labelled=task != "sd")


def _told(root: Path, manifests: Mapping[str, Path]) -> str:
    """The data, in the words of `import`."""
    pairs = " ".join(f"{split}={path.resolve()}" for split, path in manifests.items())
    return f"--root {root.resolve()} --manifest {pairs}"


def _run(
    folder: Path,
    downstream: str,
    expert: dict[str, Any],
    lr: float,
    best: str = "dev-best.ckpt",
    updates: int = UPDATES,
) -> list[list[str]]:
    """Train, and write the predictions of the best checkpoint."""
    splits = ["dev", "test"]
    config = {
        "downstream_expert": expert,
        "runner": {
            "total_steps": updates,
            "gradient_clipping": 1.0,
            "gradient_accumulate_steps": 1,
            "log_step": 10,
            "eval_step": updates // 2,
            "save_step": updates,
            "max_keep": 1,
            "eval_dataloaders": splits,
        },
        "optimizer": {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": lr},
    }
    (folder / "config.yaml").write_text(json.dumps(config, indent=1), encoding="utf-8")
    place = str((folder / "experiment").resolve())
    commands = [["-m", "train", "-d", downstream, "-c", str(folder / "config.yaml"), "-p", place]]
    for split in splits:
        commands.append(["-m", "evaluate", "-t", split, "-e", f"{place}/{best}"])
    return commands


def arrange_intents(folder: Path) -> tuple[list[list[str]], str]:
    """IC."""
    from superb_probe import bench_corpus, bench_peer

    corpus = _fold("ic", folder)
    bench_corpus.arrange_fluent_commands(corpus.fold, folder / "corpus", 8)
    expert = bench_peer._intents(folder / "corpus", 8, 0)
    return _run(folder, "fluent_commands", expert, 1e-3), _told(corpus.root, corpus.manifests)


def arrange_phones(folder: Path) -> tuple[list[list[str]], str]:
    """PR."""
    from superb_probe import bench_corpus, bench_peer

    corpus = _fold("pr", folder)
    tokens = corpus.task.labels(corpus.fold.manifests["train"]).classes["tokens"]
    bench_corpus.arrange_phones(corpus.fold, folder / "corpus", tokens)
    expert = bench_peer._phones(folder / "corpus", 4, 0)
    return _run(folder, "ctc", expert, 1e-2), _told(corpus.root, corpus.manifests)


def arrange_slots(folder: Path) -> tuple[list[list[str]], str]:
    """SF: `corpus.tsv` for the stand-in of s3prl's corpus class, vocabulary and slots."""
    from superb_probe import bench_corpus, bench_peer
    from superb_probe.downstreams.manifest import Manifest, Utterance
    from superb_probe.downstreams.sf import SPECIALS, is_tag

    corpus = _fold("sf", folder)
    data = folder / "corpus"
    train = corpus.fold.manifests["train"]
    # dev and test are copies of utterances of train: after so few updates nothing but them has a slot that is right
    manifests = {"train": train, "dev": train[: SIZE["dev"]], "test": train[SIZE["dev"] : SIZE["dev"] + SIZE["test"]]}
    lines, paths = [], {}
    for split, chosen in manifests.items():
        samples = bench_corpus.write_wavs(
            chosen, data, lambda utterance, split=split: f"{split}/{utterance.id}-{split}.wav"
        )
        rows = []
        for u in chosen:
            slots = " ".join(label.partition("-")[2] or label for label in u.labels["iob"].split())
            audio, labels = f"{split}/{u.id}-{split}.wav", {**u.labels, "speaker": f"{u.labels['speaker']}-{split}"}
            lines.append(f"{split}\t{audio}\tBOS {u.labels['text']} EOS\tO {slots} intent")
            rows.append(Utterance(f"{u.id}-{split}", audio, 0.0, samples[u.id] / 16000, labels))
        paths[split] = folder / "manifests" / f"{split}.tsv"
        Manifest(rows, data, split).write(paths[split])
    tokens = corpus.task.labels(corpus.fold.manifests["train"]).classes["tokens"]
    characters = [token for token in tokens if token not in SPECIALS and not is_tag(token)]
    kinds = sorted({token[2:] for token in tokens if is_tag(token)})
    (data / "corpus.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (data / "character.txt").write_text("\n".join(characters), encoding="utf-8")
    (data / "slots.txt").write_text("\n".join(["slots", *kinds[::-1]]), encoding="utf-8")  # another order than ours
    expert = {
        "corpus": {
            "name": "snips",
            "path": str(data),
            **{split: [split] for split in ("train", "dev", "test")},
            "bucketing": True,
            "batch_size": 4,
            "num_workers": 0,
        },
        "text": {
            "mode": "character-slot",
            "vocab_file": str(data / "character.txt"),
            "slots_file": str(data / "slots.txt"),
        },
        "model": {
            "project_dim": 48,
            "select": "RNNs",
            "zero_infinity": True,
            "RNNs": bench_peer._speech(data, 0)["modelrc"]["RNNs"] | {"dim": [64, 64]},
        },
        "metric": ["slot_type_f1", "slot_value_cer", "slot_value_wer"],
        "metric_higher_better": True,
    }
    return _run(folder, "ctc", expert, 5e-3, updates=SLOT_UPDATES), _told(data, paths)


def arrange_mixtures(folder: Path) -> tuple[list[list[str]], str]:
    """SD: Kaldi tables and mixtures; batches of one chunk on dev, so that its accuracy is a mean over chunks."""
    from superb_probe import bench_corpus
    from superb_probe.downstreams.sd import labelled_turns

    corpus = _fold("sd", folder)
    data = folder / "corpus"
    for split, manifest in corpus.fold.manifests.items():
        bench_corpus.write_wavs(manifest, data, lambda utterance, split=split: f"{split}/wav/{utterance.id}.wav")
        tables: dict[str, list[str]] = {name: [] for name in ("wav.scp", "segments", "utt2spk", "reco2dur", "rttm")}
        speakers: dict[str, list[str]] = {}
        for u in manifest:
            tables["wav.scp"].append(f"{u.id} {(data / split / 'wav' / f'{u.id}.wav').resolve()}")
            tables["reco2dur"].append(f"{u.id} {u.duration_s}")
            for number, turn in enumerate(labelled_turns(u, manifest.root)):
                name = f"{u.id}-{number}"
                tables["segments"].append(f"{name} {u.id} {turn.start_s} {turn.stop_s}")
                tables["utt2spk"].append(f"{name} {turn.speaker}")
                speakers.setdefault(turn.speaker, []).append(name)
        tables["spk2utt"] = [f"{speaker} {' '.join(names)}" for speaker, names in speakers.items()]
        for name, rows in tables.items():
            (data / split / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    batches = {"num_workers": 0, "train_batchsize": 4, "eval_batchsize": 1}
    expert = {
        "loaderrc": {**batches, **{f"{split}_dir": str(data / split) for split in ("train", "dev", "test")}},
        "datarc": {
            "chunk_size": 2000,
            "subsampling": 1,
            "rate": 16000,
            "use_last_samples": True,
            "label_delay": 0,
            "num_speakers": 2,
        },
        "modelrc": {"rnn_layers": 1, "hidden_size": 16},
        "scorerc": {"save_predictions": True},
    }
    return _run(folder, "diarization", expert, 1e-2, "best-states-dev.ckpt"), _told(corpus.root, corpus.manifests)


def arrange_queries(folder: Path) -> tuple[list[list[str]], str]:
    """QbE: QUESST 2014's lists, one folder a split, and one evaluation a layer and split, as s3prl's documentation says."""
    from superb_probe import bench_corpus
    from superb_probe.downstreams.load import load_folds, load_task
    from superb_probe.downstreams.manifest import Manifest

    fold = load_folds(load_task("qbe"), dataset="mini")[0]
    (folder / "manifests").mkdir(parents=True)
    rules = {"step_pattern": "asymmetric", "minmax_norm": True, "subsequence": True, "dist_method": "cosine_exp"}
    expert: dict[str, Any] = {"max_workers": 1, "feature_normalization": True, "silence_frame": None, "dtwrc": rules}
    commands, paths = [], {}
    for split, theirs in (("dev", "dev"), ("test", "eval")):
        num_queries, num_documents = NUM_UTTERANCES[split]
        documents = [u for u in fold.manifests[split] if u.labels["role"] == "document"][:num_documents]
        # a query is a stretch of a document, which even random weights find again
        queries = [
            replace(
                u,
                id=f"{u.id}-query",
                start_s=u.start_s + 0.6,
                duration_s=QUERY_S,
                labels={**u.labels, "role": "query", "occurrences": u.id},
            )
            for u in documents[:num_queries]
        ]
        chosen = Manifest([*queries, *documents], fold.manifests[split].root, split)
        data = folder / "corpus" / split
        samples = bench_corpus.write_wavs(chosen, data, lambda utterance: f"Audio/{utterance.id}.wav")
        # the files that s3prl reads, 16 bits a sample
        written = [
            replace(u, audio=f"{split}/Audio/{u.id}.wav", start_s=0.0, duration_s=samples[u.id] / 16000) for u in chosen
        ]
        paths[split] = folder / "manifests" / f"{split}.tsv"
        Manifest(written, folder / "corpus", split).write(paths[split])
        (data / "scoring").mkdir()
        for name, rows in ((theirs, queries), ("utterances", documents)):
            lines = "".join(f"quesst14Database/Audio/{u.id}.wav nnenglish\n" for u in rows)
            (data / "scoring" / f"language_key_{name}.lst").write_text(lines, encoding="utf-8")
        datarc = {"dataset_root": str(data), "batch_size": 1, "num_workers": 0}
        config = folder / f"config.{split}.yaml"
        words = json.dumps({"downstream_expert": {**expert, "datarc": datarc}, "runner": {}}, indent=1)
        config.write_text(words, encoding="utf-8")
        for layer in range(LAYERS):
            place = (folder / "experiment" / f"layer{layer}_{split}").resolve()
            place.mkdir(parents=True)
            common = ["-m", "evaluate", "-t", split, "-d", "quesst14_dtw", "-c", str(config), "-p", str(place)]
            commands.append([*common, "-l", str(layer)])
    return commands, _told(folder / "corpus", paths)


ARRANGED: dict[str, Callable[[Path], tuple[list[list[str]], str]]] = {
    "ic": arrange_intents,
    "pr": arrange_phones,
    "sf": arrange_slots,
    "sd": arrange_mixtures,
    "qbe": arrange_queries,
}


class SnipsDataset:
    """The corpus class of slot filling, which the wheel lacks: windows over a list sorted by label length, as for phones.

    `corpus.tsv` in `path` has split, audio, words from BOS to EOS, and their slots.
    """

    def __init__(self, split: list[str], tokenizer: Any, bucket_size: int, path: str, **kwargs: Any) -> None:
        """`kwargs` are the rest of the corpus configuration."""
        self.bucket_size = bucket_size
        rows = [line.split("\t", 2) for line in Path(path, "corpus.tsv").read_text(encoding="utf-8").splitlines()]
        found = [(str(Path(path, audio)), tokenizer.encode(text)) for name, audio, text in rows if name in split]
        self.items = sorted(found, key=lambda item: -len(item[1]))

    def __len__(self) -> int:
        """Number of utterances."""
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        """A window of (file, tokens), or one pair."""
        if self.bucket_size == 1:
            return self.items[index]
        start = max(0, min(len(self.items) - self.bucket_size, index))
        return self.items[start : start + self.bucket_size]


def peer(arguments: Sequence[str]) -> None:
    """s3prl's `run_downstream.py` with the stand-ins in place; the first argument says whether sox is to lower the gain."""
    import s3prl_peer_stand_ins as stand_ins

    stand_ins.install()
    stand_ins._module("s3prl.downstream.ctc.corpus.snips", SnipsDataset=SnipsDataset)
    stand_ins.GAIN_DB["value"] = -3.0 if arguments[0] == "1" else 0.0
    import torch

    torch.set_num_threads(1)
    torch.serialization.add_safe_globals([argparse.Namespace])  # s3prl's checkpoints hold its arguments
    if "ctc" in arguments or any("sf" in word or "pr" in word for word in arguments):
        stand_ins.keep_num_workers()
    from s3prl import run_downstream

    sys.argv = ["run_downstream.py", *arguments[1:]]
    run_downstream.main()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        peer(sys.argv[2:])
        sys.exit(0)
    sys.exit(main())
