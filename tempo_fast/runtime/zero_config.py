"""DeepSpeed's configuration: every value written out, a file of the user's merged in where it may decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tempo_fast.config import TrainConfig
from tempo_fast.errors import InputError

SHIPPED = Path(__file__).resolve().parents[1] / "recipes" / "deepspeed"
_LARGE = 50_000_000  # elements of a communication bucket: 200 MB in float32

# What would take a part of the training over, or keep state where checkpoints do not look for it
_REFUSED = (
    "optimizer", "scheduler", "train_batch_size", "amp", "torch_autocast", "compile", "checkpoint", "data_efficiency",
    "curriculum_learning", "sparse_attention", "tensor_parallel", "pipeline",
    "zero_optimization.zero_quantized_weights", "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zero_hpz_partition_size", "zero_optimization.mics_shard_size",
    "zero_optimization.elastic_checkpoint", "zero_optimization.zenflow",
)  # fmt: skip


def zero_config(config: TrainConfig, n_trainable: int, *, persist_below: int = 100_000) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, the values of ``config.deepspeed`` in the place of our defaults.

    Args:
        n_trainable: elements that train; buckets are no larger.
        persist_below: under stage 3 parameters with fewer elements are never partitioned.

    Raises:
        InputError: the file cannot be read, says ``auto``, contradicts what ``config`` decides, or asks for something
            that this engine does not do; the key is named.
    """
    defaults, fixed = _defaults(config, n_trainable, persist_below), _fixed(config)
    merged = _merged(defaults, fixed)
    if not config.deepspeed:
        return merged
    path = find_file(config.deepspeed)
    theirs = _read(path)
    for key, value in _leaves(theirs):
        off = not value or (value == 1 and value is not True)  # a group of one is none
        if any(key == no or key.startswith(no + ".") for no in _REFUSED) and not off:
            raise InputError(f"{path}: {key} is not for this file: training does without it, or decides it itself")
        if value == "auto":
            raise InputError(f"{path}: {key} is 'auto', which means nothing here; give a value, or leave the key out")
        if key.endswith(".device") and value == "nvme":
            raise InputError(f"{path}: {key} is nvme; only cpu and none are supported")
        ours = _get(fixed, key)
        if ours is not None and ours != value:
            source = _DECIDES.get(key, "training")
            raise InputError(f"{path}: {key} is {value!r}, but {source} makes it {ours!r}; change one of them")
    return _merged(_merged(merged, theirs), fixed)


def find_file(name: str) -> Path:
    """A JSON file, or the name of a shipped one. Raises InputError."""
    path, shipped = Path(name), SHIPPED / f"{Path(name).stem}.json"
    if path.is_file():
        return path
    if path.parent.name == "" and shipped.is_file():
        return shipped
    known = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.json")))
    raise InputError(f"train.deepspeed: {name} is no file; shipped ones are {known}")


# Which key of ours decides one of theirs
_DECIDES = {
    "gradient_clipping": "train.max_grad_norm",
    "bf16.enabled": "training, which keeps float32 masters itself,",
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.memory_efficient_linear": "train.gradient_checkpointing",
    "zero_optimization.offload_optimizer.device": "train.offload_optimizer",
    "zero_optimization.offload_param.device": "train.offload_parameters",
}


def _fixed(config: TrainConfig) -> dict[str, Any]:
    """What no file may change."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    if config.zero_stage == 3 and config.gradient_checkpointing == "selective":
        # DeepSpeed's own linear layer adds its bias in place to the product that selective recomputing keeps, which
        # then has it twice; torch's holds a gathered weight only while one layer is computed again
        zero["memory_efficient_linear"] = False
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # step() is the boundary: the number of micro-batches differs from step to step
        "managed_gradient_accumulation": False,
        # stage 0 clips in our hook, which also measures
        "gradient_clipping": config.max_grad_norm if config.zero_stage else 0.0,
        # float32 masters and sums whatever the weights' dtype
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        # torch's AdamW updates what is offloaded: no compiler is needed where the job runs
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def _defaults(config: TrainConfig, n_trainable: int, persist_below: int) -> dict[str, Any]:
    """What a file may change."""
    bucket = max(1000, min(_LARGE, n_trainable))
    zero: dict[str, Any] = {}
    if config.zero_stage >= 2:
        # several backwards may come before a step; overlapping them with the reduction needs stage 2 and a GPU
        zero |= {
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket + bucket % 2,
        }
    if config.zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": persist_below,
            "stage3_prefetch_bucket_size": _LARGE,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "sub_group_size": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    for name, on in (("offload_optimizer", config.offload_optimizer), ("offload_param", config.offload_parameters)):
        if on:
            zero[name] = {"pin_memory": _has_cuda()}
    return {"steps_per_print": 1_000_000_000, "wall_clock_breakdown": False, "zero_optimization": zero}


def _has_cuda() -> bool:
    """Pinned memory needs a device to copy to."""
    import torch

    return torch.cuda.is_available()


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except ValueError as e:
        raise InputError(f"{path}: not valid JSON ({e})") from e
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected an object of DeepSpeed's settings")
    return data


def _leaves(data: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in data.items():
        out += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return out


def _get(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """``second`` over ``first``, section by section."""
    out = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both else value
    return out
