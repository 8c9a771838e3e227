import itertools
import math
import re
import sys
import xml.etree.ElementTree as ET
from importlib import resources

import matplotlib as mpl
import numpy as np
import pytest
import torch

from kdaif_fast.distill.runs.report import figures
from kdaif_fast.distill.runs.report.svg import COLOURS, inline_svg, style
from kdaif_fast.distill.runs.weight_figures import QUANTILES, weight_figures


def lines(figure):
    (axes,) = figure.axes
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def epochs(*changes):
    return [{"kind": "epoch", "epoch": at, "step": at, **change} for at, change in enumerate(changes, 1)]


def test_accuracies_are_drawn_as_recorded():
    figure = figures.accuracy_figure(
        epochs(
            {"student_accuracy": 0.5, "teacher_accuracy": None},
            {"student_accuracy": math.nan, "teacher_accuracy": 0.25},
            {"student_accuracy": 0.75, "teacher_accuracy": math.inf, "test_student_accuracy": 0.7},
        )
    )
    found = {label: line.get_ydata().tolist() for label, line in lines(figure).items()}
    assert found == {
        "student, validation": [50, pytest.approx(math.nan, nan_ok=True), 75],
        "student, test": [pytest.approx(math.nan, nan_ok=True)] * 2 + [70],
        "teacher, validation": [pytest.approx(math.nan, nan_ok=True), 25, pytest.approx(math.nan, nan_ok=True)],
    }
    assert lines(figure)["student, test"].get_xdata().tolist() == [1, 2, 3]
    assert figures.accuracy_figure(epochs({"student_accuracy": None})) is None
    assert figures.accuracy_figure([]) is None


def test_bands_are_the_weights_quantiles():
    weights = [torch.rand(1000) * 2, torch.rand(1000)]
    figure = figures.band_figure(epochs(*map(weight_figures, weights)))
    expected = [np.quantile(w, 0.5) for w in weights]
    assert lines(figure)["median"].get_ydata() == pytest.approx(expected, abs=0.01)
    bands = [collection.get_paths()[0].vertices[:, 1] for collection in figure.axes[0].collections]
    assert [(band.min(), band.max()) for band in bands] == [
        (
            pytest.approx(np.quantile(weights[1], 0.05), abs=0.01),
            pytest.approx(np.quantile(weights[0], 0.95), abs=0.01),
        ),
        (
            pytest.approx(np.quantile(weights[1], 0.25), abs=0.01),
            pytest.approx(np.quantile(weights[0], 0.75), abs=0.01),
        ),
    ]


def test_bands_of_clean_and_flipped_samples():
    flipped = torch.arange(100) < 20
    weights = torch.where(flipped, 0.25, 1.25)
    figure = figures.band_figure(epochs(weight_figures(torch.ones(100), flipped), weight_figures(weights, flipped)))
    found = {label: line.get_ydata().tolist() for label, line in lines(figure).items()}
    assert found == {"clean, median": [1, 1.25], "flipped, median": [1, 0.25]}


def test_quantiles_from_a_histogram_alone():
    weights = torch.rand(5000, generator=torch.Generator().manual_seed(0)) ** 2 * 2
    record = weight_figures(weights)
    del record["weight_quantiles"]
    width = record["weight_histogram"]["edges"][1]
    assert figures.quantiles(record, "all") == pytest.approx(np.quantile(weights, QUANTILES), abs=width)
    assert figures.quantiles(record, "clean") is None
    gap = {"weight_histogram": {"edges": [0, 1, 2, 3], "all": [5, 0, 5]}}
    assert figures.quantiles(gap, "all") == pytest.approx([0.1, 0.5, 1, 2.5, 2.9])
    assert figures.quantiles({"weight_histogram": {"edges": [0, 1], "all": [0]}}, "all") is None
    assert figures.quantiles({}, "all") is None


def test_start_middle_and_end():
    one, apart = (
        {"weight_histogram": {"edges": [0, 1, 2], "all": [0, 4]}},
        {"weight_histogram": {"edges": [0, 1, 2], "all": [1, 3]}},
    )

    def chosen(*records):
        return [record["epoch"] for record in figures.start_middle_end(epochs(*records))]

    assert chosen(one, one, apart, apart, apart, apart, apart) == [3, 5, 7]
    assert chosen(one, apart) == [2]
    assert chosen(apart, apart) == [1, 2]
    assert chosen(one, one) == [2]
    assert chosen({}) == chosen() == []


def test_histograms_are_shares_of_each_kind():
    flipped = torch.arange(8) < 2
    figure = figures.histogram_figure(epochs(weight_figures(torch.where(flipped, 0.5, 1.5), flipped)))
    filled = [patch.get_data().values for patch in figure.axes[0].patches if patch.get_fill()]
    assert [(values.max(), values.sum()) for values in filled] == [(100, 100), (100, 100)]
    with style():
        figure = figures.histogram_figure(epochs(*[weight_figures(torch.rand(9))] * 3))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["epoch 1", "epoch 2", "epoch 3"]


def test_times_are_stacked():
    seconds = [{"data": 1.0, "student": 2.0}, {"data": 0.5, "student": 1.0, "mine": 4.0}]
    figure = figures.time_figure(epochs(*({"seconds": s} for s in seconds), {}))
    tops = [patch.get_data().values.tolist() for patch in figure.axes[0].patches]
    assert tops == [[1.0, 0.5, 0.0], [3.0, 1.5, 0.0], [3.0, 5.5, 0.0]]
    assert figures.time_figure(epochs({}, {"seconds": {}})) is None


def drawn(name="accuracy", title="A <title>"):
    with style():
        return inline_svg(figures.accuracy_figure(epochs({"student_accuracy": 0.5})), name, title)


def test_svg_is_well_formed_and_of_the_page():
    svg = drawn()
    root = ET.fromstring(svg)
    assert root.get("aria-label") == "A <title>"
    assert root.get("viewBox")
    assert root.get("width") is None
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "accuracy, %" in texts  # as text, which can be searched and read aloud
    assert "student, validation" in texts
    assert "var(--blue)" in svg
    assert not [light for light in COLOURS.values() if light in svg]
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert ids
    assert len(set(ids)) == len(ids)
    assert all(identity.startswith("accuracy-") for identity in ids)
    used = [value for element in root.iter() for key, value in element.items() if key.endswith("href")]
    assert used
    assert {value.removeprefix("#") for value in used} <= set(ids)
    assert "metadata" not in svg


def test_the_users_settings_neither_matter_nor_change(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # no global figures: importing it would raise
    expected = drawn()
    with mpl.rc_context(
        {"svg.fonttype": "path", "axes.grid": False, "font.size": 30, "lines.linewidth": 9, "xtick.labelsize": 40}
    ):
        names = [name for name in mpl.rcParams if name != "backend"]  # which is chosen when it is looked at
        before = {name: mpl.rcParams[name] for name in names}
        assert drawn() == expected
        assert {name: mpl.rcParams[name] for name in names} == before


def page_colours():
    """By name, light and dark."""
    css = resources.files("kdaif_fast.distill.runs.report").joinpath("page.css").read_text()
    parts = css.split("prefers-color-scheme: dark", 1)
    return [dict(re.findall(r"--(\w+): (#\w{6})", part.split("}", 1)[0])) for part in parts]


def test_the_page_has_all_colours():
    light, dark = page_colours()
    assert {name: light[name] for name in COLOURS} == COLOURS
    assert set(dark) == set(light)


def luminance(colour):
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(
    ("names", "least"), [(("ink", "muted", "blue", "orange"), 4.5), (("green", "purple", "gold", "grey"), 3)]
)
def test_texts_and_drawings_stand_out_in_light_and_dark(names, least):
    """WCAG 2.1, success criteria 1.4.3 (text) and 1.4.11 (what is drawn)."""
    for colours in page_colours():
        for name, ground in itertools.product(names, ("page", "card")):
            dark, light = sorted((luminance(colours[name]), luminance(colours[ground])))
            assert (light + 0.05) / (dark + 0.05) >= least, (name, ground)
