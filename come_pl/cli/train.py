"""Lightning CLI wiring of `train.py` and `come-train`."""

from __future__ import annotations

import os
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from come_pl.cli.common import add_run_arguments, check_seed, guarded, normalise, quiet, scan, with_doubles, with_half

ALIASES = {
    "--distill": "--distill.name",
    "--save_path": "--output",
    "--source": "--data.source",
    "--tokens": "--data.tokens",
    "--seqlen": "--data.seqlen",
    "--batch_size": "--data.batch_size",
    "--ppl_data": "--evaluation.data",
    "--ckpt_path": "--resume",
}
SWITCHES = {"--resume", "--overwrite", "--plan"}  # a bare flag means true
LISTS = {"--evaluation.data"}


def train_main() -> None:
    """Console script `come-train`, and `train.py`."""
    guarded(_train, "its last checkpoint")


def default_config(name: str) -> str:
    """`configs/distill_NAME.yaml` of the working folder, or else the copy inside the package."""
    here = Path("configs") / f"distill_{name}.yaml"
    if here.is_file():
        return str(here)
    return str(resources.files("come_pl.distillation") / "defaults" / f"distill_{name}.yaml")


def _train() -> None:
    quiet()
    from lightning import Trainer, seed_everything
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from come_pl.cli.parser import Parser
    from come_pl.data import DistillationData
    from come_pl.distillation import strategy
    from come_pl.distillation.registry import DEFAULT, METHODS, find
    from come_pl.offload import Offload
    from come_pl.workflows.distil import distil
    from come_pl.workflows.texts import EvaluationText

    # in place: Lightning starts further processes with the same sys.argv
    sys.argv[1:] = normalise(sys.argv[1:], ALIASES, SWITCHES, LISTS)
    name = scan(sys.argv[1:], "distill", DEFAULT)
    method_class = find(name)
    strategy.register()
    wanted: dict[str, str] = {}

    class TrainCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument(
                "--distill.name", type=str, default=name, help=f"Distillation method: {', '.join(METHODS)}."
            )
            parser.add_argument(
                "--student", type=str | None, default=None, help="Run folder of prune.py; by default the newest."
            )
            parser.add_argument(
                "--teacher", type=str | None, default=None, help="Dense model; by default the one that was pruned."
            )
            parser.add_argument(
                "--output", type=str | None, default=None, help="Run folder; by default runs/distill/ and a name."
            )
            add_run_arguments(parser)
            parser.add_argument(
                "--plan", type=bool, default=False, help="Print the memory plan and stop; no weight is read."
            )
            parser.add_argument(
                "--offload",
                type=Offload,
                default="none",
                help="Where the teacher's matrices are while they are not used: none (in memory), disk (read from its "
                "safetensors files, once a batch), or cpu (host memory, beside an accelerator).",
            )
            parser.add_argument("--save_every", type=int, default=50, help="Optimizer steps between two checkpoints.")
            parser.add_argument(
                "--patience", type=int | None, default=None, help="Validations without a lower loss before stopping."
            )
            parser.add_class_arguments(EvaluationText, "evaluation")

        def before_instantiate_classes(self) -> None:
            trainer = self.config.trainer
            trainer.accelerator = with_doubles(trainer.accelerator)
            if trainer.precision is None:
                elsewhere = self.config.plan and trainer.accelerator not in ("auto", "cpu")
                trainer.precision = "bf16-mixed" if elsewhere else with_half(None, trainer.accelerator)
            wanted.update(
                strategy=str(trainer.strategy), precision=str(trainer.precision), devices=str(trainer.devices)
            )
            wanted.update(num_nodes=str(trainer.num_nodes), accelerator=str(trainer.accelerator))
            if self.config.plan:  # the machine that the plan is for need not be this one
                trainer.strategy, trainer.accelerator, trainer.devices, trainer.num_nodes = "auto", "cpu", 1, 1

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            kwargs["strategy"] = strategy.named(self._get(self.config_init, "trainer.strategy", "auto"))
            return super().instantiate_trainer(**kwargs)

    cli = TrainCLI(
        method_class,
        DistillationData,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        auto_configure_optimizers=False,
        parser_class=Parser,
        parser_kwargs={
            "aliases": ALIASES,
            "usage": "train.py [--distill NAME] [--student RUN] [--data.source TEXT] [options]; see --help",
            "description": "Distil a pruned model from its dense teacher. Without arguments: the newest pruned run, "
            "--distill hybrid, embedded text.",
            "default_config_files": [default_config(name)],
        },
        trainer_defaults={
            "max_epochs": 1,
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,  # `distil` brings its own
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "gradient_clip_val": 1.0,
        },
    )
    config = cli.config
    if config.plan:
        from come_pl.distillation.plan import print_plan

        print_plan(cli.model, cli.datamodule, config.student, config.teacher, wanted, config.offload)
        return
    check_seed(config.seed)
    seed_everything(config.seed, verbose=False)
    distil(
        cli.model,
        cli.datamodule,
        cli.trainer,
        method=name,
        options={k: v for k, v in config.model.items() if k != "explode"},
        student=config.student,
        teacher=config.teacher,
        evaluation=cli.config_init.evaluation,
        output=Path(config.output) if config.output else None,
        seed=config.seed,
        resume=config.resume,
        overwrite=config.overwrite,
        save_every=config.save_every,
        patience=config.patience,
        samples=config.samples,
        offload=config.offload,
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    train_main()
