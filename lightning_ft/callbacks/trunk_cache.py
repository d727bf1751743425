"""What frozen layers put out, computed once and kept, where nothing below them trains."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_ft.callbacks.frozen_prefix import FrozenPrefix, Pass
from lightning_ft.callbacks.row_store import Row, RowStore, padded, rows_of
from lightning_ft.errors import UserError
from lightning_ft.injection import find_base, is_compiled

_MIB = 2**20
_READS = ("output_hidden_states", "output_attentions")  # what the lower layers give beside their outputs


class TrunkCache(Callback):
    """Runs the frozen layers below all that trains once for each row, and enters above them from then on.

    ``L.Trainer(callbacks=[HeadOnly(), TrunkCache()])``, or beside ``TopLayers(k=2)``, ``LoRA(layers_to_transform=[4,
    5])``: any project with a Hugging Face text model that is given ``input_ids``. Training, validation and test use it.
    The first epoch costs what it would without.

    Results are those of a run whose frozen layers are in eval mode, in which they are while the model runs: their
    dropout is off, as it must be for the same tokens to give the same. All of the text model evaluates but the layers
    above; what a method injected drops as ever. A row is known by its tokens (and token types, positions, ...), so
    that order, company and padding on the right may change. What the mask excludes has hidden states of 0 then. Other
    padding on the left makes another row. A batch in which one row isn't known is computed.

    Never taken from the cache is what is given ``inputs_embeds`` or a cache of keys and values (``generate()``), or is
    asked for all hidden states or attentions. The model gives no ``past_key_values`` where it isn't asked for them.

    What is kept is in RAM, whatever device computes, and serves later fits with this callback too, as long as the
    frozen weights are the same: where they were written to, it begins anew. The first batch is computed both ways, to
    see that they agree. Each process has a cache of its own.

    Args:
        max_mib: how much is kept; rows beyond it are computed each time.
        folder: keep it in a file there, which is mapped into memory and has no name, so that nothing stays behind.
        backbone: path of the base, where it isn't the one Hugging Face model
            (:func:`lightning_ft.injection.find_base`).

    Attributes:
        calls: how often the text model was called for batches of the last fit, and of tests since.
        hits: how many of these calls did without the frozen layers.

    Raises:
        ValueError: if ``max_mib`` isn't a number above 0.
        InjectionError: when ``fit`` starts, if there is no text model with a stack of layers, if something trains below
            them or in the first, or under FSDP2 and ZeRO-3.
        UserError: at the first batch, if the model is compiled or can't do without its lower layers; after it, if no
            call of it could be kept.
    """

    def __init__(self, max_mib: float = 1024, folder: str | Path | None = None, backbone: str | None = None) -> None:
        if not isinstance(max_mib, (int, float)) or not max_mib > 0:
            raise ValueError(f"TrunkCache: max_mib must be a number above 0, not {max_mib!r}.")
        self.max_mib, self.folder, self.backbone = max_mib, folder, backbone
        self.calls = self.hits = 0
        self._store: RowStore | None = None
        self._digest, self._depth = "", 0  # of the frozen layers that it's from
        self._prefix: FrozenPrefix | None = None  # for as long as a fit or a test runs
        self._versions: list[int] = []
        self._agrees = self._begun = False
        self._obstacle = ""  # why nothing can be kept so far
        self._hooks: list[RemovableHandle] = []  # on the model, for as long as a batch runs
        self._call = ExitStack()  # what is to be undone after a call of it
        self._computed: tuple[Pass, list[Row]] | None = None

    # ------------------------------------------------------------------ Lightning's hooks

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the frozen layers, and see whether what is kept is theirs."""
        prefix = FrozenPrefix(find_base(pl_module, self.backbone))
        digest, depth = prefix.digest(), len(prefix.layers)
        if self._store is None or (digest, depth) != (self._digest, self._depth):
            self._store = RowStore(int(self.max_mib * _MIB), None if self.folder is None else Path(self.folder))
        self._digest, self._depth = digest, depth
        self._prefix, self._versions = prefix, prefix.versions()
        self.calls = self.hits = 0
        self._agrees = self._begun = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stand before the model for as long as the batch runs."""
        if not self._begun and self._prefix is not None:
            _refuse_compiled(pl_module, self._prefix.model)
            self._obstacle = f"its {type(self._prefix.model).__name__} isn't called"
        self._enter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step aside; and see, once, that it had an effect."""
        self._leave()
        if self._prefix is None:  # Lightning's finders train before a fit starts
            return
        if not self._begun and self._obstacle:
            raise UserError(
                f"TrunkCache: nothing of {type(pl_module).__name__} can be kept, since {self._obstacle}. Leave it out."
            )
        self._begun = True

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Stand before the model."""
        self._enter()

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Step aside."""
        self._leave()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what it was good for."""
        store = self._kept
        over = f"; {store.refused} times a row was over max_mib={self.max_mib:g}" if store.refused else ""
        rank_zero_info(
            f"TrunkCache: {self.hits} of {self.calls} calls ({self.hits / max(self.calls, 1):.0%}) did without the"
            f" {self._depth} frozen layers; {store.bytes / _MIB:.1f} MiB of {len(store)} rows kept{over}."
        )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with what a fit kept, if these are the same frozen layers; within a fit there's nothing to do."""
        if self._store is None or self._prefix is not None:
            return
        prefix = FrozenPrefix(find_base(pl_module, self.backbone), self._depth)
        if prefix.digest() == self._digest:
            self._prefix, self._versions = prefix, prefix.versions()

    on_test_start = on_predict_start = on_validation_start

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was. What was kept stays."""
        self._leave()
        self._prefix = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was."""
        self.teardown(trainer, pl_module, "")

    # ------------------------------------------------------------------

    @property
    def _fitted(self) -> FrozenPrefix:
        assert self._prefix is not None
        return self._prefix

    @property
    def _kept(self) -> RowStore:
        assert self._store is not None
        return self._store

    def _enter(self) -> None:
        self._leave()  # a batch that a hook skips has no end
        if self._prefix is None:
            return
        if self._versions != (now := self._prefix.versions()):
            self._versions = now
            if (digest := self._prefix.digest()) != self._digest:  # else the same was written again
                self._digest = digest
                self._kept.clear()
        model = self._prefix.model

        # Copies of the model that are made meanwhile have these hooks too, which must do nothing there.
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._begin(self._fitted.trunk.bound(args, kwargs)) if module is model else None

        def after(module: nn.Module, args: Any, outputs: Any) -> None:  # noqa: ARG001
            if module is model:
                self._end(outputs is not None)

        self._hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, always_call=True),
        ]

    def _leave(self) -> None:
        self._call.close()  # an interrupted call has no end
        while self._hooks:
            self._hooks.pop().remove()

    def _begin(self, inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Prepare the model for a call; returns its arguments."""
        prefix, store = self._fitted, self._kept
        self.calls += 1
        self._call, self._computed = ExitStack(), None
        self._call.enter_context(prefix.evaluating())
        try:
            rows = rows_of(inputs, _salt(prefix.model, inputs))
        except ValueError as error:
            self._obstacle = self._obstacle and str(error)
            return (), inputs
        self._obstacle = ""
        if "use_cache" in prefix.trunk.arguments:
            inputs["use_cache"] = False  # else it would have those of the upper layers alone
        tokens = inputs["input_ids"]
        if not self._agrees:
            self._check(inputs, rows, tokens)
            self._agrees = True
        if all(row in store for row in rows):
            self.hits += 1
            hidden = _assembled([store[row] for row in rows], rows, tokens)
            self._call.enter_context(prefix.skipping(hidden))
        else:
            self._computed = self._call.enter_context(prefix.computing()), rows
        return (), inputs

    def _end(self, succeeded: bool) -> None:
        """Have the model as it was before the call, and keep what it computed."""
        self._call.close()
        computed, self._computed = self._computed, None
        if succeeded and computed is not None:
            seen, rows = computed
            for row, states in zip(rows, self._fitted.hidden(seen), strict=True):
                self._kept.add(row, states[row.start : row.end])

    def _check(self, inputs: dict[str, Any], rows: list[Row], tokens: Tensor) -> None:
        """See that the model gives the same from its hidden states as it does from its tokens."""
        prefix = self._fitted
        devices = [tokens.device] if tokens.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), prefix.computing() as seen:
            outputs = prefix.model.forward(**inputs)
        hidden = prefix.hidden(seen)
        if hidden.shape[:2] != tokens.shape:
            raise prefix.unfit()
        values = [states[row.start : row.end] for states, row in zip(hidden, rows, strict=True)]
        hidden = _assembled(values, rows, tokens)
        with torch.no_grad(), torch.random.fork_rng(devices), prefix.skipping(hidden):
            again = prefix.model.forward(**inputs)
        expected, found = (_own(out[0], rows) for out in (outputs, again))
        close = 1e-3 if expected.dtype == torch.float32 else 3e-2
        if not torch.allclose(found, expected, rtol=close, atol=close * expected.abs().max().item()):
            raise prefix.unfit()


def _own(states: Tensor, rows: list[Row]) -> Tensor:
    """(tokens of all rows, width): those that masks show."""
    return torch.cat([state[row.start : row.end] for state, row in zip(states, rows, strict=True)])


def _assembled(values: list[Tensor], rows: list[Row], tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return padded(values, rows, tokens.shape[1]).to(tokens.device)


def _salt(model: Any, inputs: Mapping[str, Any]) -> str:
    """What rows' hidden states depend on beside tensors.

    Raises:
        ValueError: with the reason, if they can't be kept.
    """
    if not isinstance(ids := inputs.get("input_ids"), Tensor) or ids.ndim != 2:
        raise ValueError(f"{type(model).__name__} is given no input_ids of (batch, tokens)")
    for name in _READS:
        asked = inputs.get(name)
        if getattr(model.config, name, False) if asked is None else asked:
            raise ValueError(f"{type(model).__name__} is asked for {name}")
    if inputs.get("use_cache"):
        raise ValueError(f"{type(model).__name__} is asked for its cache of keys and values (use_cache=True)")
    others = {k: v for k, v in sorted(inputs.items()) if not (v is None or isinstance(v, Tensor) or k == "return_dict")}
    for name, value in others.items():
        if not isinstance(value, (bool, int, float, str)):
            raise ValueError(f"{type(model).__name__} is given a {type(value).__name__} as {name}")
    kind = ids.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return f"{autocast} {others}"


def _refuse_compiled(module: nn.Module, model: nn.Module) -> None:
    inside = set(model.modules())
    for part in module.modules():
        if is_compiled(part) and (part in inside or model in set(part.modules())):
            raise UserError(
                f"TrunkCache can't skip layers of what is compiled, and {type(model).__name__} is: leave out Compile or"
                " torch.compile, or TrunkCache."
            )
