"""Ways of sampling the same images, read from text: fewer steps, fastdiff's methods, and other packages.

- ``steps:25``: plain sampling with fewer steps
- ``preset:balanced``: a preset of fastdiff's
- ``encoder-propagation:keys=3``: a method, in the syntax of the command line's ``--method``
- ``skip-tuning:rho=0.8+steps:10``: several together, here a method at a number of steps of its own
- ``exit-schedule:d-min=4..12``: a range makes a way of each number; 4..12..2 takes every second
- ``feature-inheritance:interval={2,3,5}``: a list makes a way of each entry
- ``deepcache:interval=3``: another package, see `fastdiff.eval.peers`
- ``kernels``: after `fastdiff.optimize`, alone or with methods; ``kernels:torch`` at this value of ``FASTDIFF_KERNELS``
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import fastdiff
from fastdiff.errors import ConfigError
from fastdiff.kernels.dispatch import MODES
from fastdiff.methods import ExitSchedule, FeatureInheritance, Method, SavedPlan
from fastdiff.pipelines.acceleration import preset_methods
from fastdiff.spec import PLAN, SAVED, format_method, kebab, method_classes, parse_method

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fastdiff.eval.peers import Peer

MAIN = "main"
"""Name of a sweep's pipeline where there is only one."""

BASELINE, FEWER_STEPS = "full", "fewer-steps"
"""Groups of plain ways."""

KERNELS = "kernels"
"""In specifications, that the pipeline is optimised."""

MODE = "FASTDIFF_KERNELS"

MOST_WAYS = 1000
"""One specification makes at most so many ways."""

LONGEST_KEY = 100
"""Characters of a key, at most: it names a folder."""


@dataclass(frozen=True)
class Way:
    """One way of sampling the same images.

    Ways are equal when they sample alike, whatever they are called.

    Args:
        num_inference_steps: of the pipeline's call.
        methods: of fastdiff's; none of these and no peer is the plain pipeline.
        peer: another package's acceleration, in place of methods.
        kernels: the value of ``FASTDIFF_KERNELS`` with which the pipeline is optimised; None where it is not.
        model: which of a sweep's pipelines samples, such as a fine-tuned copy.
        label: its name for a person, where the group stands beside it.
        group: what kind of way it is; the ways of a group differ in strength, and are a line in a plot.

    Raises:
        ConfigError: for fewer steps than one, or methods together with a peer.
    """

    num_inference_steps: int
    methods: tuple[Method, ...] = ()
    peer: Peer | None = None
    kernels: str | None = None
    model: str = MAIN
    label: str = field(default="", compare=False)
    group: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        steps = self.num_inference_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ConfigError(f"Sampling takes at least one step, a whole number; got {steps!r}.")
        if self.methods and self.peer is not None:
            raise ConfigError(f"{self.peer} is another package; sample with it or with fastdiff's methods, not both.")

    @property
    def is_plain(self) -> bool:
        """Whether this is the pipeline as it is."""
        return not self.methods and self.peer is None and self.kernels is None

    @property
    def spec(self) -> str:
        """What it does as text, the same for equal ways."""
        parts = [f"steps:{self.num_inference_steps}", *map(_format, self.methods)]
        if self.peer is not None:
            parts.append(str(self.peer))
        if self.kernels is not None:
            parts.append(f"{KERNELS}:{self.kernels}")
        return "+".join(parts)

    @property
    def key(self) -> str:
        """A name for files: different for different ways, the same in every process and version."""
        text = self.spec if self.model == MAIN else f"{self.model}+{self.spec}"
        key = re.sub(r"[^a-z0-9.,=+-]+", "-", text.lower())
        # Replacing may make different texts the same; only a colon in place of a dash is harmless.
        if len(key) <= LONGEST_KEY and key == text.replace(":", "-"):
            return key
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{key[: LONGEST_KEY - 9].rstrip('.')}-{digest}"

    def baseline(self, num_inference_steps: int) -> Way:
        """Full sampling with the same weights, which speed and paired metrics are relative to."""
        return plain(num_inference_steps, model=self.model, is_baseline=True)

    @contextmanager
    def applied(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """Within the block the pipeline samples this way; after it, plainly.

        Raises:
            FastDiffError: if it cannot, with the reason.
        """
        fastdiff.disable(pipe)
        if self.methods:
            fastdiff.enable(pipe, self.methods)
        peer = self.peer.applied(pipe, self.num_inference_steps) if self.peer is not None else nullcontext()
        kernels = _optimized(pipe, self.kernels) if self.kernels is not None else nullcontext()
        try:
            with kernels, peer:
                yield pipe
        finally:
            fastdiff.disable(pipe)


@contextmanager
def _optimized(pipe: DiffusionPipeline, mode: str) -> Iterator[None]:
    """Within the block a pipeline runs the operations of `fastdiff.ops`, as this mode decides between them."""
    before = os.environ.get(MODE)
    fastdiff.optimize(pipe)
    os.environ[MODE] = mode
    try:
        yield
    finally:
        fastdiff.restore(pipe)
        if before is None:
            del os.environ[MODE]
        else:
            os.environ[MODE] = before


def plain(num_inference_steps: int, *, model: str = MAIN, is_baseline: bool = False) -> Way:
    """The pipeline as it is, with some number of steps."""
    label = f"{num_inference_steps} step{'' if num_inference_steps == 1 else 's'}"
    return Way(num_inference_steps, model=model, label=label, group=BASELINE if is_baseline else FEWER_STEPS)


def fewer_steps(num_inference_steps: int, *, model: str = MAIN) -> tuple[Way, ...]:
    """Plain sampling with about a half, a third and a quarter of the steps, as far as these differ."""
    counts = sorted({round(num_inference_steps / divisor) for divisor in (2, 3, 4)} - {0, num_inference_steps})
    return tuple(plain(count, model=model) for count in reversed(counts))


def parse_ways(
    specs: Iterable[str], num_inference_steps: int, *, model: str = MAIN, units: int | None = None
) -> tuple[Way, ...]:
    """The ways that specifications ask for, in their order, each once.

    Args:
        specs: as at the top of this page.
        num_inference_steps: where a specification does not say.
        model: the pipeline that samples.
        units: number of the denoiser's units, which ``exit-schedule:d-min=...`` counts from.

    Raises:
        ConfigError: for what cannot be read, naming the specification and what there is.
    """
    ways = (_parse(text, num_inference_steps, model, units) for spec in specs for text in expand(spec))
    return merge(ways)


def merge(ways: Iterable[Way]) -> tuple[Way, ...]:
    """Ways in their order, each once; of equal ones the first keeps its label."""
    first: dict[str, Way] = {}
    for way in ways:
        first.setdefault(way.key, way)
    return tuple(first.values())


# -- one specification for several ways --------------------------------------------------------------------------------

_NUMBER = r"-?\d+(?:\.\d+)?"
_SEVERAL = re.compile(
    r'"(?:[^"\\]|\\.)*"'  # text in quotes is left as it is
    r"|\{(?P<list>[^{}]*)\}"
    rf"|(?<=[=:])(?P<first>{_NUMBER})\.\.(?P<last>{_NUMBER})(?:\.\.(?P<step>{_NUMBER}))?(?=[,+]|$)"
)


def expand(spec: str) -> list[str]:
    """The specifications that one with ranges and lists stands for; the last one varies fastest.

    Raises:
        ConfigError: for an empty list or range, for steps that are missing or lead nowhere, or for far too many ways.
    """
    fixed, choices, position = [], [], 0
    for match in _SEVERAL.finditer(spec):
        if match["list"] is None and match["first"] is None:
            continue
        fixed.append(spec[position : match.start()])
        position = match.end()
        choices.append(_range(match, spec) if match["list"] is None else _list(match["list"], spec))
    ways = 1
    for choice in choices:
        ways *= len(choice)
    if ways > MOST_WAYS:
        raise ConfigError(f"{spec!r} makes {ways} ways; one specification makes {MOST_WAYS} at most.")
    rest = spec[position:]
    return ["".join(map("".join, zip(fixed, chosen, strict=True))) + rest for chosen in product(*choices)]


def _list(text: str, spec: str) -> list[str]:
    entries = [entry.strip() for entry in re.split(r",(?![^\[]*\])", text)]
    if not all(entries):
        raise ConfigError(f"A list holds entries between commas, such as {{2,3,5}}; got {{{text}}} in {spec!r}.")
    return entries


def _range(match: re.Match[str], spec: str) -> list[str]:
    first, last = Decimal(match["first"]), Decimal(match["last"])
    if match["step"] is None and (first % 1 or last % 1):
        raise ConfigError(f"A range between fractions needs a step, such as 0.5..0.9..0.1; got {match[0]} in {spec!r}.")
    step = Decimal(match["step"] or 1)
    if step <= 0 or last < first:
        raise ConfigError(f"A range runs upwards, FIRST..LAST or FIRST..LAST..STEP; got {match[0]} in {spec!r}.")
    count = int((last - first) / step) + 1
    # Counted before it is made: a slip of the finger must not fill the memory.
    return [str(first + index * step) for index in range(min(count, MOST_WAYS + 1))]


# -- reading and writing -----------------------------------------------------------------------------------------------


def _parse(spec: str, steps: int, model: str, units: int | None) -> Way:
    methods: list[Method] = []
    peers: list[Peer] = []
    labels: list[str] = []
    groups: list[str] = []
    given_steps: list[int] = []
    kernels: list[str] = []
    for part in re.split(r"\+(?=\s*[A-Za-z][\w-]*\s*(?:[:+]|$))", spec):
        name, _, rest = (text.strip() for text in part.partition(":"))
        name = kebab(name)
        if name == "steps":
            given_steps.append(_whole(rest, part))
            continue
        if name == KERNELS:
            kernels.append(_mode(rest, part))
            continue
        if name == "preset":
            methods += preset_methods(rest)
        elif name in (PLAN, SAVED) or name in method_classes():
            methods.append(_method(part, name, rest, units))
        else:
            peers.append(_peer(part, name))
        groups.append(name)
        labels.append(" ".join(filter(None, (name, _file_label(rest) if name in (PLAN, SAVED) else rest))))
    if any(len(given) > 1 for given in (given_steps, peers, kernels)):
        raise ConfigError(f"One number of steps, one other package, and kernels once at most; got {spec!r}.")
    steps = given_steps[0] if given_steps else steps
    if not groups and not kernels:
        return plain(steps, model=model)
    if given_steps:
        labels.append(f"{steps} steps")
    if kernels:
        labels.append(KERNELS if kernels[0] == "auto" else f"{KERNELS} {kernels[0]}")
        groups.append(KERNELS)
    peer, mode = next(iter(peers), None), next(iter(kernels), None)
    return Way(steps, tuple(methods), peer, mode, model, label=" + ".join(labels), group=" + ".join(groups))


def _file_label(path: str) -> str:
    """The folder and the name of a file, enough to tell those of several folders apart."""
    return "/".join(Path(path.removesuffix(".json")).parts[-2:])


def _whole(text: str, spec: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"steps:NUMBER takes a whole number from 1; got {spec!r}.")
    return int(text)


def _mode(text: str, spec: str) -> str:
    if (mode := text or MODES[0]) not in MODES:
        raise ConfigError(f"kernels:MODE takes one of {', '.join(MODES)}; got {spec!r}.")
    return mode


def _peer(spec: str, name: str) -> Peer:
    from fastdiff.eval.peers import names, parse_peer

    if name not in names():
        raise ConfigError(
            f"There is no way of sampling {name!r}; there are steps:NUMBER, preset:NAME, {KERNELS}, "
            f"{', '.join(method_classes())}, {PLAN}:FILE, {SAVED}:FILE, and of other packages {', '.join(names())}."
        )
    return parse_peer(spec)


_SHORTHANDS: dict[tuple[str, str], Callable[..., Method]] = {
    ("exit-schedule", "d-min"): ExitSchedule.linear,
    ("exit-schedule", "d-low"): ExitSchedule.step,
    ("feature-inheritance", "branch"): FeatureInheritance.deepcache,
}
"""Fields that are no fields of the method but arguments of another way of making it."""


def _method(spec: str, name: str, rest: str, units: int | None) -> Method:
    for (owner, mark), make in _SHORTHANDS.items():
        if owner == name and re.search(rf"(?:^|,)\s*{mark.replace('-', '[-_]')}\s*=", rest):
            return _made(spec, make, rest, units)
    return parse_method(spec)


def _made(spec: str, make: Callable[..., Method], rest: str, units: int | None) -> Method:
    """A method from the arguments of a function that makes it."""
    parameters = inspect.signature(make).parameters
    items = (item.partition("=") for item in rest.split(","))
    given = {key.strip().replace("-", "_"): value for key, _, value in items}
    if "full" in parameters and "full" not in given:
        if units is None:
            raise ConfigError(f"{spec!r} needs full=NUMBER: of how many units the denoiser has at full depth.")
        given["full"] = str(units)
    try:
        return make(**{key: json.loads(value) for key, value in given.items()})
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        names = ", ".join(map(kebab, parameters))
        raise ConfigError(f"{spec!r} cannot be read: {error}. It takes numbers for {names}.") from error


def _format(method: Method) -> str:
    if not isinstance(method, SavedPlan):
        return format_method(method)
    content = json.dumps(method.to_dict(), sort_keys=True)
    return f"plan:{hashlib.sha256(content.encode()).hexdigest()[:16]}"
