"""``fastdiff plan``: look at what a method would do, and save it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.cli.options import add_device_options, add_method_options, load_pipeline, new_parser
from fastdiff.errors import ConfigError

if TYPE_CHECKING:
    from fastdiff.plan import ComputePlan

PURPOSE = """\
Show or save a compute plan. It says what every unit of a denoiser does at every evaluation of a sampling call; nothing
is sampled. A plan is made for one model, one scheduler and one number of steps."""

SHOW = """\
Draw a plan as text, and with --png as a picture. The plan is that of a MODEL's methods, or one that was saved."""

SAVE = """\
Save the plan of a MODEL's methods as JSON. `fastdiff generate --method plan:FILE` and fastdiff.ComputePlan.load read
it; it can be edited: one digit for each unit, one line for each evaluation."""

SHOW_EXAMPLES = (
    "fastdiff plan show zoo:glyphs-dit",
    "fastdiff plan show zoo:glyphs-dit --method layer-skipping:speedup=2,fill=skip --steps 20",
    "fastdiff plan show zoo:glyphs-dit-ase --method exit-schedule:preset=ase-demo --png plan.png",
    "fastdiff plan show demo/plans/preset-fast.json",
)
SAVE_EXAMPLES = (
    "fastdiff plan save zoo:glyphs-dit --preset fast --steps 50 --out fast.json",
    "fastdiff plan save ./my-pipeline --method feature-inheritance:interval=3 --steps 28 --out plan.json",
)


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = new_parser(subparsers, "plan", PURPOSE, SHOW_EXAMPLES + SAVE_EXAMPLES)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    show = new_parser(actions, "show", SHOW, SHOW_EXAMPLES)
    show.add_argument("model", metavar="MODEL|PLAN.json", help="folder, repository, zoo:NAME, or a saved plan")
    show.add_argument("--png", metavar="FILE", help="draw the plan into this file too")
    show.add_argument("--width", type=int, default=100, help="characters per line (default: 100)")
    show.set_defaults(run=run_show)

    save = new_parser(actions, "save", SAVE, SAVE_EXAMPLES)
    save.add_argument("model", metavar="MODEL", help="folder, repository or zoo:NAME")
    save.add_argument("--out", metavar="FILE", default="plan.json", help="file to write (default: plan.json)")
    save.set_defaults(run=run_save)

    for subparser in (show, save):
        add_method_options(subparser)
        subparser.add_argument("--steps", type=int, default=50, metavar="N", help="inference steps (default: 50)")
        subparser.add_argument("--denoiser", metavar="NAME", help="component, where a pipeline has several")
        add_device_options(subparser)


def run_show(options: argparse.Namespace) -> None:
    """Print the plan."""
    from fastdiff.output import OutputError
    from fastdiff.plan import ComputePlan

    if Path(options.model).is_file():
        if options.method or options.preset:
            raise ConfigError(f"{options.model} is a saved plan, to which no --method or --preset applies.")
        plan = ComputePlan.load(options.model)
    else:
        plan = _plan_of_model(options)
    print(plan.render(options.width))
    if options.png:
        import matplotlib.figure

        matplotlib.use("Agg")
        figure = plan.plot().figure
        assert isinstance(figure, matplotlib.figure.Figure)
        try:
            figure.savefig(options.png, dpi=150)
        except (OSError, ValueError) as error:
            raise OutputError(f"The picture cannot be written to {options.png}: {error}") from error


def run_save(options: argparse.Namespace) -> None:
    """Write the plan."""
    from fastdiff.output import OutputError

    plan = _plan_of_model(options)
    try:
        plan.save(options.out)
    except OSError as error:
        raise OutputError(f"The plan cannot be written to {options.out}: {error}") from error
    print(f"{plan.evaluations} evaluations × {len(plan.units)} units, {plan.share:.1%} computed: {options.out}")


def _plan_of_model(options: argparse.Namespace) -> ComputePlan:
    if options.steps < 1:
        raise ConfigError(f"--steps is at least 1; got {options.steps}.")
    pipe = load_pipeline(options, options.model)
    return pipe.fastdiff.plan(options.steps, options.denoiser)
