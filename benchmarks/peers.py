"""Which of the other packages run on which of the shipped pipelines, and how much they leave out there.

    python benchmarks/peers.py

Every peer of `fastdiff.eval.peers`, in the settings that `default_peers` has for the kind of pipeline: whether it runs,
whether it does anything, the share of the multiply-accumulates that remains (which is no time), how far the images are
from plain sampling, and whether undoing it leaves plain sampling bitwise as it was. Writes peers.md and peers.json to
--out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fastdiff import zoo
from fastdiff.eval import describe_environment, psnr
from fastdiff.eval.glyphs import glyph_task
from fastdiff.eval.peers import Peer, PeerUnavailableError, default_peers
from fastdiff.plan import write_json

MODELS = ("glyphs-dit", "glyphs-sd", "glyphs-ddpm")
RUNS, NO_EFFECT, CANNOT = "runs", "no effect", "cannot"


@dataclass(frozen=True)
class Row:
    """What one setting of a peer does on one pipeline.

    Args:
        peer: the settings.
        version: of the package.
        outcome: whether it runs, runs without effect, or cannot.
        reason: why it cannot.
        share: of plain sampling's multiply-accumulates of all networks that it makes.
        psnr: of its images against plain sampling's, in dB.
        engaged: what its own statistics say, where it has some.
        repeats: whether a second call, applied anew, gives the same images.
        restored: whether plain sampling afterwards gives the images it gave before.
        left: attributes of modules that its own undoing leaves changed, which the adapter puts back.
    """

    peer: str
    version: str | None
    outcome: str
    reason: str = ""
    share: float | None = None
    psnr: float | None = None
    engaged: bool | None = None
    repeats: bool | None = None
    restored: bool | None = None
    left: list[str] = field(default_factory=list)


class Bench:
    """A pipeline and what is sampled with it.

    Args:
        model: of the zoo.
        steps: of every call.
        batch: images of every call, from the seeds 0, 1, 2, ...
        guidance_scale: where the pipeline knows it.
    """

    def __init__(self, model: str, steps: int, batch: int, guidance_scale: float) -> None:
        self.pipe = DiffusionPipeline.from_pretrained(zoo.path(model))
        self.pipe.set_progress_bar_config(disable=True)
        self._steps, self._batch = steps, batch
        self._task = glyph_task(self.pipe, batch, guidance_scale=guidance_scale).task
        self._plain, self._macs = self._counted()

    def sample(self) -> np.ndarray:
        """Images, float32 in [0, 1] of shape ``(batch, height, width, 3)``."""
        asked = self._task.arguments(range(self._batch))
        return self.pipe(**asked, num_inference_steps=self._steps, output_type="np").images  # type: ignore[no-any-return]

    def _counted(self) -> tuple[np.ndarray, int]:
        with FlopCounterMode(display=False) as counter:
            images = self.sample()
        return images, counter.get_total_flops()

    def row(self, peer: Peer) -> Row:
        """Try a setting."""
        try:
            prepared = peer.prepared(self.pipe, self._steps, self.sample)
            undo = prepared.apply(self.pipe, self._steps)
        except PeerUnavailableError as error:
            return Row(str(peer), peer.version(), CANNOT, str(error), restored=self._is_plain())
        try:
            images, macs = self._counted()
            engaged = prepared.engaged(self.pipe)
        except Exception as error:  # whatever the peer meets in the call is its answer
            undo()
            reason = f"fails in the call with {type(error).__name__}: {error}"
            return Row(str(peer), peer.version(), CANNOT, reason, restored=self._is_plain())
        left = undo()
        with prepared.applied(self.pipe, self._steps):
            again = self.sample()
        same = np.array_equal(images, self._plain)
        return Row(
            str(peer),
            peer.version(),
            NO_EFFECT if same else RUNS,
            share=macs / self._macs,
            psnr=None if same else psnr(images, self._plain),
            engaged=engaged,
            repeats=np.array_equal(again, images),
            restored=self._is_plain(),
            left=sorted(left),
        )

    def _is_plain(self) -> bool:
        return np.array_equal(self.sample(), self._plain)


# -- tables ------------------------------------------------------------------------------------------------------------


def render(data: dict[str, Any]) -> str:
    """The results as Markdown."""
    settings, environment = data["settings"], data["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(data["versions"].items()))
    lines = [
        "# Other packages on the shipped pipelines",
        "",
        f"{versions}; torch {environment['torch']}. {settings['steps']} DDIM steps, {settings['batch']} images, "
        "float32 on a CPU. Work is the share of plain sampling's multiply-accumulates, as torch counts them, over all "
        "networks; it is no time. PSNR is against plain sampling from the same noise. Made by `benchmarks/peers.py`; "
        "how each peer is enabled is in [docs/peers.md](../../docs/peers.md).",
        "",
        *overview(data["models"]),
    ]
    for model, rows in data["models"].items():
        lines += [
            "",
            f"## zoo:{model}",
            "",
            "| peer | | work | PSNR | same again | undone bitwise |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in rows if row["outcome"] != CANNOT]
        lines += [
            "",
            "Cannot:",
            "",
            *(f"- `{row['peer']}`: {row['reason']}" for row in rows if row["outcome"] == CANNOT),
        ]
    lines += [
        "",
        "## What is left on modules when a peer is undone by public functions",
        "",
        "The adapters take it off.",
        "",
    ]
    lines += [
        f"- {name}: {', '.join(f'`{attribute}`' for attribute in left)}" for name, left in leftovers(data).items()
    ]
    return "\n".join(lines) + "\n"


def overview(models: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Peers by pipelines: the best that any setting of a peer comes to."""
    order = (RUNS, NO_EFFECT, CANNOT)
    peers = dict.fromkeys(name_of(row) for rows in models.values() for row in rows)
    lines = [f"| peer | {' | '.join(models)} |", f"|---{'|---' * len(models)}|"]
    for peer in peers:
        cells = (
            min((row["outcome"] for row in rows if name_of(row) == peer), key=order.index) for rows in models.values()
        )
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    return lines


def leftovers(data: dict[str, Any]) -> dict[str, list[str]]:
    """Attributes by peer."""
    found: dict[str, set[str]] = {}
    for rows in data["models"].values():
        for row in rows:
            found.setdefault(name_of(row), set()).update(row["left"])
    return {name: sorted(left) for name, left in sorted(found.items()) if left}


def name_of(row: dict[str, Any]) -> str:
    """The peer of a row."""
    return str(row["peer"]).partition(":")[0]


def _line(row: dict[str, Any]) -> str:
    shown: Callable[[bool], str] = lambda value: "yes" if value else "**no**"  # noqa: E731
    far = "" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
    spec = str(row["peer"]).replace("|", "\\|")
    cells = (f"`{spec}`", row["outcome"], f"{row['share']:.0%}", far, shown(row["repeats"]), shown(row["restored"]))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Try everything and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="pipelines of the zoo")
    parser.add_argument("--steps", type=int, default=50, help="of every call (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="images of every call (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="of the guided pipelines")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    models = {}
    for model in options.models:
        bench = Bench(model, options.steps, options.batch, options.guidance_scale)
        models[model] = [asdict(bench.row(peer)) for peer in tqdm(default_peers(bench.pipe), desc=model)]
    data = {
        "settings": {name: getattr(options, name) for name in ("steps", "batch", "guidance_scale")},
        "environment": describe_environment(),
        "versions": {cls.distribution: cls.version() for cls in Peer.registry.values()},
        "models": models,
    }
    write_json(options.out / "peers.json", data)
    (options.out / "peers.md").write_text(render(data), encoding="utf-8")


if __name__ == "__main__":
    main()
