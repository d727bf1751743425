"""The measuring itself: things take turns in one process, and what is compared are the two times of one turn."""

from __future__ import annotations

import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.callbacks.efficiency import peak_memory_mib, reset_peak_memory

Times = Mapping[str, list[float]]
PEER, LIMIT = "PEFT", "limit"


@dataclass
class Step:
    """The forward and backward pass of a training step. The optimizer is left out: it's the same for all."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]

    def __call__(self) -> None:
        self.model.zero_grad()
        self.loss(self.model).backward()


@dataclass
class Case:
    """What takes turns: one line of the tables for each variant of ours.

    Attributes:
        name: of the line.
        runs: what is timed, by the name of the variant; :data:`PEER` and :data:`LIMIT` among them.
        agree: for each variant of ours how far what it computes is from what the peer does, where they should agree.
        limits: what a run is held against, where that isn't :data:`LIMIT`.
    """

    name: str
    runs: dict[str, Callable[[], Any]]
    agree: dict[str, Callable[[], float]] = field(default_factory=dict)
    limits: dict[str, str] = field(default_factory=dict)


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each, A B C C B A …, so that a drift favours none; what the first turns take isn't counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    there = list(runs.items())
    for turn in range(rounds + warm_up):
        for name, run in there if turn % 2 == 0 else reversed(there):
            start = time.perf_counter()
            run()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def step_by_step(
    loops: Mapping[str, Callable[[Iterable[Any]], Any]], batches: Sequence[Any], warm_up: int
) -> dict[str, list[float]]:
    """Seconds of each step of some loops over batches, a step of A, one of B, …; the first and the last aren't counted.

    Whatever drives the loops (a Trainer), their steps are next to each other in time: they're in threads of which one
    at a time is on, and which it is changes whenever one asks for its next batch. A step lasts from batch to batch.

    Args:
        loops: each takes all batches, once.
        batches: for each of them.
        warm_up: how many first steps aren't counted.

    Raises:
        RuntimeError: if a loop fails or doesn't take all batches, with its error as the cause.
    """
    turns = _Turns(len(loops))
    given = [_Given(batches, turns, place) for place in range(len(loops))]

    def go(loop: Callable[[Iterable[Any]], Any], own: _Given) -> None:
        try:
            turns.wait(own.place)
            loop(own)
            if len(own.seconds) < len(batches) - 1:
                raise ValueError(f"A loop ended after {len(own.seconds)} of {len(batches)} steps.")
            turns.wake(own.place + 1)
        except BaseException as error:
            turns.end(error)

    threads = [threading.Thread(target=go, args=pair) for pair in zip(loops.values(), given, strict=True)]
    for thread in threads:
        thread.start()
    turns.wake(0)
    for thread in threads:
        thread.join()
    turns.check()
    return {name: own.seconds[warm_up : len(batches) - 1] for name, own in zip(loops, given, strict=True)}


class _Turns:
    """Which of some threads is on."""

    def __init__(self, count: int) -> None:
        self._semaphores = [threading.Semaphore(0) for _ in range(count)]
        self._error: BaseException | None = None

    def wake(self, place: int) -> None:
        self._semaphores[place % len(self._semaphores)].release()

    def wait(self, place: int) -> None:
        self._semaphores[place].acquire()
        self.check()

    def end(self, error: BaseException) -> None:
        """Let none go on."""
        self._error = self._error or error
        for semaphore in self._semaphores:
            semaphore.release()

    def check(self) -> None:
        if self._error is not None:
            raise RuntimeError("A loop has failed.") from self._error


@dataclass
class _Given:
    """The batches as one of the loops gets them. They have a length: else a Trainer would ask for each one early."""

    batches: Sequence[Any]
    turns: _Turns
    place: int
    seconds: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.turns.wake(self.place + 1)
            self.turns.wait(self.place)
            start = time.perf_counter()
            yield batch
            self.seconds.append(time.perf_counter() - start)


def ratio(times: Times, over: str, under: str) -> float:
    """The median, over the turns, of one's time over the other's."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def figures(case: Case, rounds: int) -> dict[str, Any]:
    """Everything of a case but the memory of processes of their own."""
    agreement = {name: difference() for name, difference in case.agree.items()}
    saved = {name: saved_mib(run) for name, run in case.runs.items() if isinstance(run, Step)}
    times = in_turns(case.runs, rounds, warm_up=0 if saved else 1)  # those whose bytes were counted are warm
    return {"case": case.name, **ratios(times, limits=case.limits), "saved_mib": saved, "differs": agreement}


def ratios(times: Times, peer: str = PEER, limits: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The medians of the times, and how they compare; ``limits`` as of :class:`Case`."""
    limits = limits or {}
    ours = [name for name in times if name not in (peer, LIMIT, *limits.values())]
    against = {name: limits.get(name, LIMIT) for name in (peer, *ours)}
    return {
        "peer": peer,
        "seconds": {name: statistics.median(found) for name, found in times.items()},
        "peer_over_ours": {name: ratio(times, peer, name) for name in ours},
        "over_limit": {name: ratio(times, name, limit) for name, limit in against.items() if limit in times},
    }


def saved_mib(step: Step) -> float:
    """What autograd keeps from the forward pass for the backward pass, without the parameters, in MiB."""
    own = {parameter.untyped_storage().data_ptr() for parameter in step.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # the graph holds it, so that no other takes its place

    step.model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.loss(step.model)
    found = sum(kept.values()) / 2**20
    loss.backward()
    return found


def peak_mib(step: Callable[[], Any], times: int = 3) -> float:
    """How far the process's resident memory rises above what it is now; Linux."""
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    start = peak_memory_mib(cpu)
    for _ in range(times):
        step()
    return peak_memory_mib(cpu) - start


def largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference in a tensor relative to the largest value in it, of the tensor where that is largest."""
    if set(ours) != set(theirs):
        raise AssertionError(f"not the same tensors: {sorted(set(ours) ^ set(theirs))[:6]}")
    pairs = [(ours[name].detach().float(), theirs[name].detach().float()) for name in ours]
    return max(((a.view_as(b) - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def machine() -> dict[str, Any]:
    """What it was measured on."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of what was measured."""
    import accelerate
    import bitsandbytes
    import lightning
    import peft
    import transformers

    import lightning_ft

    modules = (lightning_ft, torch, lightning, transformers, peft, accelerate, bitsandbytes)
    return {module.__name__: module.__version__ for module in modules}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines: Iterator[str] = iter(info.read_text().splitlines() if info.is_file() else [])
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
