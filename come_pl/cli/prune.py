"""Lightning CLI wiring of `prune.py` and `come-prune`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from come_pl.cli.common import add_run_arguments, check_seed, guarded, normalise, quiet, scan, with_doubles, with_half

ALIASES = {  # the official toolkit's flags, and short names, by what they are here
    "--method": "--method.name",
    "--model_name": "--model.path",
    "--save_path": "--output",
    "--calibration_dataset": "--data.calibration",
    "--nsamples": "--data.nsamples",
    "--seqlen": "--data.seqlen",
    "--batch_size": "--data.batch_size",
    "--skip_method": "--method.skip_method",
    "--merge_item": "--method.merge_item",
    "--wo_repeat": "--method.wo_repeat",
    "--granularity": "--method.granularity",
    "--psu": "--method.p",
    "--min_max": "--method.rho",
    "--barriers": "--method.barriers",
    "--angular": "--method.angular",
    "--norm_power": "--method.norm_power",
    "--weight_reduction": "--method.weight_reduction",
    "--block_reduction": "--method.block_reduction",
    "--heuristic": "--method.heuristic",
    "--retain_layer": "--method.retain_layer",
    "--compensate": "--method.compensate",
    "--num_tasks": "--method.num_tasks",
    "--offload": "--model.offload",
    "--cache": "--model.cache",
    "--cache_gib": "--model.cache_gib",
    "--refit": "--refit.parts",
    "--refit_when": "--refit.when",
    "--sweep": "--refit.sweep",
    "--refit_ahead": "--refit.ahead",
    "--refit_channels": "--refit.channels",
    "--refit_final": "--refit.final",
    "--refit_last": "--refit.last",
    "--select": "--method.select",
    "--ppl_data": "--evaluation.data",
}
SWITCHES = {  # a bare flag means true
    *("--method.wo_repeat", "--method.angular", "--method.heuristic"),
    *("--continue_saving", "--overwrite", "--resume"),
}
LISTS = {"--evaluation.data", "--method.retain_layer"}
PRESETS = ("best", "paper")


def prune_main() -> None:
    """Console script `come-prune`, and `prune.py`."""
    guarded(_prune, "the last finished step")


def refuse_unknown(argv: Sequence[str], method: str, known: Sequence[str]) -> None:
    """Raises ValueError if an option of methods is given that this one has not; `known` are its own, as method.NAME."""
    for word in argv:
        option = word.partition("=")[0].rstrip("+")
        if option.startswith("--method.") and option != "--method.name" and option[2:] not in known:
            has = ", ".join(f"--{k}" for k in known) or "none"
            raise ValueError(f"method {method!r} has no option {option}; its options: {has}")


def _prune() -> None:
    quiet()
    from lightning import seed_everything
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.strategies import StrategyRegistry

    from come_pl.cli.parser import Parser
    from come_pl.data import CalibrationData
    from come_pl.pruning.loop import PruningDDP
    from come_pl.pruning.methods import ALIASES as METHOD_ALIASES
    from come_pl.pruning.methods import DEFAULT, DEFAULT_SETTINGS, METHODS, find
    from come_pl.pruning.module import PruningModule
    from come_pl.pruning.refit import Refit
    from come_pl.workflows.prune import prune
    from come_pl.workflows.texts import EvaluationText

    # in place: Lightning starts further processes with the same sys.argv
    sys.argv[1:] = normalise(sys.argv[1:], ALIASES, SWITCHES, LISTS)
    given = scan(sys.argv[1:], "preset", "")
    if given not in ("", *PRESETS):
        raise ValueError(f"--preset {given}: expected one of {', '.join(PRESETS)}")
    asked = scan(sys.argv[1:], "method", "") or ("come" if given == "paper" else "")
    name, method_class = find(asked or DEFAULT)
    preset = given or ("paper" if asked in METHOD_ALIASES else "best")
    StrategyRegistry.register("pruning_ddp", PruningDDP, override=True)

    class PruneCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            add_run_arguments(parser)
            parser.add_argument("--target_layers", type=int | None, default=None, help="Depth of the pruned model.")
            parser.add_argument(
                "--sparsity",
                type=float | None,
                default=None,
                help="Fraction of the decoder layers' parameters to remove, instead of a depth; 0.3 without either.",
            )
            parser.add_argument(
                "--output",
                type=str | None,
                default=None,
                help="Run folder; by default runs/prune/ and a name made of model, method, depth and settings.",
            )
            parser.add_argument(
                "--continue_saving",
                type=bool,
                default=False,
                help="Save the model of every depth on the way, or of those that --evaluation.at measures. What is "
                "repaired at the end only (--refit_when end, --refit_final) is not repaired in these.",
            )
            parser.add_argument(
                "--method.name",
                type=str,
                default=name,
                help=f"Pruning method: {', '.join(METHODS)} (aliases: {', '.join(METHOD_ALIASES)}). Without one: "
                f"{DEFAULT} with --refit best, what measured best; come with --preset paper.",
            )
            known = parser.add_class_arguments(method_class, "method", instantiate=False)
            refuse_unknown(sys.argv[1:], name, known)
            parser.add_class_arguments(Refit, "refit")
            parser.add_argument(
                "--preset",
                type=Literal["best", "paper"],
                default=preset,
                help="Where settings that are not given come from: what measured best, or the released code. The "
                "official names (concat_merge, concat_merge_P) mean paper.",
            )
            if not asked:
                parser.set_defaults(DEFAULT_SETTINGS)
            if preset == "paper":
                published = {"rho": 0.0, "wo_repeat": False, "span_tokens": "last", "select": "span"}
                if name == "come_p":
                    published = {"wo_repeat": False}
                own = {f"method.{k}": v for k, v in published.items() if f"method.{k}" in known}
                parser.set_defaults({"refit.parts": "none", **own})
            parser.add_class_arguments(EvaluationText, "evaluation")

        def before_instantiate_classes(self) -> None:
            trainer = self.config.trainer
            trainer.accelerator = with_doubles(trainer.accelerator)
            trainer.precision = with_half(trainer.precision, trainer.accelerator)
            if trainer.strategy == "auto" and str(trainer.devices) != "1" or trainer.strategy == "ddp":
                trainer.strategy = "pruning_ddp"

    cli = PruneCLI(
        PruningModule,
        CalibrationData,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        auto_configure_optimizers=False,
        parser_class=Parser,
        parser_kwargs={
            "aliases": ALIASES,
            "usage": "prune.py [--method NAME] [--model.path PATH] [--target_layers N] [options]; see --help",
            "description": "Make a causal language model shallower. Without arguments: the demo model, 30 → 21 layers.",
        },
        trainer_defaults={
            "max_epochs": -1,
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
        },
    )
    config = cli.config
    check_seed(config.seed)
    seed_everything(config.seed, verbose=False)
    options = {k: v for k, v in config.method.items() if k != "name"}
    output = Path(config.output) if config.output else None
    prune(
        cli.model,
        cli.datamodule,
        cli.trainer,
        method=name,
        options=options,
        refit=cli.config_init.refit,
        target_layers=config.target_layers,
        sparsity=config.sparsity,
        evaluation=cli.config_init.evaluation,
        output=output,
        seed=config.seed,
        continue_saving=config.continue_saving,
        overwrite=config.overwrite,
        samples=config.samples,
        resume=config.resume,
    )


if __name__ == "__main__":  # `come-compare` starts its runs so
    prune_main()
