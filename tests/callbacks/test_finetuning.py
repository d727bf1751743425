"""FineTuning beside the rest of Lightning: optimizers, hooks, other callbacks and plugins, modes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from foreign import CLASSES, CNN, BertInInit, Classifier, TorchTransformer, TrunkInSetup, make, trainer, vector_data
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import lightning_ft
from lightning_ft import Adapter, BitFit, FullFineTuning, HeadOnly, InjectionError, LoRA
from lightning_ft.callbacks.finetuning import FineTuning, count_parameters, describe
from lightning_ft.injection import injected_modules, injected_names


def lora(**settings: Any) -> LoRA:
    return LoRA(**{"r": 2, "backbone": "encoder", "target_modules": ["0", "2"], **settings})


class Small(Classifier):
    """Quick, and with a body and a head that an optimizer may or may not cover."""

    data = staticmethod(lambda: vector_data(8))

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, CLASSES)

    def outputs(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """What training changed; what was injected counts where its zero matrix is no longer zero."""
    return {
        key
        for key, value in module.state_dict().items()
        if (not torch.equal(value, before[key]) if key in before else value.any())
    }


HEAD = {"head.weight", "head.bias"}


# ---------------------------------------------------------------------------------------------- optimizers


def one_cycle(optimizer: Any) -> dict[str, Any]:
    return {"scheduler": OneCycleLR(optimizer, max_lr=0.1, total_steps=20), "interval": "step"}


def decaying(optimizer: Any) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.9**step)


@pytest.mark.parametrize(
    ("of", "schedule"), [("head", decaying), ("named", decaying), ("all", one_cycle), ("groups", decaying)]
)
def test_the_users_optimizer_trains_what_was_injected_and_holds_nothing_frozen(of: str, schedule: Any) -> None:
    class Module(Small):
        def configure_optimizers(self) -> Any:
            parameters: Any = {
                "head": lambda: self.head.parameters(),
                "all": lambda: self.parameters(),
                "named": lambda: self.named_parameters(),
                "groups": lambda: [
                    {"params": list(self.head.parameters()), "lr": 0.2},
                    {"params": list(self.encoder.parameters()), "lr": 0.1},
                ],
            }[of]()
            optimizer = AdamW(parameters, lr=0.1)
            self.groups_made = len(optimizer.param_groups)
            return [optimizer], [schedule(optimizer)]

    module = make(Module)
    before, run = state(module), trainer(lora(), max_epochs=3)
    run.fit(module)
    (optimizer,) = run.optimizers
    assert len(optimizer.param_groups) == module.groups_made  # schedulers hold the groups that they found
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    assert moved(module, before) == HEAD | injected_names(module)
    names = optimizer.param_groups[0].get("param_names", [])
    assert [id(module.get_parameter(name)) for name in names] == (held if of == "named" else [])
    if of == "groups":
        assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in module.head.parameters()}


def test_an_optimizer_may_be_left_with_nothing_to_train() -> None:
    class Module(Small):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizers: Any = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.outputs(batch[0]), batch[1]))
            for optimizer in optimizers:
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [Adam(self.encoder.parameters(), lr=0.1), SGD(self.head.parameters(), lr=0.1)]

    module = make(Module)
    before = state(module)
    trainer(HeadOnly(backbone="encoder")).fit(module)
    assert moved(module, before) == HEAD


def test_two_optimizers_of_which_none_trains_the_base_are_an_error_with_the_cure() -> None:
    class Module(Small):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [SGD([self.head.weight], lr=0.1), SGD([self.head.bias], lr=0.1)]

    with pytest.raises(InjectionError, match=r"4 trained parameters \(encoder.0.lora_A, .*2 optimizers") as error:
        trainer(lora()).fit(make(Module))
    assert "Build one in configure_optimizers()" in str(error.value)


def test_what_the_user_left_out_of_the_head_stays_out() -> None:
    class Module(Small):
        def configure_optimizers(self) -> Any:
            return SGD([self.head.weight], lr=0.1)

    module = make(Module)
    before = state(module)
    trainer(lora()).fit(module)
    assert moved(module, before) == {"head.weight"} | injected_names(module)


# --------------------------------------------------------------------------------------- where it is injected


class BuiltBy(Small):
    """Builds its encoder in one hook, and overrides others too."""

    def __init__(self) -> None:
        super().__init__()
        del self.encoder
        self.seen: set[str] = set()

    def build(self) -> None:
        if not hasattr(self, "encoder"):
            torch.manual_seed(1)
            self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def configure_optimizers(self) -> Any:
        self.seen = injected_names(self)
        return SGD(self.parameters(), lr=0.1)


class InSetup(BuiltBy):
    def setup(self, stage: str) -> None:
        self.build()


class InConfigureModel(BuiltBy):
    def configure_model(self) -> None:
        self.build()


class InSetupBesideConfigureModel(InSetup):
    def configure_model(self) -> None:
        assert not injected_names(self)


class InConfigureModelBesideSetup(InConfigureModel):
    def setup(self, stage: str) -> None:
        assert not hasattr(self, "encoder")


class OnTheInstance(BuiltBy):
    def __init__(self) -> None:
        super().__init__()
        self.setup = lambda stage: self.build()


ADDED = {f"encoder.{i}.lora_{x}" for i in (0, 2) for x in "AB"}
HOOKS = ("setup", "configure_model")


@pytest.mark.parametrize(
    ("kind", "fails"),
    [
        *((kind, False) for kind in (Small, InSetupBesideConfigureModel, InConfigureModelBesideSetup)),
        *((kind, True) for kind in (InSetup, InConfigureModel, OnTheInstance)),
    ],
)
def test_injection_comes_before_the_optimizers_and_hooks_are_given_back(kind: type[Classifier], fails: bool) -> None:
    class Watch(Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.hooks = hooks(pl_module)  # which copies and pickles of the module have from here on

    def hooks(module: nn.Module) -> dict[str, Any]:
        return {hook: vars(module)[hook] for hook in HOOKS if hook in vars(module)}

    module, watch = make(kind), Watch()
    own = hooks(module)
    if fails:
        module.training_step = lambda batch, batch_idx: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trainer(lora(), watch).fit(module)
    else:
        trainer(lora(), watch).fit(module)
    assert injected_names(module) == ADDED
    assert getattr(module, "seen", ADDED) == ADDED
    assert watch.hooks == hooks(module) == own


def test_an_error_while_injecting_gives_the_hooks_back_too() -> None:
    module = make(InSetup)
    with pytest.raises(InjectionError, match="'nothing' matches no module"):
        trainer(lora(target_modules=["nothing"])).fit(module)
    assert not set(HOOKS) & set(vars(module))
    trainer(lora()).fit(module)
    assert injected_names(module) == ADDED


def test_a_configure_model_that_is_not_overridden_is_left_alone() -> None:
    """Lightning enters its contexts (which under bitsandbytes swap layers) for an overridden one only."""

    class Watch(Callback):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            self.hooks = set(vars(pl_module)) & set(HOOKS)

    watch = Watch()
    trainer(lora(), watch).fit(make(InSetup))
    assert watch.hooks == {"setup"}
    trainer(lora(), watch).fit(make(Small))
    assert watch.hooks == set()


# ---------------------------------------------------------------------------------------- other callbacks


def test_two_methods_of_one_kind_and_different_settings_are_an_error() -> None:
    with pytest.raises(InjectionError, match=r"already carries .*r=2.*r=4"):
        trainer(lora(), lora(r=4)).fit(make(Small))


@pytest.mark.parametrize(("kind", "one"), [(Small, True), (InSetup, False)], ids=["the same", "equal"])
def test_the_same_method_twice_is_the_method_once(kind: type[Classifier], one: bool, tmp_path: Path) -> None:
    def fit(*methods: LoRA) -> tuple[L.Trainer, Classifier]:
        module, run = make(kind), trainer(*methods)
        run.fit(module)
        return run, module

    method = lora()
    run, module = fit(method, method if one else lora())
    _, alone = fit(lora())
    assert injected_names(module) == ADDED
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in alone.state_dict().items())
    assert not set(HOOKS) & set(vars(module))
    run.save_checkpoint(tmp_path / "x.ckpt")
    torch.manual_seed(7)
    loaded = lightning_ft.load_from_checkpoint(kind, tmp_path / "x.ckpt")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in module.state_dict().items())


def averaging() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.5)


each_averaging = pytest.mark.parametrize(
    "average", [averaging, WeightAveraging, partial(StochasticWeightAveraging, 0.1)], ids=["ema", "mean", "swa"]
)


@each_averaging
def test_averaging_before_the_method_is_an_error(average: Callable[[], Callback]) -> None:
    module, before = make(Small), average()
    with pytest.raises(InjectionError, match=f"{type(before).__name__} must come after LoRA"):
        trainer(before, lora()).fit(module)
    assert not injected_names(module)


@each_averaging
@pytest.mark.parametrize("kind", [InSetup, InConfigureModel])
def test_averaging_a_module_that_builds_itself_in_a_hook_is_an_error(
    kind: type[Classifier], average: Callable[[], Callback]
) -> None:
    with pytest.raises(InjectionError, match=r"before its (setup|configure_model)\(\) builds it"):
        trainer(lora(), average()).fit(make(kind))


def test_averaging_that_would_reset_frozen_norms_is_an_error() -> None:
    swa = partial(StochasticWeightAveraging, 0.1)
    with pytest.raises(InjectionError, match=r"StochasticWeightAveraging takes new statistics.*EMAWeightAveraging"):
        trainer(lora(), swa()).fit(make(Normed))
    module = make(Small)
    before = state(module)
    trainer(lora(), swa(), max_epochs=3).fit(module)
    assert moved(module, before) == HEAD | ADDED


def test_averages_are_saved_slim_and_resume_exactly(tmp_path: Path) -> None:
    def run(epochs: int, **more: Any) -> Small:
        module = make(Small)
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer(lora(), averaging(), keep, max_epochs=epochs, enable_checkpointing=True).fit(module, **more)
        return module

    whole = run(3)
    saved = torch.load(tmp_path / "epoch=0.ckpt")
    assert set(saved["state_dict"]) == set(saved["current_model_state"]) == HEAD | ADDED
    assert not torch.equal(saved["state_dict"]["head.weight"], saved["current_model_state"]["head.weight"])
    torch.manual_seed(9)
    resumed = run(3, ckpt_path=tmp_path / "epoch=0.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


class Tunable(Small):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 1e-3

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=self.lr)


def test_the_learning_rate_finder_leaves_the_module_as_it_found_it() -> None:
    module = make(Tunable)
    before, run = state(module), trainer(lora(), max_epochs=5)
    found = Tuner(run).lr_find(module, num_training=9, min_lr=1e-4, max_lr=0.5, early_stop_threshold=None)
    assert found is not None
    assert len(found.results["lr"]) == 9
    assert injected_names(module) == ADDED
    assert moved(module, before) == {key for key in ADDED if key.endswith("lora_A")}
    run.fit(module)
    assert moved(module, before) == HEAD | ADDED


# ------------------------------------------------------------------------------------ other CheckpointIOs


class Counting(TorchCheckpointIO):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.calls.append("save")
        super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("load")
        return super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        self.calls.append("remove")
        super().remove_checkpoint(path)

    def teardown(self) -> None:
        self.calls.append("teardown")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("make_io", [Counting, AsyncCheckpointIO])
def test_another_checkpoint_io_still_does_the_writing(make_io: Any, tmp_path: Path) -> None:
    io, module = make_io(), make(Small)
    keep = ModelCheckpoint(tmp_path, save_top_k=1, filename="{epoch}")
    trainer(lora(), keep, plugins=[io], enable_checkpointing=True, max_epochs=2).fit(module)
    (path,) = tmp_path.glob("*.ckpt")
    assert set(torch.load(path)["state_dict"]) == HEAD | ADDED
    if isinstance(io, Counting):
        assert io.calls == ["save", "save", "remove", "teardown"]
    again, resumed = make_io(), make(Small)
    trainer(lora(), max_epochs=3, plugins=[again]).fit(resumed, ckpt_path=path)
    whole = make(Small)
    trainer(lora(), max_epochs=3).fit(whole)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())
    if isinstance(again, Counting):
        assert again.calls == ["load", "teardown"]


def test_a_trainer_that_fits_twice_wraps_its_checkpoint_io_once_and_records_the_callbacks_it_has(
    tmp_path: Path,
) -> None:
    run, module = trainer(lora(), max_epochs=1), make(Small)
    run.fit(module)
    first = run.strategy.checkpoint_io
    run.validate(module, verbose=False)
    run.fit(module)
    assert run.strategy.checkpoint_io is first
    other, run.callbacks = make(Small), [BitFit(backbone="encoder")]
    run.fit(other)
    run.save_checkpoint(tmp_path / "x.ckpt")
    torch.manual_seed(7)
    assert moved(lightning_ft.load_from_checkpoint(Small, tmp_path / "x.ckpt"), other.state_dict()) == set()


# --------------------------------------------------------------------------------------------------- modes


class Normed(Small):
    """BatchNorms in the base and in the head; the modes of its modules, and of what they carry, in each step."""

    data = staticmethod(lambda: vector_data(8))

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
        self.modes: list[dict[str, bool]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.modes.append({name: getattr(m, "in_training", m.training) for name, m in self.named_modules()})
        return super().training_step(batch, batch_idx)


IN_EVAL = pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")


@IN_EVAL
@pytest.mark.parametrize(("mode", "fails"), [(True, False), (False, False), (False, True)], ids=str)
def test_frozen_norms_stay_put_and_every_mode_is_given_back(mode: bool, fails: bool) -> None:
    module = make(Normed)
    module.encoder.train(mode)
    before, modes = state(module), {name: m.training for name, m in module.named_modules()}
    if fails:
        module.on_train_epoch_end = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trainer(lora()).fit(module)
    else:
        trainer(lora()).fit(module)
    assert {f"head.0.{x}" for x in ("weight", "bias", "running_mean", "running_var")} <= moved(module, before)
    assert not {key for key in moved(module, before) if key.startswith("encoder.1")}
    assert all(not seen["encoder.1"] for seen in module.modes)
    assert all(seen["encoder.0"] and seen["encoder.2"] for seen in module.modes)  # injected
    assert all(seen["encoder.3"] == mode and seen["head.0"] for seen in module.modes)  # the user's business
    assert {name: m.training for name, m in module.named_modules()} == modes


@IN_EVAL
def test_what_another_base_carries_keeps_its_mode() -> None:
    class Distilled(Normed):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Sequential(nn.Linear(8, 8))
            lora(backbone="teacher", target_modules=["0"]).inject(self)
            self.teacher.requires_grad_(False).eval()

    module = make(Distilled)
    trainer(lora()).fit(module)
    assert {(seen["encoder.0"], seen["teacher.0"]) for seen in module.modes} == {(True, False)}


def test_a_norm_that_trains_keeps_its_statistics_moving() -> None:
    for method in (lora(modules_to_save=["1"]), FullFineTuning(backbone="encoder")):
        module = make(Normed)
        before = state(module)
        trainer(method).fit(module)
        assert {f"encoder.1.{x}" for x in ("weight", "bias", "running_mean", "running_var")} <= moved(module, before)


@IN_EVAL
def test_injected_dropout_drops_though_the_model_was_left_in_eval_mode() -> None:
    """As ``from_pretrained`` leaves it."""

    class Module(BertInInit):
        def __init__(self) -> None:
            super().__init__()
            self.model.eval()

    def fit(dropout: float, seed: int) -> dict[str, Tensor]:
        module = make(Module)
        run = trainer(LoRA(r=2, dropout=dropout), max_epochs=2)
        module.on_train_start = lambda: torch.manual_seed(seed)  # after A got its first values
        run.fit(module)
        assert not any(m.training for m in module.model.modules())
        return state(module)

    def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
        return all(torch.equal(value, two[key]) for key, value in one.items())

    assert equal(fit(0.5, 1), fit(0.5, 1))
    assert not equal(fit(0.5, 1), fit(0.5, 2))
    assert equal(fit(0.0, 1), fit(0.0, 2))


@IN_EVAL
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_base_drops_nothing_for_an_adapter_that_stands_behind_its_attention(dropout: float) -> None:
    """``nn.MultiheadAttention``, and Llama's, read their own mode."""

    class Module(TorchTransformer):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2).eval()
            self.same: list[bool] = []

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.same.append(torch.equal(self.outputs(batch[0]), self.outputs(batch[0])))
            self.encoder.eval()  # as the module would say in its own step: then nothing drops
            assert torch.equal(self.outputs(batch[0]), self.outputs(batch[0]))
            return super().training_step(batch, batch_idx)

    module = make(Module)
    method = Adapter(bottleneck=4, dropout=dropout, target_modules=["self_attn", "linear2"], backbone="encoder")
    method.inject(module)
    for name in sorted(injected_names(module)):
        nn.init.normal_(module.get_parameter(name))
    trainer(method, max_epochs=1).fit(module)
    assert set(module.same) == {dropout == 0}
    assert not any(m.training for m in module.encoder.modules())


# --------------------------------------------------------------------------------------------- the rest


def test_what_trains_is_counted_and_said() -> None:
    module = make(Small)
    names = lora().inject(module)
    added = 2 * 2 * (8 + 8)
    trained = added + 8 * CLASSES + CLASSES
    total = 2 * (8 * 8 + 8) + trained
    assert count_parameters(module) == (total, trained)
    said = f"2 modules adapted, {trained} of {total} parameters train ({trained / total:.2%})"
    assert describe(module, names) == said
    assert describe(nn.ReLU(), []) == "0 of 0 parameters train (0.00%)"


def test_a_users_own_method_needs_only_inject() -> None:
    class LastLayer(FineTuning):
        peft_type = "PARTIAL"

        def inject(self, model: nn.Module) -> list[str]:
            model.encoder.requires_grad_(False)
            model.encoder[2].requires_grad_(True)
            return ["encoder.2"]

    module = make(Small)
    before = state(module)
    trainer(LastLayer(backbone="encoder")).fit(module)
    assert moved(module, before) == HEAD | {"encoder.2.weight", "encoder.2.bias"}


def test_lightning_cli_constructs_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    arguments = ["--trainer.logger=false", "--trainer.callbacks+=lightning_ft.LoRA", "--trainer.callbacks.r=3"]
    arguments += ["--trainer.callbacks.target_modules=[query]", "--trainer.callbacks.dropout=0.1"]
    monkeypatch.setattr("sys.argv", ["app", *arguments])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own use of it
    cli = LightningCLI(BertInInit, run=False, save_config_callback=None, seed_everything_default=0)
    (method,) = (c for c in cli.trainer.callbacks if isinstance(c, LoRA))
    assert (method.r, method.alpha, method.target_modules, method.dropout) == (3, 16, ["query"], 0.1)


@pytest.mark.parametrize("kind", [Small, TrunkInSetup])
def test_the_method_is_injected_once_over_all_stages(kind: type[Classifier]) -> None:
    method = lora() if kind is Small else LoRA(r=2)
    module, run = make(kind), trainer(method, max_epochs=1)
    run.validate(module, verbose=False)
    layers = [layer for _, layer in injected_modules(module)]
    parameters = [id(p) for p in module.parameters()]
    for stage in (run.fit, run.test, run.predict, run.fit):
        stage(module)
        assert [layer for _, layer in injected_modules(module)] == layers
        assert [id(p) for p in module.parameters()] == parameters


@pytest.mark.parametrize("kind", [Small, InSetup])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_merged_module_is_evaluated_as_it_is_and_fitted_anew(kind: type[Classifier], stage: str) -> None:
    module, run = make(kind), trainer(lora(), max_epochs=1)
    run.fit(module)
    before = state(module)
    lightning_ft.merge(module, reversible=True)
    merged = state(module)
    getattr(run, stage)(module)
    assert moved(module, merged) == injected_names(module) == set()
    assert all(p.requires_grad for p in module.parameters())
    lightning_ft.unmerge(module)
    getattr(run, stage)(module)
    assert injected_names(module) == ADDED
    assert moved(module, before) == set()
    lightning_ft.merge(module)
    trainer(lora(), max_epochs=1).fit(module)
    assert injected_names(module) == ADDED
    getattr(trainer(lora()), stage)(module)
    assert injected_names(module) == ADDED


# ------------------------------------------------------------------ what the user's module does besides


class Unfreezes(Classifier):
    """Freezes a part of its own, and trains it from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head, self.extra = nn.Linear(8, 8), nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)
        self.extra.requires_grad_(False)

    data = staticmethod(lambda: vector_data(8))

    def outputs(self, x: Tensor) -> Tensor:
        hidden = self.encoder(x)
        return self.head(hidden) + self.extra(hidden)

    def on_train_epoch_start(self) -> None:
        self.extra.requires_grad_(self.current_epoch > 0)


def test_what_the_user_freezes_and_unfreezes_stays_in_the_optimizer() -> None:
    module = make(Unfreezes)
    before = module.extra.weight.clone()
    trainer(LoRA(r=2, backbone="encoder", target_modules=["encoder"]), max_epochs=2).fit(module)
    assert not torch.equal(module.extra.weight, before)


class WithTeacher(Unfreezes):
    """Leaves its frozen teacher out of checkpoints, and puts it back itself."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(8, CLASSES).requires_grad_(False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for key in [key for key in checkpoint["state_dict"] if key.startswith("teacher.")]:
            del checkpoint["state_dict"][key]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"].update({f"teacher.{k}": v for k, v in self.teacher.state_dict().items()})


def test_a_module_may_fill_in_what_it_left_out_of_the_checkpoint(tmp_path: Path) -> None:
    method = {"r": 2, "backbone": "encoder", "target_modules": ["encoder"]}
    run = trainer(LoRA(**method), max_epochs=1)
    run.fit(make(WithTeacher))
    run.save_checkpoint(tmp_path / "x.ckpt")
    trainer(LoRA(**method), max_epochs=2).fit(make(WithTeacher), ckpt_path=tmp_path / "x.ckpt")


class SetsModes(CNN):
    """Calls train() in a hook that runs after the callbacks'."""

    def on_train_epoch_start(self) -> None:
        self.train()


class SetsModesInItsStep(CNN):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.eval()
        self.train()
        return super().training_step(batch, batch_idx)


@IN_EVAL
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", [SetsModes, SetsModesInItsStep])
def test_a_frozen_batchnorm_stays_put_though_the_module_calls_train(kind: type[CNN], mode: bool) -> None:
    module = make(kind)
    module.body.train(mode)
    before = {key: value.clone() for key, value in module.body.state_dict().items() if "running" in key}
    trainer(LoRA(r=2, backbone="body", target_modules="all-linear"), max_epochs=2).fit(module)
    assert before
    assert all(torch.equal(module.body.state_dict()[key], value) for key, value in before.items())
    assert all(m.training for m in module.train().modules())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_frozen_batchnorm_stays_put_in_a_fit_that_resumes_within_an_epoch(tmp_path: Path) -> None:
    """Lightning then calls no on_train_epoch_start."""
    method = {"r": 2, "backbone": "body", "target_modules": "all-linear"}
    keep = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=1)
    trainer(LoRA(**method), keep, max_steps=1, enable_checkpointing=True).fit(make(CNN))
    module = make(CNN)
    before = {key: value.clone() for key, value in module.body.state_dict().items() if "running" in key}
    trainer(LoRA(**method), keep, max_steps=2, enable_checkpointing=True).fit(module, ckpt_path=tmp_path / "x.ckpt")
    assert all(torch.equal(module.body.state_dict()[key], value) for key, value in before.items())


def test_full_fine_tuning_over_an_injected_method_is_an_error() -> None:
    module = make(BertInInit)
    LoRA(r=2).inject(module)
    with pytest.raises(InjectionError, match=r"carries LORA.*Merge it first"):
        FullFineTuning().inject(module)
    lightning_ft.merge(module)
    FullFineTuning().inject(module)


def test_a_refused_injection_changes_nothing() -> None:
    module = make(BertInInit)
    for wrong in ({"target_modules": ["qery"]}, {"target_modules": ["query", "LayerNorm"]}, {"modules_to_save": ["x"]}):
        with pytest.raises(InjectionError):
            LoRA(r=2, **wrong).inject(module)
        assert all(p.requires_grad for p in module.parameters())
        assert not injected_names(module)


def test_what_was_trained_whole_is_not_frozen_unsaid_by_a_second_fit() -> None:
    module = make(BertInInit)
    LoRA(r=2, modules_to_save=["pooler"]).inject(module)
    with pytest.raises(InjectionError, match="pooler"):
        LoRA(r=2).inject(module)
    assert module.model.bert.pooler.dense.weight.requires_grad
