"""A student that learns the logits of its teacher, step by step."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from sparserve.compression.healing import Heal
from sparserve.healing.divergence import divergence
from sparserve.healing.network import Network
from sparserve.healing.state import Look, State, StateFile, Tensors
from sparserve.healing.text import Windows
from sparserve.healing.through import Through

WARMUP = 0.03  # of the steps; the rate then falls along half a cosine
LAST_RATE = 0.05  # of the highest
SLOW_RATE = 0.25  # of that of low-rank terms: norms and biases, which all tokens share
LARGEST_GRADIENT = 1.0  # length of all together
# An objective of so many times the first one, or one that is no number: the run has diverged.
DIVERGED = 2.0
NOTHING = 1e-6  # an objective that no step can make smaller


class CannotHeal(Exception):
    """What the first look says of the student, without its name."""


def nothing_to_heal(through: str) -> str:
    return (
        f"answers as the original does, through {through}: there is nothing to heal. Prune or round it first, "
        "or go through the policy that will serve, as in core:0.5"
    )


@dataclass(frozen=True, slots=True)
class Progress:
    """Told after each step, and of the look before the first one."""

    step: int
    steps: int
    loss: float | None  # KL of the step
    tokens_per_second: float
    look: Look | None  # where this step ended with one


@dataclass(frozen=True, slots=True, eq=False)
class Healed:
    looks: list[Look]
    best: Look
    steps: int  # that were taken
    diverged: bool


OnProgress = Callable[[Progress], None]


def train(
    student: Network,
    teacher: Network,
    how: Heal,
    through: Through,
    windows: Windows,
    kept: StateFile,
    accelerator: Accelerator,
    on_progress: OnProgress,
) -> Healed:
    """`student` is then at its best look. A run that was interrupted goes on from its last look, to the same
    result with as many threads and processes.

    Raises CannotHeal.
    """
    run = _Run(student, teacher, how, through, windows, kept, accelerator, on_progress)
    return run.to_its_end()


class _Run:
    def __init__(
        self,
        student: Network,
        teacher: Network,
        how: Heal,
        through: Through,
        windows: Windows,
        kept: StateFile,
        accelerator: Accelerator,
        on_progress: OnProgress,
    ) -> None:
        self._how, self._through, self._windows = how, through, windows
        self._kept, self._accelerator, self._on_progress = kept, accelerator, on_progress
        self._plain, self._teacher = student, teacher.requires_grad_(False)
        optimizer = torch.optim.AdamW(_groups(student, how.learning_rate), weight_decay=0.0)
        teacher.to(accelerator.device)
        through.attach(student)
        self._student, self._optimizer = accelerator.prepare(student, optimizer)
        self._state = self._resumed()
        self._losses: list[float] = []  # since the last look

    def to_its_end(self) -> Healed:
        state, how = self._state, self._how
        looks_at = {round(how.steps * n / how.evaluations) for n in range(1, how.evaluations + 1)}
        if not state.looks:
            look = self._look()
            self._refuse(look)
            self._tell(Progress(0, how.steps, None, 0.0, look))
        diverged = self._has_diverged()
        begun, first = time.perf_counter(), state.step
        while state.step < how.steps and not self._is_over() and not diverged:
            loss = self._step(state.step)
            state.step += 1
            self._losses.append(loss)
            diverged = not math.isfinite(loss)
            seen = None
            if diverged or state.step in looks_at:
                seen = self._look()
                diverged = diverged or self._has_diverged()
            done = (state.step - first) * how.batch * how.window
            speed = done / (time.perf_counter() - begun)
            self._tell(Progress(state.step, how.steps, loss, speed, seen))
        self._plain.load_state_dict(state.best)
        return Healed(state.looks, state.best_look, state.step, diverged)

    def _refuse(self, look: Look) -> None:
        """Raises CannotHeal of a first look that no step can make better."""
        if not math.isfinite(look.objective):
            raise CannotHeal(
                f"has logits that are no finite numbers, through {self._how.through}, or its original has: weights are "
                "damaged, or too large for bfloat16, which healing cannot repair. Take another copy of the model"
            )
        if look.objective < NOTHING:
            raise CannotHeal(nothing_to_heal(self._how.through))

    def _tell(self, progress: Progress) -> None:
        if self._accelerator.is_main_process:
            self._on_progress(progress)

    def _step(self, step: int) -> float:
        """-> its KL; what is made small has the spread, too."""
        how = self._how
        rate = _rate(step, how.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["highest"] * rate
        token_ids = self._batch(step)
        prompt = self._through.prompt_tokens(how.window, random.Random(f"{how.seed}/{step}"))
        loss = objective = self._loss(token_ids, prompt, watch=how.concentrate > 0)
        if how.concentrate:
            objective = loss + how.concentrate * self._through.spread()
        self._accelerator.backward(objective)
        self._accelerator.clip_grad_norm_(self._plain.parameters(), LARGEST_GRADIENT)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(self._accelerator.reduce(loss.detach(), "mean"))

    def _loss(self, token_ids: torch.Tensor, prompt_tokens: int, *, watch: bool) -> torch.Tensor:
        """Of the rows after the prompt, its last one among them: those whose tokens are drawn."""
        first = max(0, prompt_tokens - 1)
        with torch.no_grad():
            exact = self._teacher(token_ids)[:, first:].flatten(0, 1)
        self._through.begin(prompt_tokens, watch=watch)
        own = self._student(token_ids, self._through)[:, first:].flatten(0, 1)
        return divergence(own, self._plain.head, exact, self._teacher.head)

    def _batch(self, step: int) -> torch.Tensor:
        """This process's part of the step's windows; each epoch has an order of its own."""
        count, batch = len(self._windows.training), self._how.batch
        rows = []
        for place in range(step * batch, (step + 1) * batch):
            epoch, index = divmod(place, count)
            rows.append(int(_order(count, self._how.seed, epoch)[index]))
        own = rows[self._accelerator.process_index :: self._accelerator.num_processes]
        return self._windows.training[own].to(self._accelerator.device)

    def _look(self) -> Look:
        state, training = self._state, None
        if self._losses:
            mean = sum(self._losses) / len(self._losses)
            training = mean if math.isfinite(mean) else None
            self._losses.clear()
        self._through.renew()  # so that a look is of the weights alone, in every process
        held_out, spread = self._held_out()
        objective = held_out + self._how.concentrate * spread
        look = Look(state.step, training, held_out, spread, objective)
        state.looks.append(look)
        state.parameters = _parameters(self._plain)
        if look is state.best_look or not state.best:
            state.best = state.parameters
        state.moments = _moments(self._plain, self._optimizer.optimizer)
        if self._accelerator.is_main_process:
            self._kept.save(state)
        self._through.renew()
        return look

    @torch.no_grad()
    def _held_out(self) -> tuple[float, float]:
        """-> (mean KL, spread)"""
        windows, how = self._windows.held_out, self._how
        prompt = self._through.prompt_tokens(how.window, None)
        kl = spread = 0.0
        for own in torch.split(windows, how.batch):
            share = len(own) / len(windows)
            loss = self._loss(own.to(self._accelerator.device), prompt, watch=True)
            kl += share * float(loss)
            spread += share * float(self._through.spread())
        # Processes must decide alike, to the last bit.
        both = torch.tensor([kl, spread], device=self._accelerator.device)
        kl, spread = self._accelerator.reduce(both, "mean").tolist()
        return (kl, spread) if math.isfinite(kl) else (math.inf, 0.0)

    def _is_over(self) -> bool:
        """No better look for long."""
        looks = self._state.looks
        return len(looks) - 1 - looks.index(self._state.best_look) >= self._how.patience

    def _has_diverged(self) -> bool:
        looks = self._state.looks
        return looks[-1].objective > DIVERGED * max(looks[0].objective, 1e-3)

    def _resumed(self) -> State:
        state = self._kept.load()
        names = {name for name, _ in self._plain.named_parameters()}
        if state is None or state.parameters.keys() != names or state.best.keys() != names:
            return State()
        self._plain.load_state_dict(state.parameters)
        _set_moments(self._plain, self._optimizer.optimizer, state.moments)
        return state


def _groups(student: Network, rate: float) -> list[dict[str, object]]:
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    for name, own in student.named_parameters():
        (slow if "norm" in name or name.endswith("down_bias") else fast).append(own)
    return [
        {"params": params, "highest": highest, "lr": highest}
        for params, highest in ((fast, rate), (slow, rate * SLOW_RATE))
        if params
    ]


def _rate(step: int, steps: int) -> float:
    """Of the highest."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def _order(count: int, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)


def _parameters(student: Network) -> Tensors:
    return {name: own.detach().cpu().clone() for name, own in student.named_parameters()}


def _moments(student: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    return {
        f"{name}/{moment}": value.detach().cpu().clone()
        for name, own in student.named_parameters()
        for moment, value in optimizer.state.get(own, {}).items()
    }


def _set_moments(student: nn.Module, optimizer: torch.optim.Optimizer, moments: Tensors) -> None:
    for name, own in student.named_parameters():
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            if (value := moments.get(f"{name}/{moment}")) is not None:
                device = "cpu" if moment == "step" else own.device
                optimizer.state[own][moment] = value.to(device)
