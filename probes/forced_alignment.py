"""Forced alignment: the likeliest path of a CTC model through a transcript that is known, for a batch at once.

The Viterbi search over CTC's states (Graves et al. 2006): tokens with optional blanks between them, a blank needed only between two
equal tokens. The same paths as `torchaudio.functional.forced_align`, which is used where it runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from superb_probe.errors import RequestError
from superb_probe.probes.alignments import Segment

BACKENDS = ("auto", "own", "torchaudio")


def best_paths(
    log_probabilities: Tensor,
    num_frames: Tensor,
    targets: Sequence[Sequence[int]],
    *,
    blank: int = 0,
    backend: str = "auto",
) -> list[NDArray[np.int64]]:
    """Of each utterance, which of its tokens every frame belongs to: (T,) positions in its targets, -1 for blanks.

    Args:
        log_probabilities: (B, T, C) log posteriors.
        num_frames: (B,) valid frames.
        targets: token ids of each utterance, none of them the blank.
        blank: its id.
        backend: "own", "torchaudio", or "auto": torchaudio for states on a GPU where it runs, else our own.

    Raises:
        RequestError: for an utterance with no token or too few frames for its tokens, all of them at once, or a backend that is
            not there.
    """
    if backend not in BACKENDS:
        raise RequestError(f"unknown backend {backend!r}. Fix: one of {', '.join(BACKENDS)}.")
    problems = [
        f"utterance {row}: {wrong}"
        for row, (ids, frames) in enumerate(zip(targets, num_frames.tolist(), strict=True))
        if (wrong := alignment_problem(ids, frames, blank))
    ]
    if problems:
        raise RequestError("forced alignment: " + "; ".join(problems) + ". Fix: leave these utterances out.")
    wanted = backend == "torchaudio" or (backend == "auto" and log_probabilities.is_cuda)
    function = _torchaudio_function() if wanted else None
    if backend == "torchaudio" and function is None:
        raise RequestError(
            "torchaudio.functional.forced_align does not run here. Fix: --backend own, which finds the same paths."
        )
    if function is not None:
        paths = []
        for row, (ids, frames) in enumerate(zip(targets, num_frames.tolist(), strict=True)):
            one = log_probabilities[row : row + 1, :frames].contiguous().float()
            wanted_ids = torch.tensor([list(ids)], dtype=torch.int32, device=one.device)
            paths.append(_positions(function(one, wanted_ids, blank=blank)[0][0], blank))
        return paths
    return _viterbi(log_probabilities, num_frames, targets, blank)


def alignment_problem(ids: Sequence[int], num_frames: int, blank: int = 0) -> str | None:
    """Why tokens cannot be aligned with so many frames; None where they can.

    >>> alignment_problem([1, 1], 2)
    '2 frames for 2 tokens and 1 blanks between equal ones'
    """
    if not len(ids):
        return "no tokens"
    if blank in ids:
        return "the blank is among the tokens"
    doubles = sum(a == b for a, b in itertools.pairwise(ids))
    return (
        f"{num_frames} frames for {len(ids)} tokens and {doubles} blanks between equal ones"
        if num_frames < len(ids) + doubles
        else None
    )


def _torchaudio_function() -> Callable[..., Any] | None:
    """`forced_align`, where torchaudio has it and its compiled part loads."""
    try:
        from torchaudio.functional import forced_align

        forced_align(torch.zeros(1, 2, 2), torch.ones(1, 1, dtype=torch.int32), blank=0)
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None
    return forced_align  # type: ignore[no-any-return]


def _positions(path: Tensor, blank: int) -> NDArray[np.int64]:
    """Positions in the targets from a path of token ids: a token that is new, or comes after a blank, is the next one."""
    ids = path.cpu().numpy()
    fresh = (ids != blank) & np.concatenate([[True], ids[1:] != ids[:-1]])
    return np.where(ids == blank, -1, np.cumsum(fresh) - 1).astype(np.int64)


def _viterbi(
    log_probabilities: Tensor, num_frames: Tensor, targets: Sequence[Sequence[int]], blank: int
) -> list[NDArray[np.int64]]:
    batch, frames, _ = log_probabilities.shape
    longest = max(map(len, targets))
    states = np.full((batch, 2 * longest + 1), blank, dtype=np.int64)
    for row, ids in enumerate(targets):
        states[row, 1 : 2 * len(ids) : 2] = ids
    emissions = (
        log_probabilities.detach()
        .double()
        .gather(2, torch.as_tensor(states, device=log_probabilities.device)[:, None].expand(-1, frames, -1))
    )
    scores = emissions.cpu().numpy()
    may_skip = np.zeros(states.shape, dtype=bool)
    may_skip[:, 2:] = (states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])
    here = np.full(states.shape, -np.inf)
    here[:, :2] = scores[:, 0, :2]
    came_from = np.zeros((frames, *states.shape), dtype=np.int8)
    for frame in range(1, frames):
        one, two = np.full_like(here, -np.inf), np.full_like(here, -np.inf)
        one[:, 1:], two[:, 2:] = here[:, :-1], here[:, :-2]
        two[~may_skip] = -np.inf
        step = np.where(one > here, 1, 0)
        best = np.maximum(here, one)
        step = np.where(two > best, 2, step)
        came_from[frame] = step
        moved = np.maximum(best, two) + scores[:, frame]
        here = np.where((frame < num_frames.cpu().numpy())[:, None], moved, here)
    return [_traced(came_from[:, row], here[row], int(num_frames[row]), len(ids)) for row, ids in enumerate(targets)]


def _traced(
    came_from: NDArray[np.int8], last: NDArray[np.float64], num_frames: int, num_tokens: int
) -> NDArray[np.int64]:
    state = 2 * num_tokens if last[2 * num_tokens] > last[2 * num_tokens - 1] else 2 * num_tokens - 1
    path = np.empty(num_frames, dtype=np.int64)
    for frame in range(num_frames - 1, -1, -1):
        path[frame] = (state - 1) // 2 if state % 2 else -1
        state -= int(came_from[frame, state])
    return path


def token_segments(
    path: NDArray[np.int64], labels: Sequence[str], hop_s: float, reach_s: float = 0.06
) -> tuple[Segment, ...]:
    """The times of tokens along a path.

    CTC models say a token in a few frames and then nothing. Blanks between two tokens are shared by halves, but no token reaches
    farther than `reach_s` into them.

    Args:
        path: (T,) positions of tokens, -1 for blanks.
        labels: of the tokens.
        hop_s: seconds between frames.
        reach_s: see above; 0 keeps the frames of the path alone.

    >>> token_segments(np.array([-1, 0, -1, -1, 1]), ["a", "b"], 0.02)
    (Segment(start_s=0.0, end_s=0.06, label='a'), Segment(start_s=0.06, end_s=0.1, label='b'))
    """
    firsts = [int(np.flatnonzero(path == at)[0]) * hop_s for at in range(len(labels))]
    lasts = [(int(np.flatnonzero(path == at)[-1]) + 1) * hop_s for at in range(len(labels))]
    segments = []
    for at, label in enumerate(labels):
        before = firsts[at] if at == 0 else (firsts[at] - lasts[at - 1]) / 2
        after = len(path) * hop_s - lasts[at] if at + 1 == len(labels) else (firsts[at + 1] - lasts[at]) / 2
        start, end = firsts[at] - min(before, reach_s), lasts[at] + min(after, reach_s)
        segments.append(Segment(round(start, 6), round(end, 6), label))
    return tuple(segments)


def word_segments(tokens: Sequence[Segment], words: Sequence[str], lengths: Sequence[int]) -> tuple[Segment, ...]:
    """The times of words, each from the beginning of its first token to the end of its last.

    Args:
        tokens: of all words in order, without what stands between them.
        words: the words.
        lengths: tokens of each.

    >>> word_segments((Segment(0.0, 0.1, "a"), Segment(0.1, 0.3, "b")), ["ab"], [2])
    (Segment(start_s=0.0, end_s=0.3, label='ab'),)
    """
    ends = np.cumsum(lengths)
    return tuple(
        Segment(tokens[end - length].start_s, tokens[end - 1].end_s, word)
        for word, length, end in zip(words, lengths, ends.tolist(), strict=True)
    )
