"""VoxCeleb1 as published, in either folder style, for speaker identification (sid) and verification (asv)."""

from __future__ import annotations

from superb_probe.downstreams.corpus_base import Corpus, CorpusInfo, Draft, Extra, Row, Tree, missing_audio
from superb_probe.downstreams.manifest import Trials

META = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/"
PARTS = {"1": "train", "2": "dev", "3": "test"}  # of iden_split.txt
TRIALS = {37720: "the original list, which SUPERB scores", 37611: "the cleaned list"}

SPLIT_FILE = Extra(
    name="split",
    what="1, 2 or 3 (train, dev, test) and a path a line",
    source=META + "iden_split.txt",
    files=("iden_split.txt", "veri_test_class.txt", "meta/iden_split.txt"),
    tasks=("sid",),
)
TRIAL_LIST = Extra(
    name="trials",
    what="1 or 0 and two paths a line",
    source=f"https://www.openslr.org/49 (voxceleb1_test_v2.txt) or {META}veri_test.txt",
    files=("voxceleb1_test_v2.txt", "veri_test.txt", "meta/veri_test.txt", "veri_test2.txt", "meta/veri_test2.txt"),
    tasks=("asv",),
)


class VoxCeleb1(Corpus):
    """Celebrities in interviews; `dev/wav` and `test/wav`, or one `wav`, then `<speaker>/<video>/<number>.wav`."""

    info = CorpusInfo(
        name="voxceleb1",
        title="VoxCeleb1",
        source="https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html",
        license="CC BY 4.0",
        citation="Nagrani et al., VoxCeleb: a large-scale speaker identification dataset, Interspeech 2017, arXiv:1706.08612",
        landmarks=("dev/wav", "test/wav", "wav"),
        published={
            "sid": {"train": 138361, "dev": 6904, "test": 8251},
            "asv": {"train": 148642, "test": 4715},
        },
        extras=(SPLIT_FILE, TRIAL_LIST),
        aliases=("vox1", "voxceleb"),
    )

    def drafts(self, tree: Tree, task: str) -> list[Draft]:
        """One fold with the speaker of every utterance; for `asv` the trials of test too, and no dev split (the task makes one)."""
        audio: dict[str, str] = {}
        for folder in self.info.landmarks:
            if not tree.has(folder):
                continue
            for key, path in tree.audio(folder).items():
                name = "/".join(key.split("/")[-3:])
                if name in audio:
                    fix = "keep one of the two folder styles"
                    tree.findings.problem(name, f"twice: {audio[name]} and {path}", fix)
                audio[name] = path
        return [_identification(tree, audio) if task == "sid" else _verification(tree, audio)]


def _identification(tree: Tree, audio: dict[str, str]) -> Draft:
    rows: dict[str, list[Row]] = {split: [] for split in PARTS.values()}
    listed: list[str] = []
    missing = []
    for file in tree.extra("split")[:1]:
        for number, line in enumerate(tree.lines(file), start=1):
            part, _, path = line.strip().partition(" ")
            if not part:
                continue
            if part not in PARTS or path.count("/") != 2:
                tree.findings.problem(
                    f"{file}, line {number}", f"{line!r}", "expected 1, 2 or 3 and speaker/video/file.wav"
                )
                continue
            name = path.rpartition(".")[0]
            listed.append(name)
            if name in audio:
                rows[PARTS[part]].append(_row(name, audio[name]))
            else:
                missing.append(name)
    missing_audio(tree, "sid", listed, missing)
    return Draft(None, rows)


def _verification(tree: Tree, audio: dict[str, str]) -> Draft:
    files = tree.extra("trials")[:1]
    labels, pairs = [], []
    for file in files:
        for number, line in enumerate(tree.lines(file), start=1):
            cells = line.split()
            if not cells:
                continue
            if len(cells) != 3 or cells[0] not in ("0", "1"):
                tree.findings.problem(f"{file}, line {number}", f"{line!r}", "expected 1 or 0 and two paths")
                continue
            labels.append(int(cells[0]))
            pairs.append((cells[1].rpartition(".")[0], cells[2].rpartition(".")[0]))
    named = list(dict.fromkeys(name for pair in pairs for name in pair))
    missing_audio(tree, "asv, trials", named, [name for name in named if name not in audio])
    test_speakers = {name.partition("/")[0] for name in named}
    rows = {
        "train": [_row(name, audio[name]) for name in sorted(audio) if name.partition("/")[0] not in test_speakers],
        "test": [_row(name, audio[name]) for name in sorted(named) if name in audio],
    }
    if files:
        kind = TRIALS.get(len(pairs))
        tree.findings.note(f"trials: {files[0].name}, {len(pairs)} pairs{f', {kind}' if kind else ''}")
        if kind is None:
            tree.findings.fewer(
                str(files[0]), f"{len(pairs)} trials; 37720 (37611 cleaned) published", f"take {TRIAL_LIST.source}"
            )
    trials = Trials.of(labels, [_id(a) for a, _ in pairs], [_id(b) for _, b in pairs])
    return Draft(None, rows if files else {}, {"test": trials})


def _row(name: str, path: str) -> Row:
    return Row(_id(name), path, {"speaker": name.partition("/")[0]})


def _id(name: str) -> str:
    return name.replace("/", "-")
