"""The ways of sampling that the demo compares."""

from __future__ import annotations

from dataclasses import dataclass

from fastdiff.methods import EncoderPropagation, ExitSchedule, FeatureInheritance, LayerSkipping, Method
from fastdiff.pipelines.acceleration import PRESETS

FULL = "full"
FINETUNED_FULL = "finetuned-full"
PLAIN = "steps-"
"""Keys of plain contenders with fewer steps begin so."""

TRANSFORMER_METHODS: dict[str, tuple[str, Method]] = {
    "feature-inheritance-2": ("Feature inheritance, every 2nd step", FeatureInheritance(interval=2)),
    "feature-inheritance-3": ("Feature inheritance, every 3rd, forecast", FeatureInheritance(interval=3, order=1)),
    "layer-skipping": ("Layer skipping", LayerSkipping()),
    "exit-untrained": ("Exit schedule, untrained (experimental)", ExitSchedule("ase-demo")),
}
"""Label and method of the training-free contenders, by key."""

UNET_METHODS: dict[str, tuple[str, Method]] = {
    "encoder-propagation-sequential": (
        "Encoder propagation, published keys, sequential",
        EncoderPropagation(parallel=False),
    ),
    "encoder-propagation": ("Encoder propagation, published keys, parallel", EncoderPropagation()),
    "encoder-propagation-uniform-3": ("Encoder propagation, every 3rd, parallel", EncoderPropagation(3)),
    "deepcache-2": ("DeepCache, every 2nd step", FeatureInheritance.deepcache(2)),
    "deepcache-3": ("DeepCache, every 3rd", FeatureInheritance.deepcache(3)),
    "deepcache-5": ("DeepCache, every 5th", FeatureInheritance.deepcache(5)),
}
"""The same for UNets, on which the presets are feature inheritance with forecasts."""


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


def contenders(steps: int, *, finetuned: bool, unet: bool) -> list[Contender]:
    """All ways, for full sampling with this many steps.

    Args:
        steps: inference steps of full sampling.
        finetuned: whether there is a fine-tuned copy.
        unet: whether the denoiser is a UNet; else it is a transformer.
    """
    group = "Training-free methods"
    free = [
        Contender(key, label, group, steps, (method,))
        for key, (label, method) in (UNET_METHODS if unet else TRANSFORMER_METHODS).items()
    ]
    tuned = "Fine-tuned copy"
    trained = [
        Contender(FINETUNED_FULL, "Full depth", tuned, steps, (), True, FINETUNED_FULL),
        Contender(
            "finetuned-exit", "Exit schedule ase-demo", tuned, steps, (ExitSchedule("ase-demo"),), True, FINETUNED_FULL
        ),
    ]
    return [
        Contender(FULL, f"Full, {steps} steps", "Baseline", steps),
        *(
            Contender(f"preset-{name}", f"Preset {name}", "Presets", steps, methods)
            for name, methods in PRESETS.items()
            if methods
        ),
        *free,
        *(trained if finetuned else ()),
        *map(plain, fewer_steps(steps)),
    ]


def plain(steps: int) -> Contender:
    """Simply taking fewer steps."""
    return Contender(f"{PLAIN}{steps}", f"Plain, {steps} steps", "Simply fewer steps", steps)


def fewer_steps(steps: int) -> list[int]:
    """About a half, a third and a quarter of the steps, as far as these differ."""
    return sorted({round(steps / divisor) for divisor in (2, 3, 4)} - {0, steps}, reverse=True)
