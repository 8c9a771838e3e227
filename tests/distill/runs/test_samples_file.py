import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdaif_fast.distill.runs.samples_file import SampleFacts, read_samples, write_contents, write_samples

N = 6
PHI = torch.tensor([0.5, -0.2, 0.0, 0.9, -0.7, 0.5])
W = 2 * torch.sigmoid(-PHI)
LABELS = torch.tensor([0, 1, 2, 0, 1, -1])
FACTS = SampleFacts(
    true_labels=torch.tensor([0, 2, 2, 1, 1, 0]), groups=["b", "a", "a", "b", "a", "b"], class_names=["no", "yes"]
)


def test_what_is_written_is_read(tmp_path):
    write_samples(tmp_path, W, PHI, LABELS, FACTS)
    found = read_samples(tmp_path)
    assert torch.equal(found.weights, W)
    assert torch.equal(found.phi, PHI)
    assert torch.equal(found.targets, LABELS)
    assert found.flipped.tolist() == [False, True, False, True, False, False]  # the last one has no label to be wrong
    assert [found.group_names[place] for place in found.groups] == FACTS.groups
    assert [found.class_name(label) for label in (0, 1, 2, -1)] == ["no", "yes", "2", "none"]
    assert (found.contents, found.top) == ({}, 24)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.safetensors"]


def test_the_least_there_is(tmp_path):
    write_samples(tmp_path, W.double().requires_grad_(), PHI.bfloat16())
    found = read_samples(tmp_path)
    assert (found.targets, found.flipped, found.groups, found.class_names) == (None, None, None, None)
    assert torch.equal(found.weights, W)
    write_samples(tmp_path, W, PHI, torch.rand(N, 3))  # soft labels are not kept
    assert read_samples(tmp_path).targets is None


def test_groups_may_be_numbers(tmp_path):
    numbers = torch.tensor([2, 2, 10, 10, 2, 10])
    for groups in (numbers, numbers.tolist(), numbers.numpy(), list(numbers.numpy())):
        write_samples(tmp_path, W, PHI, facts=SampleFacts(groups=groups))
        assert read_samples(tmp_path).group_names == ["2", "10"]
    write_samples(tmp_path, W, PHI, facts=SampleFacts(groups=["x", 2, "x", 2, 2, 10]))
    assert read_samples(tmp_path).group_names == ["2", "10", "x"]


def test_class_names_by_label(tmp_path):
    write_samples(tmp_path, W, PHI, LABELS, SampleFacts(class_names={0: "no", 2: "maybe"}))
    assert [read_samples(tmp_path).class_name(label) for label in range(4)] == ["no", "1", "maybe", "3"]


def test_given_flips_come_before_those_of_labels(tmp_path):
    flipped = [True] + [False] * (N - 1)
    facts = SampleFacts(flipped=flipped, true_labels=FACTS.true_labels)
    write_samples(tmp_path, W, PHI, LABELS, facts)
    assert read_samples(tmp_path).flipped.tolist() == flipped


def test_who_harms_and_who_helps(tmp_path):
    write_samples(tmp_path, W, PHI)
    found = read_samples(tmp_path)
    assert found.harmful(10) == [3, 0, 5]  # ties in the samples' order
    assert found.helpful(10) == [4, 1]
    assert found.harmful(1) == [3]
    write_samples(tmp_path, torch.tensor([1.0, 0.5, 2.0]), torch.zeros(3))  # weights of one's own, and no phi
    found = read_samples(tmp_path)
    assert (found.harmful(3), found.helpful(3), found.measured) == ([1], [2], False)
    write_samples(tmp_path, torch.ones(3), torch.tensor([torch.nan, 0.1, -0.1]))
    found = read_samples(tmp_path)
    assert (found.harmful(3), found.helpful(3), found.measured) == ([1], [2], True)
    write_samples(tmp_path, torch.ones(3), torch.zeros(3))
    assert read_samples(tmp_path).harmful(3) == []
    write_samples(tmp_path, torch.ones(3000), torch.arange(3000) % 2 * 0.5)
    assert read_samples(tmp_path).harmful(24) == list(range(1, 48, 2))


def test_contents_of_the_most_harmful_and_most_helpful(tmp_path):
    write_samples(tmp_path, W, PHI)
    write_contents(tmp_path, [(f"text {index}", 0) for index in range(N)], top=2)
    found = read_samples(tmp_path)
    assert {index: content.text for index, content in found.contents.items()} == {
        index: f"text {index}" for index in (3, 0, 4, 1)
    }
    assert found.top == 2
    facts = SampleFacts(describe=lambda index: torch.full((4, 4), index, dtype=torch.uint8))
    write_contents(tmp_path, ["not this"] * N, facts, top=1)
    contents = read_samples(tmp_path).contents
    assert list(contents) == [3, 4]
    assert all(content.image and (content.width, content.height) == (4, 4) for content in contents.values())
    write_contents(tmp_path)  # a loader without a data set: nothing to show
    assert read_samples(tmp_path).contents == {}
    write_samples(tmp_path, W, PHI)
    with pytest.raises(ValueError, match="top is 0"):
        write_contents(tmp_path, top=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"flipped": torch.zeros(N)}, TypeError, r"facts.flipped is torch.float32 \(6,\), expected bool \[N\]"),
        ({"flipped": [[True]]}, TypeError, r"facts.flipped is torch.bool \(1, 1\)"),
        (
            {"true_labels": torch.rand(N)},
            TypeError,
            r"facts.true_labels is torch.float32 \(6,\), expected whole numbers",
        ),
        ({"groups": [0.5] * N}, TypeError, "facts.groups has entries that are neither"),
        ({"class_names": "cat"}, TypeError, "facts.class_names is the text 'cat'"),
        (
            {"groups": [1, 2], "flipped": [True]},
            ValueError,
            r"different numbers of samples: facts.flipped 1, facts.gro",
        ),
    ],
)
def test_bad_facts(change, error, message):
    with pytest.raises(error, match=message):
        SampleFacts(**change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((W, PHI[1:]), r"weights are \(6,\) and phi \(5,\)"),
        ((W[None], PHI[None]), r"weights are \(1, 6\)"),
        ((W, PHI, LABELS[1:]), "targets are of 5 samples, expected 6"),
        ((W[1:], PHI[1:], None, FACTS), "facts.groups has 6 entries, expected one for each of the 5 training samples"),
    ],
)
def test_bad_arrays_leave_what_was_there(tmp_path, arguments, message):
    write_samples(tmp_path, W, PHI)
    before = (tmp_path / "samples.safetensors").read_bytes()
    with pytest.raises(ValueError, match=message):
        write_samples(tmp_path, *arguments)
    assert (tmp_path / "samples.safetensors").read_bytes() == before


def test_files_that_are_not_ours(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"which has no samples\.safetensors"):
        read_samples(tmp_path)
    path = tmp_path / "samples.safetensors"
    save_file({"weights": W}, path)
    with pytest.raises(ValueError, match="has the format None, expected 'kdaif_fast samples 1'"):
        read_samples(tmp_path)
    write_samples(tmp_path, W, PHI)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        read_samples(tmp_path)
    write_samples(tmp_path, W, PHI)
    (tmp_path / "samples.json").write_text(json.dumps({"samples": [{"wrong": 1}]}))
    with pytest.raises(ValueError, match=r"samples\.json is not what a run writes: KeyError: 'index'"):
        read_samples(tmp_path)


def test_others_can_read_the_arrays(tmp_path):
    write_samples(tmp_path, W, PHI, LABELS, FACTS)
    arrays = load_file(tmp_path / "samples.safetensors")
    assert {name: array.dtype for name, array in arrays.items()} == {
        "weights": torch.float32, "phi": torch.float32, "targets": torch.int64, "flipped": torch.bool,
        "true_labels": torch.int64, "groups": torch.int64,
    }  # fmt: skip


def test_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r'pip install "kdaif-fast\[train\]"'):
        write_samples(tmp_path, W, PHI)
