import base64
import io
import json
import math
import re
import sys
from fnmatch import fnmatch
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from kdaif_fast.cli import main
from kdaif_fast.distill.runs import report as report_room
from kdaif_fast.distill.runs.report import report
from kdaif_fast.distill.runs.run_log import RunLog
from kdaif_fast.distill.runs.samples_file import SampleFacts, write_contents, write_samples
from kdaif_fast.distill.runs.weight_figures import weight_figures

from .small_run import train

VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Elements and texts of a page; raises where elements are not closed in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} ends inside of another element"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).replace("\u202f", " ").split())

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def facts(self):
        parts = re.findall(r"<dt>(.*?)</dt><dd class=\"value\">(.*?)</dd>", self.source)
        return {unescape(name): value.replace("\u202f", " ") for name, value in parts}


def record(epoch, **more):
    return {"kind": "epoch", "epoch": epoch, "step": 10 * epoch, "student_accuracy": 0.5 + epoch / 100, **more}


def run_of(folder, *records):
    log = RunLog(folder)
    for one in records:
        log.write(one)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    torch.manual_seed(0)
    run = train(folder)
    run.folder, run.records = folder, RunLog(folder).records()
    run.page = Page(report(folder))
    return run


def test_key_facts_are_those_of_the_last_epoch(trained):
    last = trained.records[-1]
    assert trained.page.facts() == {
        "student, test accuracy": f"{100 * last['test_student_accuracy']:.1f} %",
        "teacher, test accuracy": f"{100 * last['test_teacher_accuracy']:.1f} %",
        "mean weight": f"{trained.weights.mean():.3f}",
        "samples with w < 1": f"{100 * (trained.weights < 1).double().mean():.1f} %",
        "AUC of finding flipped labels": f"{last['flip_auc']:.3f}",
        "time spent on influence": f"{100 * 0.2 / 1.79:.1f} %",  # what the three epochs have recorded
    }
    assert last["flip_auc"] > 0.8  # the training is a real one
    assert f"3 epochs, {trained.steps} steps, 1200 training samples" in trained.page.text


def test_the_page_is_one_file_that_asks_for_nothing(trained):
    for tag, attributes in trained.page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in trained.page.elements}
    assert not re.search(r"@import|url\((?!#)", trained.page.source)
    addresses = set(re.findall(r"https?://[^\"' ]+", trained.page.source))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not requests
    assert trained.page.elements[0][0] == "html"
    assert trained.page.source.startswith("<!DOCTYPE html>")


def test_references_inside_of_the_page_have_one_target(trained):
    ids = [attributes["id"] for _, attributes in trained.page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [v for _, attributes in trained.page.elements for k, v in attributes.items() if k.endswith("href")]
    links += re.findall(r"url\((#[^)]*)\)", trained.page.source)
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_every_figure_says_what_to_see(trained):
    drawings = trained.page.of("svg")
    assert len(drawings) == 6
    assert all(drawing["role"] == "img" and len(drawing["aria-label"]) > 10 for drawing in drawings)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", trained.page.source, re.DOTALL)
    assert len(captions) == 6
    assert all(len(caption) > 60 for caption in captions)
    assert all(image["alt"].startswith("sample ") for image in trained.page.of("img"))


def test_the_most_harmful_samples_come_first_with_what_is_known(trained):
    harmful = trained.phi.sort(descending=True, stable=True).indices[:24].tolist()
    helpful = trained.phi.sort(stable=True).indices[:24].tolist()
    told = [int(index) for index in re.findall(r"sample (\d+)</div>", trained.page.source)]
    assert told == harmful + helpful
    first = re.search(r"<li>.*?</li>", trained.page.source, re.DOTALL).group()
    index = harmful[0]
    given, true = int(trained.data.train_y[index]), int(trained.data.true_y[index])
    assert f"digit {given}<" in first
    assert (f"true: digit {true}<" in first) == (given != true) == ("⚑ flipped" in first)
    assert f"w {trained.weights[index]:.3f}<" in first
    images = trained.page.of("img")
    assert len(images) == 48
    image = Image.open(io.BytesIO(base64.b64decode(images[0]["src"].split(",", 1)[1])))
    assert (
        torch.tensor(list(image.tobytes()))
        .view(8, 8)
        .equal((trained.data.train_x[index].view(8, 8) * 255).round().long())
    )


def test_classes_and_groups_are_sorted_by_mean_weight(trained):
    tables = re.findall(r"<table class=\"full\">.*?</table>", trained.page.source, re.DOTALL)
    expected = [
        {f"digit {c}": trained.data.train_y == c for c in range(10)},
        {side: torch.tensor([g == side for g in trained.facts.groups]) for side in ("left", "right")},
    ]
    assert len(tables) == 2
    for table, members in zip(tables, expected, strict=True):
        rows = re.findall(r"<td class=\"name\">(.*?)</td><td>(\d+)</td><td>(.*?)</td>", table)
        means = {name: trained.weights[mask].double().mean() for name, mask in members.items()}
        assert [row[0] for row in rows] == sorted(means, key=means.get)
        assert {name: (int(n), mean) for name, n, mean in rows} == {
            name: (int(mask.sum()), f"{means[name]:.3f}") for name, mask in members.items()
        }


def test_refreshes_are_listed(trained):
    (refresh, _) = (one for one in trained.records if one["kind"] == "refresh")
    assert f"<td>2</td><td>{refresh['step']}</td>" in trained.page.source
    assert "0.020 s" in trained.page.text


def test_the_same_run_gives_the_same_page(trained):
    assert report(trained.folder).read_text(encoding="utf-8") == trained.page.source
    assert {path.name for path in trained.folder.iterdir()} == {
        "log.jsonl", "log.csv", "samples.safetensors", "samples.json", "report.html",
    }  # fmt: skip


NASTY = "<script>alert(1)</script> \"&' {{ 1 }} $x^$ \ud7ff é 漢"


def test_what_users_have_named_is_text(tmp_path):
    folder = run_of(tmp_path / "<b>run & co", record(1, **weight_figures(torch.rand(4))))
    facts = SampleFacts(groups=[NASTY, "a", "a", "b"], class_names=[NASTY, "x"], true_labels=[1, 0, 0, 0])
    write_samples(folder, torch.rand(4), torch.tensor([1.0, -1, 2, -2]), torch.tensor([0, 0, 1, 1]), facts)
    write_contents(folder, [{"text": NASTY}, NASTY, (NASTY, 0), None], facts)
    (folder / "run.json").write_text(json.dumps({NASTY: NASTY, "nested": {"deep": [1, None]}, "empty": {}}))
    page = Page(report(folder))
    assert "script" not in {tag for tag, _ in page.elements}
    assert "b" not in {tag for tag, attributes in page.elements if not attributes}
    # Class, true class, group, three texts, the name and the value of a setting, and where a label is an alt text.
    assert "".join(page.texts).count(NASTY) >= 8
    assert "<b>run & co" in page.text
    assert "nested.deep [1, null] empty {}" in page.text
    assert page.source.count("alert(1)") == page.source.count("&lt;script&gt;alert(1)")


def test_nothing_but_accuracies(tmp_path):
    page = Page(report(run_of(tmp_path, record(1), record(2, student_accuracy=math.nan, teacher_accuracy=None))))
    assert page.facts() == {"student, validation accuracy": "NaN"}
    assert "best validation 51.0 %" in page.text
    assert len(page.of("svg")) == 1
    for sentence in ("No weights of single samples", "Neither labels nor groups", "Influence was not measured"):
        assert sentence in page.text
    assert "Settings" not in page.text


def test_no_test_data_no_flips_no_groups_and_three_samples(tmp_path):
    weights, phi = torch.tensor([0.5, 1.0, 1.5]), torch.tensor([0.1, 0.0, -0.1])
    seconds = {"data": 0.0, "student": 0.0, "influence": 0.0}
    folder = run_of(tmp_path, record(1, **weight_figures(weights), seconds=seconds))
    write_samples(folder, weights, phi, torch.tensor([0, 0, 1]))
    page = Page(report(folder))
    assert set(page.facts()) == {"student, validation accuracy", "mean weight", "samples with w < 1"}
    assert "flipped" not in page.text
    assert "not kept: contents are written at the end of a run" in page.text
    assert re.findall(r"sample (\d)</div>", page.source) == ["0", "2"]
    assert "By class" in page.text
    assert "By group" not in page.text


def test_all_weights_1(tmp_path):
    flipped = torch.tensor([True, False, False])
    folder = run_of(tmp_path, record(1, **weight_figures(torch.ones(3), flipped), share=None), record(2))
    write_samples(folder, torch.ones(3), torch.zeros(3), torch.tensor([0, 1, 2]), SampleFacts(flipped=flipped))
    page = Page(report(folder))
    assert "No sample stands out" in page.text
    folder = run_of(tmp_path / "other", record(1, **weight_figures(torch.ones(3), flipped)))
    assert Page(report(folder)).facts()["AUC of finding flipped labels"] == "0.500"


def test_numbers_that_are_not_finite(tmp_path):
    weights = torch.tensor([math.nan, 1.0, math.inf, 0.5])
    phi = torch.tensor([math.nan, -math.inf, math.inf, 0.1])
    odd = {"residual": math.nan, "iterations": math.inf, "damping": None, "seconds": -1.0, "phi_low": -math.inf}
    everything = {
        "student_loss": math.inf,
        "teacher_loss": 1e308,
        "seconds": {"student": math.nan, "influence": math.inf},
    }
    folder = run_of(
        tmp_path,
        {"kind": "refresh", "epoch": 1, "step": 0, **odd},
        record(1, **weight_figures(weights), **everything),
    )
    write_samples(folder, weights, phi, torch.tensor([0, -1, 0, 5]))
    page = Page(report(folder))
    assert "2 samples whose weight is not finite are left out" in page.text
    assert "φ +∞" in page.text
    assert "nan" not in page.text


def test_a_run_that_was_killed_and_went_on(tmp_path):
    folder = run_of(tmp_path, {"kind": "refresh", "epoch": 1, "step": 0, "residual": 0.25})
    assert "No epoch was finished" in Page(report(folder)).text
    log = RunLog(folder)
    log.write(record(1))
    log.write(record(2))
    path = folder / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert "1 epoch, 10 steps" in Page(report(folder)).text
    log = RunLog(folder)
    log.rewind(10)
    log.write(record(2))
    assert "2 epochs, 20 steps" in Page(report(folder)).text


def test_many_classes_and_refreshes_are_folded_away(tmp_path):
    refreshes = [{"kind": "refresh", "epoch": 1, "step": at, "residual": 0.1, "iterations": 3} for at in range(1500)]
    folder = run_of(tmp_path, *refreshes, record(1))
    write_samples(folder, torch.rand(300), torch.zeros(300), torch.arange(300) % 100)
    page = Page(report(folder))
    assert [text for text in page.texts if text.startswith(("The other", "The 1480"))] == [
        "The other 60",
        "The 1480 before",
    ]
    assert "The first 480 are in log.jsonl only" in page.text
    assert len(page.of("tr")) == 1020 + 100 + 4  # and the heads of four tables
    assert len(page.source) < 600_000


def test_long_runs_make_small_pages(tmp_path):
    figures = weight_figures(torch.rand(100), torch.arange(100) < 20)
    more = {"student_loss": 1.0, "teacher_loss": 1.0, "teacher_accuracy": 0.5, **figures}
    seconds = {"data": 1.0, "teacher": 1.0, "student": 1.0, "influence": 1.0, "evaluation": 1.0}
    path = report(run_of(tmp_path, *(record(at, **more, seconds=seconds) for at in range(1, 301))))
    assert len(Page(path).source) < 400_000


def test_settings_that_cannot_be_read_are_said_so(tmp_path):
    folder = run_of(tmp_path, record(1))
    (folder / "run.json").write_text('{"mechanism": "M')
    assert "run.json cannot be read" in Page(report(folder)).text
    (folder / "run.json").write_text(json.dumps({"mechanism": "M3", "influence": {"damping": 0.01}, "long": "x" * 999}))
    text = Page(report(folder)).text
    assert "mechanism M3 influence.damping 0.01" in text
    assert "x" * 299 + "…" in text


def test_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no log\.jsonl"):
        report(tmp_path)
    folder = run_of(tmp_path, record(1))
    before = report(folder).read_bytes()
    (folder / "samples.safetensors").write_bytes(b"something")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        report(folder)
    assert (folder / "report.html").read_bytes() == before


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_what_to_install(tmp_path, monkeypatch, package):
    folder = run_of(tmp_path, record(1))
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'needs jinja2 and matplotlib: pip install "kdaif-fast\[train\]"'):
        report(folder)


def test_the_command(tmp_path):
    folder = run_of(tmp_path / "run", record(1))
    result = CliRunner().invoke(main, ["report", str(folder)])
    assert (result.exit_code, result.output) == (0, f"{folder / 'report.html'}\n")
    assert (folder / "report.html").exists()
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert "it has no log.jsonl" in result.output
    assert CliRunner().invoke(main, ["report", str(tmp_path / "nowhere")]).exit_code == 2


def test_the_pages_parts_are_installed():
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    package = Path(report_room.__file__).parents[3]
    project = package.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("not a source tree")
    patterns = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]["kdaif_fast"]
    parts = [path for path in Path(report_room.__file__).parent.iterdir() if path.suffix not in (".py", "")]
    assert {path.name for path in parts} == {"page.html", "page.css"}
    for path in parts:
        assert any(fnmatch(str(path.relative_to(package)), pattern) for pattern in patterns)
