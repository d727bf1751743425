"""The first-step doctor: what goes wrong silently in a fine-tune shows after one optimizer step, and is told then.

what is looked at                 what it would mean
a gradient for all that trains    what has none never learns: it isn't on the way from the data to the loss
the frozen base, by samples       something trains it that should not, or writes to it
the loss                          NaN or infinite: all that follows is lost
the learning rate                 far from what is usual for the method: most often another method's
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ft.callbacks.finetuning import FineTuning, check_choice, count_parameters, methods_of
from lightning_ft.errors import UserError
from lightning_ft.files.state import sampled
from lightning_ft.injection import Base, find_base

OnFault = Literal["warn", "raise"]


class DoctorError(UserError, RuntimeError):
    """Something is wrong after the first optimizer step; the message says what, and what helps."""


@dataclass(frozen=True)
class Report:
    """What the first step showed.

    Attributes:
        faults: what is wrong, each with its likely cause; none when all is well.
        facts: what was seen, in one line.
        dtypes: by what it is (``trained``, ``frozen``, ``optimizer``) and dtype, how many bytes it takes.
    """

    faults: tuple[str, ...]
    facts: str
    dtypes: Mapping[tuple[str, str], int]

    def __str__(self) -> str:
        """A line when all is well; else the faults and a table."""
        if not self.faults:
            return f"Doctor: all well after the first step: {self.facts}."
        rows = [[kind, dtype, f"{size / 2**20:,.2f} MiB"] for (kind, dtype), size in sorted(self.dtypes.items())]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        table = [f"  {kind:<{widths[0]}}  {dtype:<{widths[1]}}  {size:>{widths[2]}}" for kind, dtype, size in rows]
        told = [f"  {number}. {fault}" for number, fault in enumerate(self.faults, 1)]
        count = f"{len(told)} fault{'s' if len(told) > 1 else ''}"
        return "\n".join([f"Doctor: {count} after the first step ({self.facts}):", *told, *table])


class Doctor(Callback):
    """Looks at any training once, after its first optimizer step, and says in a line that all is well, or what isn't.

    ``L.Trainer(callbacks=[LoRA(), Doctor()])``; in a resumed fit it's the first step after the checkpoint. It looks at
    what this module's head names. A parameter that a method lets wait (gradual unfreezing) needs no gradient yet, nor
    what the LightningModule's own ``without_gradient()`` lists, if it has one; a gradient of zeros, as LoRA's A has at
    first, is one. Without a method's callback what is frozen may change, as an averaged teacher does. Learning rates
    are judged for Adam and its kin, whose steps they are the length of, after a schedule's warm-up.

    Args:
        on_fault: ``"warn"``, or ``"raise"``: a :class:`DoctorError` that ends the training.

    Attributes:
        report: what it found, once it has looked.

    Raises:
        ValueError: for another ``on_fault``.
    """

    def __init__(self, on_fault: OnFault = "warn") -> None:
        check_choice("Doctor: on_fault", on_fault, get_args(OnFault))
        self.on_fault: OnFault = on_fault
        self.report: Report | None = None
        self._looked = True
        self._step = 0
        self._before: dict[str, Tensor] = {}
        self._stepped: dict[nn.Parameter, bool] = {}  # what an optimizer has stepped on, and whether it had a gradient

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the frozen base."""
        self.report, self._looked, self._step = None, False, trainer.global_step
        self._before = {name: value for base in _bases(trainer, pl_module) for name, value in sampled(base).items()}
        self._stepped = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """See which gradients there are."""
        if not self._looked:
            held = [p for group in optimizer.param_groups for p in group["params"]]
            self._stepped.update({p: p.grad is not None or self._stepped.get(p, False) for p in held})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, if a step was taken."""
        if self._looked or trainer.global_step == self._step:
            return
        self._looked = True
        self.report = self._look(trainer, pl_module, outputs)
        self._before, self._stepped = {}, {}
        self._tell(self.report)

    def _look(self, trainer: Trainer, module: LightningModule, outputs: Any) -> Report:
        loss = _loss(outputs, trainer.accumulate_grad_batches if module.automatic_optimization else 1)
        rates, changed = _rates(trainer, module), self._changed(trainer, module)
        faults = [
            *self._without_gradient(trainer, module),
            *changed,
            *_unusable(loss),
            *(fault for method in methods_of(trainer) for fault in _implausible(method, rates)),
        ]
        total, trained = count_parameters(module)
        facts = {
            f"{sum(self._stepped.values())} tensors have a gradient": any(self._stepped.values()),
            f"the frozen base ({len(self._before)} tensors) is unchanged": self._before and not changed,
            f"{trained / max(total, 1):.2%} of the parameters train": True,
            ", ".join(_held(module)): True,
            f"loss {loss:.4g}" if loss is not None else "": loss is not None,
            f"lr {max(rates, default=0):.3g}": rates,
        }
        return Report(
            tuple(faults), ", ".join(fact for fact, is_so in facts.items() if is_so), _dtypes(trainer, module)
        )

    def _tell(self, report: Report) -> None:
        if not report.faults:
            rank_zero_info(str(report))
        elif self.on_fault == "raise":
            raise DoctorError(str(report))
        else:
            rank_zero_warn(str(report))

    def _without_gradient(self, trainer: Trainer, module: LightningModule) -> list[str]:
        waiting = {p for method in methods_of(trainer) for p in method.without_gradient(module)}
        waiting.update(getattr(module, "without_gradient", list)())
        names = {p: name for name, p in module.named_parameters() if p.requires_grad and p not in waiting}
        missing = [name for p, name in names.items() if self._stepped.get(p) is False]
        held = {p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        # Some strategies (DeepSpeed) train tensors of their own in the place of the module's.
        judged = methods_of(trainer) and any(p in held for p in names)
        unheld = [name for p, name in names.items() if p not in held] if judged else []
        faults = []
        if missing:
            causes = _causes(module, missing, everything=len(missing) == len(names))
            ddp = " Under DDP the next step fails." if trainer.world_size > 1 else ""
            faults.append(
                f"{len(missing)} of {len(names)} trained tensors got no gradient: {_few(missing)}. {causes}{ddp}"
            )
        if unheld:
            faults.append(
                f"{len(unheld)} tensors are to train, and no optimizer holds them: {_few(unheld)}. Make the optimizer"
                " in configure_optimizers() from self.parameters(), or freeze them."
            )
        return faults

    def _changed(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        now = {name: value for base in _bases(trainer, pl_module) for name, value in sampled(base).items()}
        changed = [
            name
            for name, value in self._before.items()
            if name in now and not torch.allclose(now[name], value, rtol=0, atol=0, equal_nan=True)
        ]
        if not changed:
            return []
        return [
            f"{len(changed)} of {len(self._before)} tensors of the frozen base have changed: {_few(changed)}. An"
            " optimizer that was made before the base was frozen, a hook or the training step writes to them: what is"
            " saved would not be what was trained."
        ]


def _bases(trainer: Trainer, module: LightningModule) -> list[Base]:
    """The bases that the Trainer's methods hold frozen, each once."""
    backbones = dict.fromkeys(method.backbone for method in methods_of(trainer))
    return [find_base(module, backbone) for backbone in backbones]


def _causes(module: nn.Module, missing: Sequence[str], everything: bool) -> str:
    """What is the likeliest cause, and what helps."""
    modules = list(module.modules())
    reentrant = [m for m in modules if _keywords(m, "_gradient_checkpointing_func").get("use_reentrant") is True]
    if any(getattr(m, "gradient_checkpointing", False) for m in reentrant):
        return (
            "Gradient checkpointing with use_reentrant=True cuts the graph where a layer's input needs no gradient, as"
            " over a frozen base: use GradientCheckpointing(), or use_reentrant=False."
        )
    if everything:
        return "The loss doesn't depend on anything that trains: it's detached, or computed under torch.no_grad()."
    if all("pooler" in name.split(".") for name in missing):
        return (
            "The pooler's output is read by nobody: build the model with add_pooling_layer=False, or leave the pooler"
            " out of target_modules and modules_to_save."
        )
    return (
        "They aren't on the way from the data to the loss: their modules aren't called, or what they give is detached,"
        " or computed under torch.no_grad(). Leave them out (exclude_modules), or freeze them."
    )


def _keywords(module: nn.Module, name: str) -> Mapping[str, Any]:
    return getattr(getattr(module, name, None), "keywords", None) or {}


def _loss(outputs: Any, batches: int) -> float | None:
    """The loss of a training step that gives one; Lightning has divided it by the number of accumulated batches."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss.detach().float().mean().item() * batches if isinstance(loss, Tensor) else None


def _unusable(loss: float | None) -> list[str]:
    if loss is None or math.isfinite(loss):
        return []
    return [
        f"The loss is {loss}. Look at the data (empty rows, labels out of range), at the loss, and in fp16 at the"
        " precision: bf16-mixed has the range of fp32."
    ]


def _rates(trainer: Trainer, module: LightningModule) -> list[float]:
    """The learning rates, at their height, of the groups of Adam's kin that train (of) the base, if one does."""
    bases = _bases(trainer, module)
    of_base = {p for base in bases for _, p in base.named_parameters() if p.requires_grad}
    found: dict[bool, list[float]] = {True: [], False: []}
    for optimizer in trainer.optimizers:
        inner = getattr(optimizer, "optimizer", optimizer)  # DeepSpeed's wrap them
        if "adam" not in type(inner).__name__.lower():
            continue
        for group in optimizer.param_groups:
            rate = group.get("max_lr", group.get("initial_lr", group.get("lr")))  # OneCycleLR's, or before any warm-up
            if rate is not None and any(p.requires_grad for p in group["params"]):
                found[any(p in of_base for p in group["params"])].append(float(rate))
    return found[True] or found[False]


def _implausible(method: FineTuning, rates: Sequence[float]) -> list[str]:
    low, high = method.plausible_lr
    if not rates or low <= max(rates) <= high:
        return []
    much = "low" if max(rates) < low else "high"
    return [
        f"The learning rate {max(rates):.3g} is unusually {much} for {type(method).__name__}: {low:g} to {high:g} is"
        " usual. Is it another method's?"
    ]


def _held(module: nn.Module) -> list[str]:
    """In what dtypes parameters are."""
    kinds = {"trained": True, "frozen": False}
    dtypes = {
        kind: Counter(_name(p.dtype) for p in module.parameters() if p.requires_grad is trains)
        for kind, trains in kinds.items()
    }
    return [f"{kind} in {' and '.join(sorted(names))}" for kind, names in dtypes.items() if names]


def _dtypes(trainer: Trainer, module: nn.Module) -> Counter[tuple[str, str]]:
    """The bytes of parameters and optimizer states, by what they are and their dtype."""
    sizes: Counter[tuple[str, str]] = Counter()
    for parameter in module.parameters():
        sizes["trained" if parameter.requires_grad else "frozen", _name(parameter.dtype)] += parameter.nbytes
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            for tensor in (value for value in state.values() if isinstance(value, Tensor) and value.ndim):
                sizes["optimizer", _name(tensor.dtype)] += tensor.nbytes
    return sizes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"
