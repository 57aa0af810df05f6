"""The trials of one task in training: linear heads as one stack, others one after another over the same batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from superb_probe.downstreams.base import Batch, Budget
from superb_probe.probes.ctc import BlstmCtc
from superb_probe.probes.draws import Draws
from superb_probe.probes.heads import UtteranceLinear
from superb_probe.probes.mean_update import MeanUpdate, fits
from superb_probe.probes.recurrent_stack import ROWS_TOGETHER, BlstmStack, can_stack_recurrent, consecutive
from superb_probe.probes.runner import Runner, random_state, set_random_state
from superb_probe.probes.stacked import LinearStack, can_stack, class_losses, token_losses
from superb_probe.probes.states import States
from superb_probe.probes.update import StackedUpdater
from superb_probe.probes.weighted_sum import Mixer, mix, mixture_gradient

GRAPH_UPDATES = 50  # updates that a GPU runs without the host


class Company(ABC):
    """Trials that train together: their probes, one updater, the batches of each seed.

    Attributes:
        runners: the trials, those of one seed beside each other.
        mixer: their mixtures of layers.
        stride: updates after which the host looks at what became of them.
    """

    stride = 1

    def __init__(
        self, runners: Sequence[Runner], draws: Mapping[int, Draws], num_layers: int, budget: Budget, clip: float
    ) -> None:
        """`draws` are by seed; `num_layers` is that of the states that they give."""
        seeds = list(draws)
        self.runners = sorted(runners, key=lambda runner: seeds.index(runner.trial.seed))
        self.accumulate = budget.accumulate
        first = self.runners[0]
        device = next(first.probe.parameters()).device
        rows = []
        for runner in self.runners:
            learnt = runner.probe.weighted_sum
            weights = nn.Parameter(torch.zeros(num_layers, device=device)) if learnt is None else learnt.weights
            rows.append([weights, *runner.probe.head.parameters()])
        rates = [runner.trial.lr for runner in self.runners]
        self.updater = StackedUpdater(rows, first.trial.optimizer, rates, clip)
        layers = [runner.trial.layer if num_layers > 1 or runner.probe.weighted_sum else 0 for runner in self.runners]
        self.mixer = Mixer(self.updater.stacked(0), layers)
        self.groups: list[tuple[Draws, slice]] = []
        for seed, draw in draws.items():
            members = [number for number, runner in enumerate(self.runners) if runner.trial.seed == seed]
            self.groups.append((draw, slice(members[0], members[-1] + 1)))
        self.device = device

    @abstractmethod
    def learn(self, count: int) -> None:
        """Make some updates of all running trials."""

    def running(self) -> list[int]:
        """Numbers of the trials that are still trained."""
        return [number for number, runner in enumerate(self.runners) if runner.running]

    def look(self) -> None:
        """Tell the runners of trials whose loss was not finite since the last look."""
        running = self.updater.running.tolist()
        if all(running[number] for number in self.running()):
            return
        stopped_at, losses = self.updater.stopped_at.tolist(), self.updater.stopped_loss.tolist()
        for number in self.running():
            if not running[number]:
                runner = self.runners[number]
                runner.error = (
                    f"diverged: loss {losses[number]} in update {stopped_at[number]} at lr {runner.trial.lr:g}"
                )

    def stop(self, number: int) -> None:
        """Train a trial no more."""
        self.updater.running[number] = False


class Separate(Company):
    """Trials with heads of any kind: each batch is read and mixed once for all, and each head in turn has its own graph.

    In turn on a GPU too: a stream for each trial was measured slower on an H100, where one recurrent head of SUPERB's width
    keeps the memory busy with its weights.
    """

    def __init__(
        self, runners: Sequence[Runner], draws: Mapping[int, Draws], num_layers: int, budget: Budget, clip: float
    ) -> None:
        """See `Company`."""
        super().__init__(runners, draws, num_layers, budget, clip)
        self.stride = GRAPH_UPDATES if self.device.type == "cuda" else 1
        self._joins = self.accumulate > 1 and self.runners[0].probe.head.joins_batches

    def learn(self, count: int) -> None:
        """Make some updates of all running trials."""
        for _ in range(count):
            self.updater.gradients.zero_()
            losses = torch.zeros(len(self.runners), device=self.device)
            for draw, group in self.groups:
                members = [number for number in self.running() if group.start <= number < group.stop]
                if members and self._joins:
                    for states, batch, held in draw.update(self.accumulate):
                        self._accumulate(states, batch, held, members, losses)
                    continue
                for _ in range(self.accumulate if members else 0):
                    self._accumulate(*draw.batch(), 1, members, losses)
            self.updater.step(losses)

    def _accumulate(self, states: Tensor, batch: Batch, held: int, members: Sequence[int], losses: Tensor) -> None:
        """Add the gradients and losses of a batch, or of `held` batches as one, of the trials of one seed."""
        mixer = self.mixer.part(members)
        mixture = mixer.mixture()
        gradient = self._heads(mix(mixture, states), batch, held, members, losses)
        if mixer.any_learnt:
            weights = self.updater.stacked(0, self.updater.gradients)
            weights[members] += mixer.gradient(mixture, mixture_gradient(gradient, states))

    def _heads(self, mixed: Tensor, batch: Batch, held: int, members: Sequence[int], losses: Tensor) -> Tensor:
        """Add the gradients and losses of the trials' heads; the gradient of their mixed states (n, B, T, D)."""
        gradient = torch.empty_like(mixed)
        for place, number in enumerate(members):
            loss, gradient[place] = self._one(self.runners[number], mixed[place], batch, held)
            losses[number] += loss
        return gradient

    def _one(self, runner: Runner, mixed: Tensor, batch: Batch, held: int) -> tuple[Tensor, Tensor]:
        """One batch of one trial, with the trial's own random numbers: its loss and the gradient of the mixed states."""
        set_random_state(runner.random, self.device)
        runner.probe.train()
        frames = mixed.detach().requires_grad_()
        head = runner.probe.head
        if held == 1:
            outputs = head(frames, batch.num_frames)
        else:
            own = batch.num_frames.view(held, -1)
            outputs = head(frames, batch.num_frames, longest=own.amax(1, keepdim=True).expand_as(own).flatten())
        loss = head.loss(outputs, batch) * (held / self.accumulate)
        loss.backward()  # type: ignore[no-untyped-call]
        runner.random = random_state(self.device)
        if frames.grad is None:
            raise ValueError(f"{type(runner.probe.head).__name__}: its loss does not depend on the states")
        return loss.detach(), frames.grad


class RecurrentStack(Separate):
    """Recurrent CTC heads (`BlstmCtc`) on a GPU: the trials of a seed go through as one stack, as many as memory is meant for."""

    def __init__(
        self, runners: Sequence[Runner], draws: Mapping[int, Draws], num_layers: int, budget: Budget, clip: float
    ) -> None:
        """See `Company`."""
        super().__init__(runners, draws, num_layers, budget, clip)
        head = self.runners[0].probe.head
        assert isinstance(head, BlstmCtc)
        self._stack = BlstmStack(self.updater, head, first=1, plain=self.device.type != "cuda")

    def _heads(self, mixed: Tensor, batch: Batch, held: int, members: Sequence[int], losses: Tensor) -> Tensor:
        """See `Separate`."""
        gradient, done = torch.empty_like(mixed), 0
        for trials in consecutive(members, max(1, ROWS_TOGETHER // mixed[0, ..., 0].numel())):
            several = self.runners[trials]
            for runner in several:
                runner.probe.train()
            frames = mixed[done : done + len(several)].detach().requires_grad_()
            losses[trials] += self._stack.learn(several, trials, frames, batch, held / self.accumulate)
            assert frames.grad is not None
            gradient[done : done + len(several)] = frames.grad
            done += len(several)
        return gradient


class FrameStack(Company):
    """Frame-by-frame linear heads (`FrameCtc`): the trials of a seed are one batched product over the same frames."""

    def __init__(
        self, runners: Sequence[Runner], draws: Mapping[int, Draws], num_layers: int, budget: Budget, clip: float
    ) -> None:
        """See `Company`."""
        super().__init__(runners, draws, num_layers, budget, clip)
        self._stack = LinearStack(self.updater, first=1)
        self.stride = GRAPH_UPDATES if self.device.type == "cuda" else 1

    @torch.no_grad()
    def learn(self, count: int) -> None:
        """Make some updates of all trials."""
        for _ in range(count):
            losses = torch.zeros(len(self.runners), device=self.device)
            for draw, group in self.groups:
                for number in range(self.accumulate):
                    losses[group] += self._accumulate(draw, group, add=number > 0)
            self.updater.step(losses)

    def _accumulate(self, draw: Draws, group: slice, *, add: bool) -> Tensor:
        """Write or add one batch's gradients of the trials of one seed; (n,) losses."""
        states, batch = draw.batch()
        mixer = self.mixer.part(range(group.start, group.stop))
        mixture = mixer.mixture()
        mixed = mix(mixture, states).flatten(1, 2)
        hidden, logits = self._stack.forward(mixed, group)
        targets = batch.targets["tokens"], batch.targets["tokens_lengths"]
        losses, gradient = token_losses(logits.view(len(logits), *states.shape[1:3], -1), batch.num_frames, *targets)
        gradient = gradient.flatten(1, 2) / self.accumulate
        slopes = self._stack.backward(mixed, hidden, gradient, group, add=add)
        weights = self.updater.stacked(0, self.updater.gradients)[group]
        if not add:
            weights.zero_()
        if mixer.any_learnt:
            through = self._stack.through(slopes, group)
            weights += mixer.gradient(mixture, mixture_gradient(through, states))
        return losses / self.accumulate


class MeanStack(Company):
    """Linear heads on means that are all on the device (`UtteranceLinear`): an update is an index into them.

    Batches of one update become one, each row weighted by what it counts. On a GPU, `GRAPH_UPDATES` updates are one CUDA graph,
    and each is a few launches of its own where `mean_update.fits` says so.
    """

    stride = GRAPH_UPDATES

    def __init__(
        self,
        runners: Sequence[Runner],
        draws: Mapping[int, Draws],
        num_layers: int,
        budget: Budget,
        clip: float,
        states: States,
    ) -> None:
        """`states` hold their means; see `Company`."""
        super().__init__(runners, draws, num_layers, budget, clip)
        self._stack = LinearStack(self.updater, first=1)
        head = self.runners[0].probe.head
        assert isinstance(head, UtteranceLinear)
        self._sizes, self._rows = head.sizes, budget.batch * budget.accumulate
        assert states.means is not None
        self._states, self._means = states, states.means
        targets = [
            torch.stack([torch.stack([target[slot] for target in draw.targets]) for slot in head.classes], 1)
            for draw, _ in self.groups
        ]
        self._targets = torch.stack(targets).to(self.device)  # (seeds, U, slots)
        seeds = [place for place, (_, group) in enumerate(self.groups) for _ in range(group.start, group.stop)]
        self._seed_of = torch.tensor(seeds, device=self.device)
        self._seeds = torch.arange(len(self.groups), device=self.device)[:, None]
        self._even = len({group.stop - group.start for _, group in self.groups}) == 1
        inputs = self._means, self._targets, self._seed_of, self._sizes, self._rows
        whole = fits(self.updater, self._rows, self.device)
        self._whole = MeanUpdate(self.updater, self.mixer, *inputs) if whole else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._planned: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def learn(self, count: int) -> None:
        """Make some updates of all trials."""
        index, weights = self._next(count)
        if self.device.type == "cuda" and count == GRAPH_UPDATES:
            self._replay(index, weights)
            self._planned = self._plan(count) if self._planned is None else self._planned  # while the GPU works
            return
        index, weights = index.to(self.device), weights.to(self.device)
        for number in range(count):
            self._update(index[number], weights[number])

    def _next(self, count: int) -> tuple[Tensor, Tensor]:
        """The plan of the next updates: what was planned ahead first, and more where that is too short."""
        planned, self._planned = self._planned, None
        if planned is None:
            return self._plan(count)
        index, weights = planned
        if len(index) < count:
            more_index, more_weights = self._plan(count - len(index))
            return torch.cat([index, more_index]), torch.cat([weights, more_weights])
        if len(index) > count:
            self._planned = index[count:], weights[count:]
        return index[:count], weights[:count]

    def _plan(self, count: int) -> tuple[Tensor, Tensor]:
        """Places (updates, seeds, R, 2) among utterances and means, and weights (updates, R): 0 fills small batches up."""
        index = torch.zeros(len(self.groups), count * self._rows, 2, dtype=torch.long)
        weights = torch.zeros(count * self._rows)
        for place, (draw, _) in enumerate(self.groups):
            batches = [next(draw.rows) for _ in range(count * self.accumulate)]
            rows = torch.from_numpy(np.fromiter(chain.from_iterable(batches), np.int64))
            if place == 0:  # sizes are those of every seed: they have as many utterances
                sizes = torch.tensor([len(batch) for batch in batches])
                updates = sizes.view(count, -1)
                before = (updates.cumsum(1) - updates + torch.arange(count)[:, None] * self._rows).flatten()
                shift = before - (sizes.cumsum(0) - sizes)
                where = torch.arange(int(sizes.sum())) + shift.repeat_interleave(sizes)
                weights[where] = (1.0 / (sizes * self.accumulate)).repeat_interleave(sizes)
            index[place, where, 0] = rows
            index[place, where, 1] = self._states.draw_means(rows, sizes, draw.crops)
        index = index.view(len(self.groups), count, self._rows, 2).transpose(0, 1).contiguous()
        weights = weights.view(count, self._rows)
        return index, weights

    def _update(self, index: Tensor, weights: Tensor) -> None:
        """One update from places (seeds, R, 2) and the rows' weights (R,), without the host."""
        if self._whole is not None:
            self._whole(index, weights)
            return
        utterances, means = index.unbind(2)
        states = self._means.index_select(1, means.flatten()).float()
        states = states.view(len(states), len(means), -1).transpose(0, 1)  # (seeds, L, R * D)
        mixture = self.mixer.mixture()
        mixed = self._by_seed(mixture, states).view(len(mixture), means.shape[1], -1)
        targets = self._targets[self._seeds, utterances][self._seed_of]
        through, losses = torch.empty_like(mixed), mixed.new_empty(len(mixed))
        for part in self._stack.chunks:
            hidden, logits = self._stack.forward(mixed[part], part)
            losses[part], gradient = class_losses(logits, targets[part], self._sizes, weights)
            slopes = self._stack.backward(mixed[part], hidden, gradient, part, add=False)
            if self.mixer.any_learnt:
                through[part] = self._stack.through(slopes, part)
        if self.mixer.any_learnt:
            products = self._products(through, states)
            self.updater.stacked(0, self.updater.gradients).copy_(self.mixer.gradient(mixture, products))
        self.updater.step(losses)

    def _by_seed(self, rows: Tensor, states: Tensor) -> Tensor:
        """Products of every trial's row (N, a) with its seed's states (seeds, a, b): (N, b)."""
        if self._even:
            return torch.bmm(rows.view(len(self.groups), -1, rows.shape[1]), states).flatten(0, 1)
        return torch.cat([rows[group] @ each for (_, group), each in zip(self.groups, states, strict=True)])

    def _products(self, slopes: Tensor, states: Tensor) -> Tensor:
        """Inner products (N, L) of every trial's slopes (N, R, D) with each layer of its seed's states (seeds, L, R * D)."""
        if not self._even:
            return self._by_seed(slopes.flatten(1), states.transpose(1, 2))
        seeds, width = len(states), slopes.shape[2]
        utterances = states.view(*states.shape[:2], -1, width).permute(0, 2, 3, 1).flatten(0, 1)  # (seeds * R, D, L)
        rows = slopes.view(seeds, -1, *slopes.shape[1:]).transpose(1, 2).flatten(0, 1)  # (seeds * R, n, D)
        products = torch.bmm(rows, utterances)
        return products.view(seeds, -1, *products.shape[1:]).sum(1).flatten(0, 1)

    def _replay(self, index: Tensor, weights: Tensor) -> None:
        """Run one graph's updates, after capturing it the first time."""
        if self._graph is None:
            self._index, self._weights = index.to(self.device), weights.to(self.device)
            before = [tensor.clone() for tensor in self.updater.state()]
            side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                self._update(self._index[0], self._weights[0])
            torch.cuda.current_stream(self.device).wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                for number in range(len(index)):
                    self._update(self._index[number], self._weights[number])
            for tensor, value in zip(self.updater.state(), before, strict=True):  # the warm-up was no update
                tensor.copy_(value)
        self._index.copy_(index)
        self._weights.copy_(weights)
        self._graph.replay()


def make_company(
    runners: Sequence[Runner], draws: Mapping[int, Draws], states: States, num_layers: int, budget: Budget, clip: float
) -> Company:
    """The fastest way to train some trials that gives each what it gets alone.

    Args:
        runners: the trials.
        draws: batches by seed.
        states: of the training split.
        num_layers: that the states have.
        budget: of training.
        clip: largest gradient norm.
    """
    heads = [runner.probe.head for runner in runners]
    if can_stack(heads):
        if not isinstance(heads[0], UtteranceLinear):
            return FrameStack(runners, draws, num_layers, budget, clip)
        if states.means is not None:
            return MeanStack(runners, draws, num_layers, budget, clip, states)
    if can_stack_recurrent(heads, next(runners[0].probe.parameters()).device):
        return RecurrentStack(runners, draws, num_layers, budget, clip)
    return Separate(runners, draws, num_layers, budget, clip)
