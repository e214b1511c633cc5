"""DeepSpeed: ZeRO stages 0, 2 and 3 under ``torchrun``, or on one process.

DeepSpeed runs in its float32 mode whatever the model's dtype: adapters are float32, a model that trains in bfloat16 has
float32 masters and sums (stages 2 and 3), and frozen bfloat16 weights stay as they are, partitioned in their own dtype
under stage 3. A frozen vision tower stays out of the partitioning, so that a rank may skip it when its features are
cached.
"""

from __future__ import annotations

import importlib
import math
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tempo_fast.config import TrainConfig
from tempo_fast.errors import InputError
from tempo_fast.runtime.optimizer import check_trainable, make_adamw
from tempo_fast.runtime.pieces import Slot, load_pieces, save_pieces, shapes_of, share, whole
from tempo_fast.runtime.ranks import Ranks
from tempo_fast.runtime.zero_config import zero_config


def import_deepspeed(device: torch.device) -> Any:
    """The package. Raises InputError that says what to install."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        return importlib.import_module("deepspeed")
    except ImportError as e:
        raise InputError(
            f"train.engine: deepspeed cannot be imported ({e});"
            " pip install 'tempo-fast[deepspeed]', or set train.engine to torch"
        ) from e


class _MeasuredAdamW(torch.optim.AdamW):
    """An update happens only if ``ready``, called before it, says so; else weights, moments and step count stay."""

    ready: Callable[[], bool]

    def step(self, closure: Any = None) -> Any:
        return super().step(closure) if self.ready() else None


class DeepSpeedEngine:
    """A module in ``deepspeed.initialize``. See :class:`tempo_fast.runtime.engine.TrainEngine`."""

    def __init__(
        self,
        module: nn.Module,
        params: Mapping[str, nn.Parameter],
        config: TrainConfig,
        ranks: Ranks,
        *,
        persist_below: int = 100_000,
    ) -> None:
        check_trainable(params, config)
        deepspeed = import_deepspeed(ranks.device)
        _join_group(ranks)
        if ranks.device.type == "cpu":
            # DeepSpeed would compile a shared-memory collective at the first start, for a minute; gloo does without
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        self.stage, self.ranks = config.zero_stage, ranks
        self.max_grad_norm = config.max_grad_norm
        self.params = dict(params)
        self.module = module
        # ZeRO asks for torch's own class, and leaves out a bad update itself
        self.optimizer = make_adamw(params, config, torch.optim.AdamW if self.stage else _MeasuredAdamW)
        self.optimizer.ready = self._measure
        self._norm = 0.0
        settings = zero_config(config, sum(p.numel() for p in params.values()), persist_below=persist_below)
        self._linear = nn.functional.linear
        self._outside = _FrozenVision(module, self.stage)
        with self._outside:
            self.engine, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, lr: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        with self._outside:
            self.engine.step()
        norm = float(self.engine.get_global_grad_norm() or 0.0) if self.stage else self._norm
        return norm if math.isfinite(norm) else math.inf

    def _measure(self) -> bool:
        """Before a stage-0 update, its gradients averaged: their norm, clipping, and whether all is finite."""
        for p in self.params.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self._norm = float(nn.utils.clip_grad_norm_(self.params.values(), self.max_grad_norm or math.inf))
        return math.isfinite(self._norm)

    # -- state: every rank keeps its own pieces ---------------------------------------------------------------------

    def _slots(self) -> list[Slot]:
        """Where the float32 values lie that AdamW updates on this rank."""
        zero, slots = self.engine.optimizer, []
        if self.stage == 0:
            return whole(self.params)
        for name, p in self.params.items():
            if self.stage == 3:
                group, offset, size = zero.grad_position[zero.get_param_id(p)]
                start = size * self.ranks.rank
                n = min(size, getattr(p, "ds_numel", p.numel()) - start)  # the last part is filled up with zeros
                owner = zero.fp32_partitioned_groups_flat[group]
            else:
                here: Any = getattr(p, "_hp_mapping")  # noqa: B009 - DeepSpeed hangs it on the parameter
                if here is None:
                    continue  # another rank's
                start, n = here.lp_fragment_address.start, here.lp_fragment_address.numel
                owner = zero.single_partition_of_fp32_groups[here.param_group_index]
                offset = here.hp_fragment_address.start
            if n > 0:
                slots.append(Slot(name, start, n, owner, offset))
        return slots

    def state_dict(self) -> dict[str, Any]:
        mine = self._slots() if self.stage else share(self._slots(), self.ranks.rank, self.ranks.world)
        shapes, engine = shapes_of(self.params), f"deepspeed-{self.stage}"
        return save_pieces(mine, self.optimizer, shapes, engine, self.ranks.world)

    def load_state_dict(self, state: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> None:
        load_pieces(self._slots(), self.optimizer, shapes_of(self.params), state)
        with torch.no_grad():
            self._masters_to_weights()

    def _masters_to_weights(self) -> None:
        """Write the masters into the module's parameters. Collective."""
        if self.stage == 0:
            return
        if self.stage == 2:
            for p in self.params.values():
                p.data.copy_(self._full(p))
            return
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        for p in self.params.values():
            full = self._full(p)
            with GatheredParameters([p], modifier_rank=0):
                p.data.copy_(full)

    def _full(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(parameter)
        assert full is not None
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return full.reshape(shape).to(parameter.device if parameter.device.type != "meta" else "cpu")

    def sync_adapter(self) -> None:
        """Full float32 values into plain parameters, DeepSpeed's hooks removed. The engine is done after this."""
        with torch.no_grad(), self._outside:
            if self.stage == 3:
                trained = {id(p) for p in self.params.values()}
                _restore_module(self.module, lambda p: self._full(p) if id(p) in trained else None, self.engine)
                nn.functional.linear = self._linear  # stage 3 puts its own there for the whole process
            else:
                self._masters_to_weights()
                self.engine.destroy()
        for p in self.module.parameters():
            p.grad = None


def _join_group(ranks: Ranks) -> None:
    """DeepSpeed wants a process group even for one process."""
    if dist.is_initialized():
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for key, value in {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"
    }.items():  # fmt: skip
        os.environ.setdefault(key, value)
    dist.init_process_group("nccl" if ranks.device.type == "cuda" else "gloo", rank=0, world_size=1)


class _FrozenVision:
    """A frozen vision tower that DeepSpeed shall not see: each block in which DeepSpeed walks over all parameters runs
    ``with`` it, and there the tower hangs on nothing: its module, or the modules and parameters of a list of them. Such
    parameters, which no module of the tower calls on, stay out also where the tower trains."""

    def __init__(self, module: nn.Module, stage: int) -> None:
        family, model = getattr(module, "family", None), getattr(module, "model", None)
        tower = family.vision_tower(model) if stage == 3 and family is not None and model is not None else None
        parts: list[Any] = []
        if isinstance(tower, nn.ModuleList):
            parts = [p for p in tower.parameters(recurse=False) if not p.requires_grad]
        if tower is not None and not any(p.requires_grad for p in tower.parameters()):
            parts += list(tower) if isinstance(tower, nn.ModuleList) else [tower]
        ids = {id(x) for x in parts}
        self._homes: list[tuple[nn.Module, str, dict[str, Any], list[str]]] = []
        for parent in module.modules():
            for kind in ("_modules", "_parameters"):
                table = getattr(parent, kind)
                if hidden := {name: x for name, x in table.items() if id(x) in ids}:
                    self._homes.append((parent, kind, hidden, list(table)))

    def __enter__(self) -> None:
        for parent, kind, hidden, _ in self._homes:
            for name in hidden:
                del getattr(parent, kind)[name]

    def __exit__(self, *_: object) -> None:
        for parent, kind, hidden, order in self._homes:
            table = getattr(parent, kind)
            table.update(hidden)
            if kind == "_modules":  # modules run in their order
                table.update({n: table.pop(n) for n in order})


# What stage 3 leaves on every module; the next engine would take the functions for its own
_LEFT_BEHIND = (
    "ds_id", "all_parameters", "ds_recompute_parameters", "_original_parameters", "_external_params", "post_bwd_fn",
    "pre_bwd_fn", "ds_external_parameters", "applied_pre_backward_ref_cnt", "ds_grads_remaining",
)  # fmt: skip


def _restore_module(module: nn.Module, trained: Callable[[nn.Parameter], Tensor | None], engine: Any) -> None:
    """Undo stage 3's partitioning: put what ``trained`` has, gather the rest. Collective."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    full: dict[int, nn.Parameter] = {}
    for p in module.parameters():
        if not hasattr(p, "ds_id"):
            full[id(p)] = p
            continue
        value = trained(p)
        if value is None:
            with GatheredParameters([p]):
                value = p.data.clone()
        full[id(p)] = nn.Parameter(value.to(p.dtype), requires_grad=p.requires_grad)
    engine.destroy()
    for m in module.modules():
        entries = list(dict.items(m._parameters))  # DeepSpeed's mapping would gather on access
        m._parameters = {name: None if p is None else full[id(p)] for name, p in entries}
        for name in _LEFT_BEHIND:
            m.__dict__.pop(name, None)
