"""Tables, plots and the page show the numbers of the results, and escape what they are given."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fastdiff.eval.report import texts, write_report
from fastdiff.eval.report.headline import headline
from fastdiff.eval.report.plots import chosen, draw_trade_off, strip
from fastdiff.eval.report.tables import as_csv, as_markdown, escaped
from fastdiff.eval.results import Results, as_data, name_of
from fastdiff.plan import Action, ComputePlan
from tiny.results import SAMPLES, distance, field, per_image, results, row


def plan() -> ComputePlan:
    table = np.full((6, 4), Action.COMPUTE)
    table[1::2, 1:] = Action.REUSE
    return ComputePlan(table, tuple(f"blocks.{index}" for index in range(4)))


def rows() -> Results:
    points = field()
    points[1] = replace(points[1], plan=plan(), notes=["left <much> out"])
    names = ('shares="<i>(a|b)*"', "a label " * 12)
    odd = [row(f"odd-{i}", speedup=1.2 + i, label=name, group="odd", peer="odd") for i, name in enumerate(names)]
    return results([*points, *odd], floor={"fid": distance(9.0)}, seeds=[0, 100])


def images(made: Results) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(0).integers(0, 256, (len(chosen(SAMPLES)), 16, 16, 3), dtype=np.uint8)
    return {point.key: drawn for point in made.measured}


@pytest.fixture(scope="module")
def made() -> Results:
    return rows()


@pytest.fixture(scope="module")
def out(made: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(made, images(made), folder)
    return folder


def test_all_files_are_there(out: Path) -> None:
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    plots = {f"trade-off-{name}.{kind}" for name in ("fid", "psnr") for kind in ("png", "svg")}
    tables = {"results.json", "results.csv", "results.md", "summary.md", "report.html"}
    assert found == plots | tables | {"samples.png", "plans/better.json", "plans/better.png"}
    assert ComputePlan.load(out / "plans" / "better.json").table.tolist() == plan().table.tolist()


def test_pictures_are_drawn(out: Path) -> None:
    for path in out.rglob("*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 5, path
    for path in out.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    svg = (out / "trade-off-fid.svg").read_text()
    assert set(re.findall(r'(?:href|src)="(.)', svg)) == {"#"}  # nothing outside of the file


# -- tables ------------------------------------------------------------------------------------------------------------


def test_every_row_is_in_every_table_with_the_number_of_the_results(out: Path, made: Results) -> None:
    data = json.loads((out / "results.json").read_text())
    lines = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    markdown = (out / "results.md").read_text()
    page = Page.of(out)
    assert len(data["points"]) == len(lines) == len(made.points) == 9
    assert markdown.count("\n| ") == len(made.measured)
    for point, line in zip(data["points"], lines, strict=True):
        assert point["key"] == line["key"]
        if point["error"]:
            assert line["error"] in markdown
            assert line["error"] in page.text
            continue
        fid, speedup = point["quality"]["fid"]["value"], point["timings"]["8"]["speedup"]["median"]
        assert float(line["fid"]) == fid
        assert float(line["speedup_at_8"]) == speedup
        (shown,) = (text for text in markdown.splitlines() if text.startswith(f"| {escaped(name_of(point))} |"))
        assert f"| {speedup:.2f}× (" in shown
        assert f"| {fid:.2f} ± " in shown
        assert f"{speedup:.2f}×" in page.text
        assert line["verdict"] == (point["verdict"] or "")


def test_a_summary_has_every_row_and_what_decides(made: Results) -> None:
    whole, brief = as_markdown(made), as_markdown(made, brief=True)
    rows = [[line.split(" | ") for line in text.splitlines() if line.startswith("| ")] for text in (whole, brief)]
    assert [row[0] for row in rows[1]] == [row[0] for row in rows[0]]
    assert [row[-1] for row in rows[1]] == [row[-1] for row in rows[0]]
    told = " | ".join(rows[1][0])
    assert "FID" in told
    assert "PSNR" in told
    assert not any(word in told for word in ("SSIM", "KID", "against it"))
    assert "Against it" not in brief
    assert {len(row) for row in rows[1]} == {len(rows[1][0])}
    assert len(brief) < len(whole)


def test_markdown_rows_have_as_many_cells_as_its_head(made: Results) -> None:
    table = [line for line in as_markdown(made).splitlines() if line.startswith("|")]
    counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
    assert len(counts) == 1
    assert any(r"\<i>(a\|b)\*" in line for line in table)


def test_what_could_not_be_sampled_is_listed_with_the_reason(made: Results) -> None:
    assert "Could not be sampled:\n\n- cache: unable: it <refuses>" in as_markdown(made)
    assert "it <refuses>" in as_csv(made)


def test_notes_say_how_the_numbers_came_about(made: Results) -> None:
    said = as_markdown(made)
    assert "40 samples of each row from seeds 0 to 39, 100 to 139 each" in said
    assert "median of 7 pairs" in said
    assert "net@1 to 100 images of set" in said
    assert "perfect samples, score 9.00 ± 0.98" in said
    fid = {**distance(10.0), "absent": {"kid": "statistics only"}}
    assert "Not measured: kid: statistics only" in as_markdown(results([row("a", quality={"fid": fid})]))


@pytest.mark.parametrize(
    ("name", "told", "shown"),
    [
        ("fid", distance(10.0, error=0.5), ("10.00", "± 0.98")),
        ("fid", distance(1234.5, error=80), ("1234", "± 158")),
        ("fid", {"value": 12.345}, ("12.3", "")),
        ("kid", {"value": 0.012345, "spread": 0.0012}, ("0.0123", "sd 0.0012")),
        ("kid", {"value": 75912.3, "spread": 12400.0}, ("75912", "sd 12400")),
        ("kid", {"value": 0.5, "spread": 0.0}, ("0.50", "sd 0.00")),
        ("read", {"value": 0.975, "low": 0.87, "high": 0.996}, ("97.5", "87–100")),
        ("precision", {"value": 0.6, "low": 0.5, "high": 0.7}, ("60.0", "50–70")),
        ("psnr", per_image(100.0, spread=0), ("equal", "")),
        ("psnr", per_image(31.25), ("31.2", "± 0.3")),
        ("inception_score", {"value": 3.14159, "spread": 0.2}, ("3.14", "sd 0.20")),
        ("fid", None, ("–", "")),
    ],
)
def test_numbers_are_shown_with_the_digits_that_count(
    name: str, told: dict[str, Any] | None, shown: tuple[str, str]
) -> None:
    assert texts.value(name, told) == shown


def test_differences_have_a_sign_unless_they_are_none() -> None:
    told = distance(10.0, error=0.5)
    assert texts.difference("fid", (-1.0, 0.1), told) == "−1.00 ± 0.20"
    assert texts.difference("fid", (1.0, None), told) == "+1.00"
    assert texts.difference("fid", (-0.001, 0.0), told) == "0.00 ± 0.00"


def test_long_names_keep_both_ends() -> None:
    name = "package first=1,second=" + "x" * 50 + ",last=9"
    assert texts.shortened(name, 30).startswith("package first=1")
    assert texts.shortened(name, 30).endswith("last=9")
    assert len(texts.shortened(name, 30)) == 30
    assert texts.shortened("short", 30) == "short"


# -- plots -------------------------------------------------------------------------------------------------------------


def test_a_plot_fades_what_is_dominated_and_names_the_rest() -> None:
    made = results(field())
    figure = draw_trade_off(made, "fid")
    (axes,) = figure.axes
    points = {round(float(line.get_xdata()[0]), 2): line for line in axes.lines if len(line.get_xdata()) == 1}
    assert {place: line.get_alpha() for place, line in points.items()} == {
        **dict.fromkeys((1.0, 2.0, 1.9, 2.05), 0.3),
        **dict.fromkeys((2.1, 4.8), 1.0),
    }
    assert {text.get_text() for text in axes.texts} == {"cache", "10 steps"}
    styles = {line.get_label(): line.get_linestyle() for line in axes.lines if not line.get_label().startswith("_")}
    assert styles == {"Full sampling": "-", "Skipping": "-", "cache": ":", "Fewer steps": "--"}


def test_a_line_goes_through_the_points_that_none_of_their_group_beats() -> None:
    places = {"best": (1.5, 9.0), "beaten": (1.6, 14.0), "fast": (3.0, 12.0)}
    points = [row(name, speedup=x, fid=y, group="skipping") for name, (x, y) in places.items()]
    (axes,) = draw_trade_off(results([*field(), *points]), "fid").axes
    lines = [line.get_xydata().tolist() for line in axes.lines if line.get_linestyle() == "-"]
    assert [[1.5, 9.0], [2.0, 10.1], [3.0, 12.0]] in lines


@pytest.mark.parametrize(("worst", "scale"), [(60.0, "linear"), (900.0, "log")])
def test_a_plot_gives_room_to_what_is_good_where_something_is_very_bad(worst: float, scale: str) -> None:
    rows = [row("full", group="full", speedup=1.0, fid=9.0), row("a", speedup=2.0, fid=10.0)]
    (axes,) = draw_trade_off(results([*rows, row("b", speedup=3.0, fid=worst)]), "fid").axes
    assert axes.get_yscale() == scale


def test_labels_of_a_plot_do_not_overlap() -> None:
    crowd = [row(f"r{i}", speedup=1.5 + i / 100, fid=10 + i / 40, label=f"a rather long label {i}") for i in range(12)]
    figure = draw_trade_off(results([row("full", group="full", speedup=1.0, fid=9.0), *crowd]), "fid")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) > 4
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_a_floor_far_away_does_not_press_the_points_together() -> None:
    (near,) = draw_trade_off(results(field(), floor={"fid": distance(8.0)}), "fid").axes
    (far,) = draw_trade_off(results(field(), floor={"fid": distance(500.0)}), "fid").axes
    assert "perfect samples" in {text.get_text() for text in near.texts}
    assert "perfect samples" not in {text.get_text() for text in far.texts}
    assert far.get_ylim()[1] < 50


def test_shown_images_are_spread_evenly() -> None:
    assert chosen(500)[:2] == [0, 33]
    assert len(chosen(500)) == 16
    assert chosen(500)[-1] == 499
    assert chosen(3) == [0, 1, 2]
    assert strip(np.zeros((3, 200, 100, 3), np.uint8)).size == (3 * 48 + 2 * 2, 96)


# -- the page ----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Text and attributes of a page whose tags are closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.said: list[str] = []

    @classmethod
    def of(cls, folder: Path) -> Page:
        page = cls()
        page.feed((folder / "report.html").read_text(encoding="utf-8"))
        page.close()
        return page

    @property
    def text(self) -> str:
        return " ".join(self.said)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def test_the_page_is_well_formed_and_needs_nothing_else(out: Path) -> None:
    page = Page.of(out)
    assert page.open == []
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    text = (out / "report.html").read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert not {"script", "link", "iframe"} & set(page.seen)


def test_the_page_escapes_what_it_is_given(out: Path) -> None:
    page = Page.of(out)
    assert not {"i", "b", "refuses", "much", "model"} & set(page.seen)
    for given in ("it <refuses>", "left <much> out", 'shares="<i>(a|b)*"', "a/<model>", "--method '<b>'"):
        assert given in page.text


def test_the_page_shows_every_group_verdict_and_plan(out: Path, made: Results) -> None:
    page = Page.of(out)
    for said in ("Full sampling", "Skipping", "cache", "Fewer steps", "better", "worse", "mixed", "perfect samples"):
        assert said in page.text
    pictures = len(made.measured) + 2 + 1  # a strip for each row, two plots, a plan
    assert page.seen.count("img") == pictures


def test_the_page_of_what_was_not_timed() -> None:
    from fastdiff.eval.report.page import render

    points = [row("full", group="full", speedup=None), row("a", speedup=None, group="skipping")]
    untimed = replace(results(points), batch=None)
    assert "Speedup" not in render(untimed, images(untimed), {})
    assert headline(untimed) == "2 ways of sampling, none of them timed against fewer steps."
    assert as_data(untimed)["points"][1]["verdict"] is None


# -- the headline ------------------------------------------------------------------------------------------------------


def test_the_headline_counts_verdicts_and_names_who_is_not_beaten() -> None:
    said = headline(results(field()))
    assert (
        "Of 2 settings of fastdiff's, against plain sampling that takes the same time, 1 is better and 1 is worse."
        in said
    )
    assert "Of 1 setting of other packages" in said
    assert "1 is better in one way and worse in another" in said
    assert "By FID and speed, none beats cache (2.10×) and 10 steps (4.80×)." in said


def test_the_headline_begins_with_what_one_line_gains() -> None:
    preset = row("preset", speedup=2.0, label="preset balanced", group="preset", macs_share=0.25)
    read = {"read": {"value": 0.75, "low": 0.5, "high": 0.9}}
    full, *rest = field()
    told = (
        "With nothing but the default preset, sampling took 50% of the time (2.00×) at 25% of the multiply-accumulates"
    )
    assert headline(results([full, preset, *rest])).startswith(f"{told}. Of 2 settings")
    full, preset = (replace(point, quality={**(point.quality or {}), **read}) for point in (full, preset))
    said = headline(results([full, preset, *rest]))
    assert said.startswith(f"{told}; 75.0% of the samples were read as asked, against 75.0% of those sampled in full.")
