"""Strategies that run everywhere: DeepSpeed on CPU processes for tests, FSDP by one short name."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, StrategyRegistry

from come_pl import locks

DEEPSPEED: dict[str, dict[str, Any]] = {
    "deepspeed": {},
    "deepspeed_stage_1": {"stage": 1},
    "deepspeed_stage_2": {"stage": 2},
    "deepspeed_stage_2_offload": {"stage": 2, "offload_optimizer": True},
    "deepspeed_stage_3": {"stage": 3},
    "deepspeed_stage_3_offload": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
}


def extensions() -> Path:
    """The folder that torch compiles extensions in: what TORCH_EXTENSIONS_DIR says, else one of our own per release."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    own = cache / "come_pl" / f"extensions-torch{torch.__version__}"
    return Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own)))


def build_communication() -> None:
    """Compile DeepSpeed's operation for reductions between CPU processes, one process of a machine at a time.

    torch guards a build by a file that outlives a killed process and makes all later runs wait for ever. Here a lock
    of the operating system guards it, which dies with its process; who holds it may clear away such a file.
    """
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        return
    folder = extensions()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "building", "w") as lock:
        locks.lock(lock.fileno(), wait=True)
        (folder / builder.NAME / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


class AnyDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed as it is, but that it refuses neither processes without CUDA, nor our optimizer where the optimizer's
    states are offloaded: torch's fused AdamW runs on CPUs too, where DeepSpeed's own must be compiled first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config["zero_force_ds_cpu_optimizer"] = False  # type: ignore[index]

    @property
    def offloads(self) -> bool:
        """Whether the optimizer runs on the CPU."""
        return "offload_optimizer" in self.config.get("zero_optimization", {})  # type: ignore[union-attr]

    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices or []))]
        build_communication()
        DDPStrategy.setup_environment(self)  # leaves out only the check for CUDA


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices. (Left to itself Lightning makes the devices of a node one tensor-parallel group, in which
    nothing is sharded and each process goes its own way.)"""

    def setup_environment(self) -> None:
        self._tensor_parallel_size = 1
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def register() -> None:
    """Make `deepspeed*` the strategies of this module."""
    for name, options in DEEPSPEED.items():
        StrategyRegistry.register(name, AnyDeepSpeedStrategy, override=True, **options)


def named(strategy: Any) -> Any:
    """What the Trainer gets for a `--trainer.strategy`: `fsdp` is FSDP2, layers of the student sharded one by one."""
    if strategy == "fsdp":
        return ShardedStrategy(save_distributed_checkpoint=False)
    if isinstance(strategy, str) and strategy.startswith("deepspeed") and find_spec("deepspeed") is None:
        raise ValueError(f"--trainer.strategy {strategy} needs deepspeed: pip install 'come_pl[deepspeed]'")
    return strategy


def checkpoint_of(trainer: Any) -> str:
    """What a checkpoint of this trainer is, in words: only a run that would write the same can go on from it."""
    if not isinstance(trainer.strategy, DeepSpeedStrategy):
        return "whole, in one file"
    stage = trainer.strategy.config.get("zero_optimization", {}).get("stage", 0)  # type: ignore[union-attr]
    return f"of DeepSpeed stage {stage} on {trainer.world_size} processes"
