"""``fastdiff demo``: sample a shipped model full and fast, measure both, and write a report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.cli.options import add_device_options, choose_device, new_parser

if TYPE_CHECKING:
    from fastdiff.cli.comparison import Comparison

MODEL, FINETUNED, READER = "zoo:glyphs-dit", "zoo:glyphs-dit-ase", "zoo:glyphs-cnn"

PURPOSE = """\
Sample a shipped model in full and with every method, from the same seeds, and measure what each gains and costs. Needs
no download and no accelerator; sampling takes about two minutes on two CPU cores. The folder gets report.html, the
samples side by side, the plans that ran, and the numbers as JSON, CSV and Markdown. Simply taking fewer steps is
measured too, so that you see whether a method beats it. Rows that lose stay in."""

EXAMPLES = (
    "fastdiff demo",
    "fastdiff demo --model zoo:glyphs-sd --out demo-sd",
    "fastdiff demo --samples 720 --batch 36 --out thorough",
    "fastdiff demo --steps 20 --seed 1000",
    "fastdiff demo --device cuda --samples 3600 --batch 180",
)


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = new_parser(subparsers, "demo", PURPOSE, EXAMPLES)
    parser.add_argument("--out", default="demo", help="folder for the results (default: %(default)s)")
    parser.add_argument(
        "--samples", type=int, default=108, metavar="N", help="images of each row (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=12, metavar="N", help="images in one call (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=50, metavar="N", help="steps of full sampling (default: %(default)s)"
    )
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=4.0,
        metavar="G",
        help="where the model is guided (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first image (default: %(default)s)")
    parser.add_argument(
        "--renders", type=int, default=2000, metavar="N", help="held-out renders (default: %(default)s)"
    )
    parser.add_argument(
        "--model",
        default=MODEL,
        help=f"pipeline that samples glyphs by class label, by prompt or by chance (default: {MODEL})",
    )
    parser.add_argument(
        "--finetuned",
        metavar="MODEL",
        help=f"copy fine-tuned under the exit schedule ase-demo, or 'none' (default: {FINETUNED} for the default "
        "model, none for another)",
    )
    parser.add_argument("--reader", default=READER, metavar="MODEL", help=f"judge of glyphs (default: {READER})")
    add_device_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure and write the report."""
    from diffusers.utils.logging import disable_progress_bar

    from fastdiff.cli.comparison import Progress, Settings, compare
    from fastdiff.cli.results import as_markdown, headline
    from fastdiff.output import staged_folder

    finetuned = options.finetuned or (FINETUNED if options.model == MODEL else None)
    names = ("model", "reader", "samples", "batch", "steps", "guidance_scale", "seed", "renders", "dtype")
    settings = Settings(
        finetuned=None if finetuned == "none" else finetuned,
        device=choose_device(options.device),
        **{name: getattr(options, name) for name in names},
    )
    disable_progress_bar()  # diffusers' own, for every model it loads
    with staged_folder(options.out) as folder:
        progress = Progress()
        try:
            comparison = compare(settings, progress)
            progress.says("writing")
            write(comparison, folder)
            progress.advance(1)
        finally:
            progress.close()
    print(as_markdown(comparison))
    print(headline(comparison))
    print(f"{comparison.sampling_seconds:.0f} s of sampling. Open {Path(options.out) / 'report.html'}")


def write(comparison: Comparison, folder: Path) -> None:
    """Write all files of the demo into a folder."""
    from fastdiff.cli import pictures
    from fastdiff.cli.report import render
    from fastdiff.cli.results import PROMPTS, as_csv, as_data, as_markdown
    from fastdiff.plan import write_json

    import matplotlib  # isort: skip

    matplotlib.use("Agg")
    images = {
        "samples": pictures.png(pictures.draw_samples(comparison), dpi=150),
        "trade-off": pictures.png(pictures.draw_trade_off(comparison), dpi=150),
    }
    for row in comparison.rows:
        key = row.contender.key
        row.ran.plan.save(folder / "plans" / f"{key}.json")
        images[f"plans/{key}"] = pictures.png(pictures.draw_plan(row))
    for name, picture in images.items():
        pictures.write_png(folder / f"{name}.png", picture)
    if prompts := comparison.task.requests.get("prompt"):
        (folder / PROMPTS).write_text("\n".join(prompts) + "\n", encoding="utf-8")
    data = as_data(comparison)
    write_json(folder / "results.json", data)
    (folder / "results.csv").write_text(as_csv(comparison), encoding="utf-8")
    (folder / "results.md").write_text(as_markdown(comparison), encoding="utf-8")
    (folder / "report.html").write_text(render(comparison, data, images), encoding="utf-8")
