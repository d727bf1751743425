"""FineTuning: the base class of every method's callback. It does the Lightning work; methods do the maths.

hook              what happens there
setup             inject, before configure_optimizers; or arrange that it happens after the module's
                  own setup() or configure_model(), if it overrides them; under FSDP2 before
                  configure_model(), which shards
on_fit_start      the user's optimizers get what was injected, and lose what was frozen
on_train_batch_   frozen BatchNorms evaluate, injected dropouts drop, for as long as the batch trains
  start, _end
teardown,         the module's hooks and modes are as they were
  on_exception
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from inspect import signature
from itertools import compress
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from lightning_ft.callbacks.checkpoint_io import AdapterCheckpointIO
from lightning_ft.callbacks.sharding import exchanges, gather_checkpoints, shards
from lightning_ft.files.peft import INSIDE
from lightning_ft.files.state import frozen_modules
from lightning_ft.injection import (
    Base,
    Injected,
    InjectionError,
    all_or_nothing,
    find_base,
    injected_modules,
    is_quantized,
    is_thawed,
    match_modules,
)
from lightning_ft.quantization import Quantization, count, pack, settle

log = logging.getLogger(__name__)

AdapterDtype = Literal["float32", "bfloat16"]

_BUILDERS = ("setup", "configure_model")  # the hooks in which a module may build itself, in Lightning's order


class FineTuning(Callback, ABC):
    """Fine-tune the user's LightningModule by one method.

    A subclass has an :meth:`inject`, and arguments that are plain values, each kept under its own name. The
    module needs no base class of ours and may be built in ``__init__``, ``setup()`` or ``configure_model()``.
    Checkpoints hold all but the frozen base, and resume with Lightning's own ``fit(ckpt_path=...)``. A frozen model
    beside the base, a teacher, is in them too: nothing tells it from one that's averaged in the module's own steps.

    Several methods in one Trainer work together if they act on different things (``[LoRA(), BitFit()]``): the union
    trains, in whatever order they're listed. If one of them is refused, none goes in. What a method has put into a
    module stays and goes on training, in a later fit with another callback too, until merged.

    Args:
        modules_to_save: parts of the base to train whole and save beside what the method adds: paths, or
            ends of paths, of modules (``"norm"`` is no ``input_layernorm``, as it is to PEFT). A task head needs
            no mention.
        backbone: path of the pretrained base in the module; found by itself where there is just one
            Hugging Face model (see :func:`lightning_ft.injection.find_base`).
        quantize: pack the frozen base before the method goes on: ``"nf4"``, ``"fp4"``, ``"int8"``, or
            ``{"kind": "nf4", "double": False}`` (:mod:`lightning_ft.quantization`). It needs bitsandbytes. A base that
            was loaded packed needs no word here.
        adapter_dtype: what holds the parameters that the method adds, whatever ``precision`` says: ``"float32"``, in
            which small updates aren't lost, or to save memory ``"bfloat16"`` (PEFT has fp32 masters by default too,
            ``autocast_adapter_dtype``). They compute in it, unless autocast says otherwise.

    Raises:
        ValueError: for another ``adapter_dtype``. In fp16 gradients would vanish, and gradient scaling refuses it.
    """

    # No dataclass: OmegaConf takes one that's passed through hydra's instantiate() for a config.
    def __init__(
        self,
        modules_to_save: Sequence[str] | None = None,
        backbone: str | None = None,
        quantize: str | Mapping[str, Any] | None = None,
        *,
        adapter_dtype: AdapterDtype = "float32",
    ) -> None:
        check_choice(f"{type(self).__name__}: adapter_dtype", adapter_dtype, get_args(AdapterDtype))
        self.modules_to_save = modules_to_save
        self.backbone = backbone
        self.quantize = quantize
        self.adapter_dtype: AdapterDtype = adapter_dtype
        self._quantization = None if quantize is None else Quantization.of(quantize)
        self._told = False  # what injection did, once for fit, validate and test
        self._norms: list[nn.Module] = []  # frozen ones, which evaluate while a batch trains
        self._evaluated: list[nn.Module] = []  # those of them that were in training mode
        self._adapted: list[Injected] = []  # whose own dropout drops while a batch trains
        self._neighbours: list[FineTuning] = []

    peft_type: ClassVar[str]
    """The method's name in files."""

    layers: ClassVar[tuple[type[Injected], ...]] = ()
    """What it puts into a model. A method that adds something overrides ``to_peft`` and ``from_peft`` too."""

    inside: ClassVar[str] = INSIDE
    """What stands before the names of the Hugging Face model's own tensors in the method's files."""

    num_virtual_tokens: int = 0
    """How many of the model's positions it takes for itself."""

    decides_alone: ClassVar[bool] = False
    """Whether it says of every parameter of the base if it trains, so that no second method can."""

    trains_of_base: ClassVar[Literal["nothing", "vectors", "weights"]] = "nothing"
    """What of the base's own it trains by itself: its vectors (biases, norms), or its weights, which packed can't."""

    @abstractmethod
    def inject(self, model: nn.Module) -> list[str]:
        """Freeze the base and put the method into ``model``, in place. Doing it twice is doing it once.

        Args:
            model: any module; needs no Trainer.

        Returns:
            Paths of the modules it touched.

        Raises:
            InjectionError: if the base or the targets can't be found, or were injected with other settings.
        """

    def prepare(self, model: nn.Module) -> tuple[Base, list[str]]:
        """The base that the method goes into, quantized if so asked, and what of it ``modules_to_save`` names."""
        base = find_base(model, self.backbone)
        saved = match_modules(base, self.modules_to_save)
        if self._quantization is None:
            settle(base)
        else:
            pack(base, self._quantization, saved)
        return base, saved

    @property
    def added_dtype(self) -> torch.dtype:
        """:attr:`adapter_dtype` as torch has it."""
        dtype: torch.dtype = getattr(torch, self.adapter_dtype)
        return dtype

    def describe(self, model: nn.Module, names: Sequence[str]) -> str:
        """One line on what :meth:`inject` did to ``model``; ``names`` is what it returned."""
        return describe(model, names)

    plausible_lr: ClassVar[tuple[float, float]] = (0.0, float("inf"))
    """The least and the greatest learning rate, for Adam and its kin, beyond which there is most likely a mistake."""

    def without_gradient(self, model: nn.Module) -> Collection[nn.Parameter]:
        """What trains, but rightly had no part in the batch that was trained last."""
        return ()

    @property
    def settled(self) -> bool:
        """Whether the model in training has the form by now that it is to have in the end."""
        return True

    def finish(self, model: nn.Module) -> None:
        """Take out of a trained model what has no part in its outputs, e.g. when a checkpoint was loaded into it."""

    @staticmethod
    def to_peft(layers: Mapping[str, Injected], base: Base) -> dict[str, Any]:
        """The fields of ``adapter_config.json`` for these layers, by path."""
        raise NotImplementedError

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], targets: Sequence[str], modules_to_save: Sequence[str], backbone: str | None
    ) -> FineTuning:
        """The method that ``config`` describes, on the modules that its tensors belong to.

        Raises:
            ValueError: for what isn't known here.
        """
        raise NotImplementedError

    @classmethod
    def read_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG003
        """An adapter's tensors as the method holds them, from those that PEFT wrote with ``config``."""
        return dict(tensors)

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Inject now, or right after the module has built itself; what was merged is evaluated as it is."""
        self._neighbours = self._refuse_others(trainer)
        hook = _last_builder(pl_module)
        inject = partial(self._inject, pl_module, anew=stage == "fit")
        self._precede_averaging(trainer, inject, hook)
        _wrap_checkpoint_io(trainer)
        if hook is None:
            inject()
        elif hook == "configure_model" and shards(trainer.strategy):
            _around(pl_module, hook, partial(self._inject_if_built, pl_module, inject), inject)
        else:
            _around(pl_module, hook, None, inject)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the optimizers hold just what trains, and that no other callback changes what doesn't."""
        base = find_base(pl_module, self.backbone)
        if not exchanges(trainer.strategy):
            _cover(pl_module, base, trainer.optimizers)
        if _averaging(trainer, "StochasticWeightAveraging") and _frozen_norms(base):
            raise InjectionError(
                "StochasticWeightAveraging takes new statistics for every BatchNorm, and those of the frozen base must"
                " stay as they were pretrained. Average with WeightAveraging or EMAWeightAveraging."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A fit that resumes within an epoch starts none, so that its modes are found here."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the modules whose modes matter: frozen BatchNorms evaluate, injected dropouts drop.

        Lightning's ``fit`` doesn't call ``.train()``, and ``requires_grad=False`` doesn't stop a BatchNorm's
        running statistics. Everything else keeps the mode that the user gave it, the dropout of a module that carries
        something (attention) too.
        """
        self._restore_modes()  # a batch that a hook skips has no end
        base = find_base(pl_module, self.backbone)
        self._norms = list(_frozen_norms(base))
        self._adapted = [layer for _, layer in injected_modules(base.root)]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Give them those modes for as long as the batch trains; what must evaluate goes by no ``.train()`` in it.

        Not by hooks on their forward: what torch.compile compiled earlier would pass those by.
        """
        self._evaluated += [norm for norm in self._norms if norm.training]
        for norm in self._norms:
            norm.training = False
            norm.train = lambda mode=True, norm=norm: norm  # type: ignore[method-assign, misc]  # noqa: ARG005
        for layer in self._adapted:
            vars(layer)["added_drops"] = True  # nn.Module's own __setattr__ costs ten times as much, in every step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give them the user's again."""
        self._restore_modes()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its hooks and modes back."""
        _restore_hooks(pl_module)
        self._restore_modes()
        self._norms, self._adapted = [], []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its hooks and modes back."""
        self.teardown(trainer, pl_module, "")

    # ------------------------------------------------------------------ for checkpoints

    def record(self) -> dict[str, Any]:
        """Plain values from which :func:`lightning_ft.load_from_checkpoint` makes this callback again."""
        arguments = {name: _plain(getattr(self, name)) for name in signature(type(self)).parameters}
        return {"method": type(self).__name__, "arguments": arguments}

    def _inject(self, model: nn.Module, anew: bool = True) -> None:
        """Inject this method and its neighbours; unless ``anew``, not into a base that was merged."""
        # Those that add nothing first: what of the base they train is theirs, whoever trained it before. Then those
        # that train modules whole, which the others leave out.
        methods = sorted([self, *self._neighbours], key=lambda m: (bool(m.layers), not m.modules_to_save))
        if not anew:
            methods = [method for method in methods if not is_thawed(find_base(model, method.backbone))]
        with all_or_nothing(model):  # where one is refused, none goes in
            touched = [method.inject(model) for method in methods]
        if self in methods and not self._told:
            rank_zero_info(f"{type(self).__name__}: {self.describe(model, touched[methods.index(self)])}")
            self._told = True

    def _inject_if_built(self, model: nn.Module, inject: Callable[[], None]) -> None:
        """Inject before the module is sharded. One that is built and sharded in one hook must inject by itself."""
        try:
            base = find_base(model, self.backbone)
        except InjectionError:
            return  # injection after the hook says what is wrong
        if self._quantization is not None or any(is_quantized(module) for _, module in base.named_modules()):
            raise InjectionError(
                f"{type(self).__name__}: FSDP2 can't share out a base that is packed into a few bits, whose parts don't"
                " know their scales. Use strategy='ddp', or leave quantize out."
            )
        inject()

    def _restore_modes(self) -> None:
        for norm in self._norms:
            vars(norm).pop("train", None)
        while self._evaluated:
            self._evaluated.pop().training = True
        for layer in self._adapted:
            vars(layer).pop("added_drops", None)

    def _refuse_others(self, trainer: Trainer) -> list[FineTuning]:
        """The other methods of this Trainer, if this one goes with them."""
        methods = methods_of(trainer)
        names = [type(method).__name__ for method in methods if method.backbone == self.backbone]
        alone = next((m for m in methods if m.decides_alone and m.backbone == self.backbone), None)
        if alone and len(names) > 1:
            raise InjectionError(
                f"{type(alone).__name__} says of all parameters of the base which train, so that it can't be combined:"
                f" the callbacks are {', '.join(names)}. Leave one out."
            )
        return [method for method in methods if method is not self]

    def _precede_averaging(self, trainer: Trainer, inject: Callable[[], None], hook: str | None) -> None:
        """These copy the module in their own setup: they must find the module injected."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averaging = _averaging(trainer, "WeightAveraging", "StochasticWeightAveraging")
        names = ", ".join(type(neighbour).__name__ for neighbour in averaging)
        if any(callbacks.index(neighbour) < callbacks.index(self) for neighbour in averaging):
            raise InjectionError(
                f"{names} must come after {type(self).__name__} in Trainer(callbacks=[...]): it copies the module."
            )
        if averaging and shards(trainer.strategy):
            raise InjectionError(f"{names} copies the module, whose parts under FSDP2 can't be. Use strategy='ddp'.")
        if averaging and hook is not None:
            try:
                inject()
            except InjectionError as error:
                raise InjectionError(
                    f"{names} copies the module before its {hook}() builds it, so that the average would"
                    f" miss what {type(self).__name__} trains. Build the model in __init__, or leave it out."
                ) from error


def methods_of(trainer: Trainer) -> list[FineTuning]:
    """The methods among a Trainer's callbacks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, FineTuning)]


def _averaging(trainer: Trainer, *kinds: str) -> list[Callback]:
    """The callbacks of these kinds, by name: they may be ``pytorch_lightning``'s."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if any(kind.__name__ in kinds for kind in type(c).__mro__)]


def _frozen_norms(base: Base) -> list[_NormBase]:
    return [module for _, module in frozen_modules(base) if isinstance(module, _NormBase)]


def _wrap_checkpoint_io(trainer: Trainer) -> None:
    """Have checkpoints hold what this Trainer's methods train; its callbacks may be exchanged between two fits."""
    io = trainer.strategy.checkpoint_io
    if not isinstance(io, AdapterCheckpointIO):
        trainer.strategy.checkpoint_io = AdapterCheckpointIO(
            io,
            lambda: trainer.lightning_module,
            lambda: [(find_base(trainer.lightning_module, m.backbone), m.record()) for m in methods_of(trainer)],
        )
    if shards(trainer.strategy):
        gather_checkpoints(trainer.strategy)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError if ``value``, that of the argument ``name``, isn't a whole number of at least ``least``."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}.")


def check_number(name: str, value: Any, holds: Callable[[float], bool], range_: str) -> None:
    """Raise ValueError if ``value``, that of the argument ``name``, isn't a number for which ``holds``."""
    if not isinstance(value, (int, float)) or not holds(value):
        raise ValueError(f"{name} must be a number {range_}, not {value!r}.")


def check_dropout(name: str, value: Any) -> None:
    """Raise ValueError if ``value``, that of the argument ``name``, is no probability below 1."""
    check_number(name, value, lambda p: 0 <= p < 1, "in [0, 1)")


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Raise ValueError if ``value``, that of the argument ``name``, isn't one of ``known``."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}.")


def describe(model: nn.Module, names: Sequence[str]) -> str:
    """One line: how many modules were touched, and the share of parameters that trains."""
    total, trained = count_parameters(model)
    touched = f"{len(names)} modules adapted, " if names else ""
    return f"{touched}{trained:,} of {total:,} parameters train ({trained / max(total, 1):.2%})"


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The numbers of all and of trained parameters of ``model``; packed ones count as what they stand for."""
    sizes = [(count(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def _last_builder(module: LightningModule) -> str | None:
    """The last hook that ``module`` overrides and may build itself in.

    Compared with the LightningModule that it inherits from, which may be ``pytorch_lightning``'s.
    """
    parent = next(c for c in type(module).__mro__ if c.__name__ == "LightningModule")
    overridden = [
        hook for hook in _BUILDERS if hook in vars(module) or getattr(type(module), hook) is not getattr(parent, hook)
    ]
    return overridden[-1] if overridden else None


def _around(module: LightningModule, hook: str, before: Callable[[], None] | None, then: Callable[[], None]) -> None:
    """Have ``before`` and ``then`` run before and after ``module.<hook>``, once, by an attribute of the instance.

    Not ``functools.wraps``: Lightning looks through ``__wrapped__`` to tell whether a hook is overridden.
    """
    original = getattr(module, hook)

    def hook_then_inject(*args: Any, **kwargs: Any) -> None:
        _restore_hooks(module)  # else a copy that is made in the fit would call this, and a pickle can't be made
        if before is not None:
            before()
        original(*args, **kwargs)
        then()

    hook_then_inject.replaced = vars(module).get(hook)  # type: ignore[attr-defined]
    setattr(module, hook, hook_then_inject)


def _restore_hooks(module: LightningModule) -> None:
    for hook in _BUILDERS:
        while hasattr(vars(module).get(hook), "replaced"):
            replaced = vars(module).pop(hook).replaced
            if replaced is not None:
                setattr(module, hook, replaced)


def _cover(module: nn.Module, base: Base, optimizers: Sequence[Optimizer]) -> None:
    """Put every trained parameter of the base into an optimizer, and take its frozen ones out.

    In place: schedulers hold the groups, and ``add_param_group`` after LambdaLR raises since torch 2.13. An optimizer
    that was made from ``named_parameters()`` has a list of names beside each of parameters.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    covered = {id(p) for group in groups for p in group["params"]}
    of_base = {id(p) for part in base.parts() for p in part.parameters()}
    missing = {n: p for n, p in module.named_parameters() if id(p) in of_base - covered and p.requires_grad}
    if missing:
        group = _group_for(missing, of_base, optimizers)
        group["params"].extend(missing.values())
        group.get("param_names", []).extend(missing)
    for group in groups:
        stays = [p.requires_grad or id(p) not in of_base for p in group["params"]]
        for key in {"params", "param_names"} & set(group):
            group[key][:] = compress(group[key], stays)


def _group_for(missing: Iterable[str], of_base: set[int], optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """The group that the missing parameters join: one that trains the base, or of the only optimizer."""

    def groups_of_base(optimizer: Optimizer) -> list[dict[str, Any]]:
        return [g for g in optimizer.param_groups if any(id(p) in of_base for p in g["params"])]

    candidates = [o for o in optimizers if groups_of_base(o)] or list(optimizers)
    if len(candidates) == 1:
        return (groups_of_base(candidates[0]) or candidates[0].param_groups)[0]
    names = list(missing)
    raise InjectionError(
        f"{len(names)} trained parameters ({', '.join(names[:3])}, …) are in none of the {len(optimizers)}"
        " optimizers, and which should train them is unclear. Build one in configure_optimizers() from the"
        " parameters of the base or of self, so that it sees what was injected."
    )


def _plain(value: Any) -> Any:
    """Lists and dicts for all kinds of them: checkpoints load with weights_only=True, which allows no objects."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
