"""The ways of sampling that the demo compares."""

from __future__ import annotations

from dataclasses import dataclass

from fastdiff.methods import ExitSchedule, FeatureInheritance, LayerSkipping, Method
from fastdiff.pipelines.acceleration import PRESETS

FULL = "full"
FINETUNED_FULL = "finetuned-full"


@dataclass(frozen=True)
class Contender:
    """One way of sampling the same images.

    Args:
        key: its name in files and results.
        label: its name for a person.
        group: what kind of way it is; contenders of one group stand together.
        steps: inference steps.
        methods: what is enabled; nothing means the plain diffusers pipeline.
        finetuned: whether it runs on the copy fine-tuned for exits.
        baseline: key of full sampling with the same weights, which speed and PSNR are relative to.
    """

    key: str
    label: str
    group: str
    steps: int
    methods: tuple[Method, ...] = ()
    finetuned: bool = False
    baseline: str = FULL

    @property
    def title(self) -> str:
        """The label where the group is not beside it."""
        return f"{self.group}: {self.label}" if self.finetuned else self.label


def contenders(steps: int, *, finetuned: bool) -> list[Contender]:
    """All ways, for full sampling with this many steps.

    Args:
        steps: inference steps of full sampling.
        finetuned: whether there is a fine-tuned copy.
    """
    trained = [
        Contender(FINETUNED_FULL, "Full depth", "Fine-tuned copy", steps, (), True, FINETUNED_FULL),
        Contender(
            "finetuned-exit",
            "Exit schedule ase-demo",
            "Fine-tuned copy",
            steps,
            (ExitSchedule("ase-demo"),),
            True,
            FINETUNED_FULL,
        ),
    ]
    return [
        Contender(FULL, f"Full, {steps} steps", "Baseline", steps),
        *(
            Contender(f"preset-{name}", f"Preset {name}", "Presets", steps, methods)
            for name, methods in PRESETS.items()
            if methods
        ),
        Contender(
            "feature-inheritance-2",
            "Feature inheritance, every 2nd step",
            "Training-free methods",
            steps,
            (FeatureInheritance(interval=2),),
        ),
        Contender(
            "feature-inheritance-3",
            "Feature inheritance, every 3rd, forecast",
            "Training-free methods",
            steps,
            (FeatureInheritance(interval=3, order=1),),
        ),
        Contender("layer-skipping", "Layer skipping", "Training-free methods", steps, (LayerSkipping(),)),
        Contender(
            "exit-untrained",
            "Exit schedule, untrained (experimental)",
            "Training-free methods",
            steps,
            (ExitSchedule("ase-demo"),),
        ),
        *(trained if finetuned else ()),
        *(
            Contender(f"steps-{fewer}", f"Plain, {fewer} steps", "Simply fewer steps", fewer)
            for fewer in fewer_steps(steps)
        ),
    ]


def fewer_steps(steps: int) -> list[int]:
    """About a half, a third and a quarter of the steps, as far as these differ."""
    return sorted({round(steps / divisor) for divisor in (2, 3, 4)} - {0, steps}, reverse=True)
