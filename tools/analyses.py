"""All analyses for all encoders that are embedded: on the embedded corpus and on real speech, each part timed.

Run from anywhere; one thread a command, two commands at a time:

    python tools/analyses.py --data DATA --out FOLDER

DATA holds the folders librispeech_mini and emodb4 with a manifest.csv, as `superb-probe prepare csv` reads them, and phone times
(phones_ps.csv, phones.csv); one that is absent is said and left out. It is never touched: manifests, states (safe to delete), logs,
records and figures are written to FOLDER. What has a record is not analysed again, so the command can be stopped and resumed. Every
`superb-probe` command is printed before it runs; the times of all, in Markdown, are printed at the end. Encoders have the weights that
are shipped, and random ones beside them; where none are shipped, random ones alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from superb_probe.downstreams.manifest import Manifest
from superb_probe.downstreams.mini import mini_root
from superb_probe.downstreams.prepare import prepare_csv
from superb_probe.errors import RequestError
from superb_probe.results.record import read_records
from superb_probe.upstreams.sizes import FAMILIES

WORKERS = 2
FIGURES = ("units", "robustness", "cca", "disentangle", "page")
MISALIGNED = ("6081-41997-0000", "7078-271888-0000", "3235-11599-0000")  # transcript and audio do not belong together
TRAINING_SPEAKERS = ("03", "08", "11", "13")  # of emodb4, two women and two men: six are left to test on
DEV_SENTENCE = "b10"
Files = dict[str, Path]
Command = list[str]


@dataclass(frozen=True)
class Speech:
    """Speech that is analysed.

    Attributes:
        name: "mini" or a folder of the data.
        targets: of CCA, beside the speaker embeddings.
        alignment: its phone times; "" for the embedded corpus' own.
        exclude: utterances that are left out.
        arrange: changes the manifests that `prepare csv` made; None keeps them.
        clusters: numbers of units.
        limit: most utterances of a split. Clusters and subspaces have 20,000 frames of train, which so many hold.
        changed: utterances of test whose audio is changed.
    """

    name: str
    targets: tuple[str, ...]
    clusters: tuple[int, ...]
    limit: int
    changed: int
    alignment: str = ""
    exclude: tuple[str, ...] = ()
    arrange: Callable[[Files, Path], None] | None = None


def six_test_speakers(files: Files, root: Path) -> None:
    """emodb4: four speakers to train on, but for one of their sentences, which is dev; the other six are tested.

    Its own splits have two speakers of test, which no interval over speakers bears. The sentence is the middle of an id (03 a01 F a).
    """
    whole = [each for path in files.values() for each in Manifest.read(path, root)]
    known = [each for each in whole if each.labels["speaker"] in TRAINING_SPEAKERS]
    parts = {
        "train": [each for each in known if each.id[2:5] != DEV_SENTENCE],
        "dev": [each for each in known if each.id[2:5] == DEV_SENTENCE],
        "test": [each for each in whole if each.labels["speaker"] not in TRAINING_SPEAKERS],
    }
    for split, part in parts.items():
        Manifest(part, root, split).write(files[split])


SPEECH = (
    Speech("mini", ("phones", "speaker"), (100,), 140, 12),
    Speech("librispeech_mini", ("phones",), (100,), 40, 6, "phones_ps.csv", MISALIGNED),
    Speech("emodb4", ("phones", "speaker", "emotion"), (100,), 100, 12, "phones.csv", ("08a01Wa",), six_test_speakers),
)
ANALYSES = ("units", "cca", "disentangle")


@dataclass(frozen=True)
class Settings:
    """What is asked of all speech; None where each speech has its own.

    Attributes:
        data: the folder of the corpora.
        out: the folder for all that is written.
        size: of encoders without shipped weights; None for the default.
        limit: most utterances of a split.
        clusters: numbers of units.
        seed: of the clusters.
        change: changes of the audio; empty for all.
        steps: updates of the aligner's probe.
    """

    data: Path | None
    out: Path
    size: str | None = None
    limit: int | None = None
    clusters: tuple[int, ...] | None = None
    seed: tuple[int, ...] = (1, 2, 3, 4, 5)
    change: tuple[str, ...] = ()
    steps: int = 200


def halves(names: Iterable[str]) -> list[list[str]]:
    """The encoders in two parts that cost about the same: bidirectional Mamba layers, the slowest, are in both."""
    ordered = sorted(names)
    return [part for part in (ordered[0::WORKERS], ordered[1::WORKERS]) if part]


def places(speech: Speech, asked: Settings) -> Command:
    """The options that say which speech; manifests are made for all but the embedded corpus."""
    options = ["--limit", str(min(speech.limit, asked.limit or speech.limit))]
    if not speech.alignment or asked.data is None:
        return options
    root = asked.data / speech.name
    files = prepare_csv(root, asked.out / "manifests" / speech.name, exclude=speech.exclude)
    trials = files.pop("trials", None)
    if speech.arrange is not None:
        speech.arrange(files, root)
    if trials is not None:
        files["trials"] = trials
    options += ["--root", str(root), "--alignment", str(root / speech.alignment)]
    return [*options, "--manifest", *(f"{name}={path}" for name, path in files.items())]


def commands_of(
    speech: Speech, upstreams: Sequence[str], first: bool, options: Command, asked: Settings
) -> list[Command]:
    """The three analyses of some encoders on some speech; filter banks stand beside the first part of the encoders."""
    shared = ["--upstream", *upstreams, *options, "--beside", "random", *(["fbank"] if first else [])]
    shared += ["--store", str(asked.out / "states"), "--out", str(asked.out / "runs"), "--figure", "none"]
    shared += [] if asked.size is None else ["--size", asked.size]
    units = ["--clusters", *map(str, asked.clusters or speech.clusters), "--curve-seeds", "1"]
    units += ["--seed", *map(str, asked.seed), "--change-utterances", str(speech.changed)]
    units += ["--change", *asked.change] if asked.change else []
    targets = [*speech.targets, *(["resemblyzer"] if importlib.util.find_spec("resemblyzer") else [])]
    own: dict[str, Command] = {"units": units, "cca": ["--target", *targets], "disentangle": []}
    return [["analyze", kind, *shared, *own[kind]] for kind in ANALYSES]


class Log:
    """Runs commands, says what they are and keeps how long each took."""

    def __init__(self, folder: Path) -> None:
        """Write what the commands say below `folder`."""
        self.folder = folder
        self.seconds: list[tuple[str, float]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, command: Command) -> None:
        """Run one command to its end.

        Raises:
            RequestError: if it fails, with the last that it said.
        """
        print("superb-probe " + " ".join(command), file=sys.stderr, flush=True)
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "superb_probe.cli", *command],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        taken = time.perf_counter() - begun
        file = self.folder / f"{name.replace(' ', '_')}.txt"
        file.write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            raise RequestError(f"{name} ended with status {done.returncode}; {file} ends: {done.stderr.strip()[-500:]}")
        self.seconds.append((name, taken))
        print(f"{name}: {taken:.0f} s", file=sys.stderr, flush=True)


def run_all(asked: Settings, names: Sequence[str], speeches: Sequence[Speech]) -> str:
    """Everything; gives the Markdown table of times."""
    begun = time.perf_counter()
    log = Log(asked.out / "logs")
    chains: list[list[tuple[str, Command]]] = []
    for speech in speeches:
        options = places(speech, asked)
        for part, upstreams in enumerate(halves(names)):
            commands = commands_of(speech, upstreams, part == 0, options, asked)
            chains.append([(f"{speech.name} {each[1]} {'ab'[part]}", each) for each in commands])

    failed = threading.Event()

    def walk(chain: list[tuple[str, Command]]) -> None:
        for name, command in chain:
            if failed.is_set():  # the rest waits for the mend: nothing that was done is lost
                return
            try:
                log.run(name, command)
            except RequestError:
                failed.set()
                raise

    with ThreadPoolExecutor(WORKERS) as pool:
        for each in [pool.submit(walk, chain) for chain in chains]:
            each.result()
    align(log, asked)
    for speech in speeches:
        dataset = speech.name if not speech.alignment else f"manifest:{speech.name}"
        command = ["analyze", "figures", "--kind", *FIGURES, "--runs", str(asked.out / "runs"), "--dataset", dataset]
        log.run(f"{speech.name} figures", [*command, "--out", str(asked.out / f"{speech.name}.png")])
    return table_of(log.seconds, time.perf_counter() - begun)


def align(log: Log, asked: Settings) -> None:
    """Phone times of the embedded corpus' test sentences, by a probe of filter banks."""
    runs = asked.out / "aligner" / f"{asked.steps}-updates"
    run = ["run", "--upstream", "fbank", "--task", "pr", "--lr", "1e-2", "--seed", "1", "--steps", str(asked.steps)]
    log.run("mini pr", [*run, "--budget", "small", "--out", str(runs)])
    (record,) = read_records(runs)
    path = runs / "pr" / "fbank" / f"{record.run_id}.json"
    manifest = mini_root() / "read.test.tsv"
    log.run("mini align", ["align", str(path), "--manifest", str(manifest), "--out", str(asked.out / "times.csv")])


def table_of(seconds: Iterable[tuple[str, float]], whole: float) -> str:
    """The Markdown table: seconds of every kind of part on all speech, both halves of the encoders together."""
    sums: dict[tuple[str, str], float] = {}
    for name, taken in seconds:
        speech, kind, *_ = name.split()
        sums[speech, kind] = sums.get((speech, kind), 0.0) + taken
    rows = ["| speech | part | seconds |", "| --- | --- | --- |"]
    rows += [f"| {speech} | {kind} | {taken:.0f} |" for (speech, kind), taken in sums.items()]
    return "\n".join([*rows, "", f"{whole / 60:.1f} minutes in all, {WORKERS} commands at a time."])


def main(words: Sequence[str] | None = None) -> int:
    """Run what is asked for and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of the corpora (default: the embedded corpus alone)")
    parser.add_argument("--out", type=Path, required=True, help="a folder for all that is written")
    parser.add_argument("--upstream", nargs="+", default=sorted(FAMILIES), help="encoders (default: all embedded)")
    parser.add_argument("--speech", nargs="+", choices=[each.name for each in SPEECH], help="only these")
    parser.add_argument("--size", help="of encoders without shipped weights (default: tiny)")
    parser.add_argument("--limit", type=int, help="utterances of a split, at most")
    parser.add_argument("--clusters", nargs="+", type=int, help="instead of each speech's own")
    parser.add_argument("--seed", nargs="+", type=int, default=(1, 2, 3, 4, 5), help="default: 1 2 3 4 5")
    parser.add_argument("--change", nargs="+", default=(), help="changes of the audio (default: all)")
    parser.add_argument("--steps", type=int, default=200, help="updates of the aligner's probe (default: 200)")
    given = parser.parse_args(words)
    clusters = None if given.clusters is None else tuple(given.clusters)
    seeds, changes = tuple(given.seed), tuple(given.change)
    asked = Settings(given.data, given.out, given.size, given.limit, clusters, seeds, changes, given.steps)
    if given.data is not None and not given.data.is_dir():
        print(
            f"--data {given.data}: no folder. Fix: the folder that holds librispeech_mini and emodb4.", file=sys.stderr
        )
        return 2
    speeches = [each for each in SPEECH if given.speech is None or each.name in given.speech]
    for each in list(speeches):
        if each.alignment and (given.data is None or not (given.data / each.name).is_dir()):
            print(f"{each.name}: not in {given.data or 'any --data'}; left out", file=sys.stderr)
            speeches.remove(each)
    try:
        print(run_all(asked, given.upstream, speeches))
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
