import json

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Subset, TensorDataset

from kdaif_fast import DistillationLoss
from kdaif_fast.distill import Distiller, IndexedBatch, LossNotFiniteError, SampleFacts, label_revision

from .cases import CLASSES, FEATURES, SOLVE, adam, loaders, make, network, samples, sgd


def test_it_learns_and_finds_the_flips():
    train, val = loaders(240, 60, 24, flip=0.25)
    _, _, flipped = samples(240, 1, 0.25)
    distiller = make(mechanism="M3", warmup_epochs=1, facts=SampleFacts(flipped=flipped))
    first, *_, last = distiller.fit(train, val, 6, test_loader=val)
    assert last["student_accuracy"] > 0.9
    assert last["student_loss"] < first["student_loss"]
    assert last["flip_auc"] > 0.9
    assert last["flipped_below_1"] > 0.8 > 0.3 > last["clean_below_1"]
    assert last["test_student_accuracy"] == last["student_accuracy"]
    assert sum(last["weight_histogram"]["all"]) == 240
    assert set(last["seconds"]) == {"data", "teacher", "student", "influence", "evaluation"}
    assert all(seconds >= 0 for seconds in last["seconds"].values())
    assert first["mean_weight"] == 1.0  # warming up


def test_nothing_is_measured_while_warming_up():
    distiller = make(mechanism="M3", warmup_epochs=2)
    distiller.fit(*loaders(), 2)
    assert distiller.weighting.measurements == []
    assert (distiller.weighting.weights == 1).all()
    distiller.fit(*loaders(), 4)
    assert [epoch for epoch, _ in distiller.weighting.measurements] == [2, 3]


def test_nothing_is_told_of_flips_before_anything_is_measured():
    distiller = make(mechanism="M1", warmup_epochs=1, facts=SampleFacts(flipped=samples(24, 1, 0.3)[2]))
    first, second = distiller.fit(*loaders(flip=0.3), 2)
    assert "flip_auc" not in first
    assert 0 <= second["flip_auc"] <= 1


def test_settings_are_in_the_runs_folder(tmp_path):
    make(mechanism="M1", rule="drop", run_dir=tmp_path).fit(*loaders(), 1)
    told = json.loads((tmp_path / "run.json").read_text())["Distiller"]
    assert (told["mechanism"], told["rule"], told["refresh"]) == ("M1", "Drop()", "epoch")
    make(mechanism="M2", run_dir=tmp_path).fit(*loaders(), 1, resume=False)
    assert json.loads((tmp_path / "run.json").read_text())["Distiller"]["mechanism"] == "M2"
    (tmp_path / "run.json").write_text("{}")  # another program's
    make(mechanism="M3", run_dir=tmp_path).fit(*loaders(), 1, resume=False)
    assert (tmp_path / "run.json").read_text() == "{}"


def test_measured_every_few_epochs_or_steps():
    distiller = make(mechanism="M1", solve_every=2)
    distiller.fit(*loaders(), 5)
    assert [epoch for epoch, _ in distiller.weighting.measurements] == [0, 2, 4]
    distiller = make(mechanism="M1", refresh=3)
    distiller.fit(*loaders(), 2)  # of four steps each: before the steps 0, 3 and 6
    assert [epoch for epoch, _ in distiller.weighting.measurements] == [0, 0, 1]


def test_given_weights_are_used_and_nothing_is_measured():
    weights = torch.rand(24)
    distiller = make(mechanism="M3", weights=weights, optimizer=sgd)
    records = distiller.fit(*loaders(), 1)
    assert distiller.weighting is None
    assert records[0]["mean_weight"] == pytest.approx(float(weights.mean()))
    same = make(mechanism="M3", weights=torch.ones(24), optimizer=sgd)
    plain = make(mechanism="online", optimizer=sgd)
    for distiller in (same, plain):
        torch.manual_seed(1)
        distiller.fit(*loaders(), 2)
    for a, b in zip(same.student.parameters(), plain.student.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_looking_at_test_data_changes_nothing():
    """Not even the order of the samples that are trained on, which is drawn from the same numbers."""
    plain, looking = make(mechanism="M3"), make(mechanism="M3")
    for distiller, test in ((plain, None), (looking, loaders()[0])):
        torch.manual_seed(1)
        distiller.fit(*loaders(), 3, test)
    for a, b in zip(plain.student.parameters(), looking.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_batch_of_validation_data():
    train, val = loaders()
    records = make(mechanism="M1").fit(train, tuple(next(iter(val))), 1)
    assert 0 <= records[0]["student_accuracy"] <= 1


def test_samplers_of_batch_samplers_hear_of_the_epoch():
    x, y, _ = samples(24)
    sampler = DistributedSampler(TensorDataset(x, y), num_replicas=2, rank=0)
    loader = DataLoader(TensorDataset(x, y), batch_sampler=BatchSampler(sampler, 6, drop_last=False))
    make(mechanism="online").fit(loader, None, 3)
    assert sampler.epoch == 2


def test_accumulated_batches_are_one_step():
    whole, parts = make(mechanism="online", optimizer=sgd), make(mechanism="online", optimizer=sgd, accumulate=2)
    whole.fit_teacher(loaders(shuffle=False, batch=12)[0], 1)
    parts.fit_teacher(loaders(shuffle=False, batch=6)[0], 1)
    for a, b in zip(whole.teacher.parameters(), parts.teacher.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    whole.fit(loaders(shuffle=False, batch=12)[0], loaders()[1], 1)
    parts.fit(loaders(shuffle=False, batch=6)[0], loaders()[1], 1)
    for a, b in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_group_of_fewer_batches_at_the_end_is_a_step_as_large():
    whole, parts = make(mechanism="online", optimizer=sgd), make(mechanism="online", optimizer=sgd, accumulate=3)
    for distiller in (whole, parts):
        distiller.fit(loaders(shuffle=False, batch=24)[0], None, 2)
    for a, b in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_are_clipped():
    distiller = make(mechanism="online", optimizer=sgd, clip_norm=1e-3)
    before = [p.detach().clone() for p in distiller.student.parameters()]
    distiller.fit(*loaders(batch=24), 1)
    moved = sum(
        float(((a - b) ** 2).sum())
        for a, b in zip(before, map(torch.Tensor.detach, distiller.student.parameters()), strict=True)
    )
    assert moved**0.5 == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_bfloat16():
    distiller = make(mechanism="M3", refresh="step", autocast=torch.bfloat16)
    records = distiller.fit(*loaders(), 3)
    assert records[-1]["student_loss"] < records[0]["student_loss"]
    assert next(distiller.student.parameters()).dtype == torch.float32


def test_schedulers_take_a_step_an_epoch():
    def scheduler(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    distiller = make(mechanism="online", student_scheduler=scheduler, teacher_scheduler=scheduler)
    distiller.fit(*loaders(), 2)
    assert distiller.student_optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 4)
    assert distiller.teacher_optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 4)


def test_parts_in_evaluation_mode_stay_there():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))
    student[1].eval()
    distiller = Distiller(
        network(), student, adam, adam, mechanism="M3", refresh="step", warmup_epochs=0, influence=SOLVE
    )
    distiller.fit(*loaders(), 1)
    assert student.training
    assert not student[1].training
    assert student[1].num_batches_tracked == 0


def test_batch_norm_is_for_full_refreshes():
    student = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))
    options = {"mechanism": "M3", "warmup_epochs": 0, "influence": SOLVE}
    with pytest.raises(ValueError, match=r"refresh='epoch'"):
        Distiller(network(), student, adam, adam, refresh="step", **options).fit(*loaders(), 1)
    assert len(Distiller(network(), student, adam, adam, **options).fit(*loaders(), 1)) == 1
    assert student[1].num_batches_tracked == 4


def test_hugging_face_batches_and_outputs():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, CLASSES))

        def forward(self, input_ids, attention_mask=None):
            return {"logits": self.body(input_ids)}

    rows = [
        {"input_ids": torch.randint(0, 11, (3,)), "attention_mask": torch.ones(3), "labels": i % CLASSES}
        for i in range(12)
    ]
    loader = DataLoader(rows[:8], batch_size=4, shuffle=True)
    for refresh in ("step", "epoch"):
        distiller = Distiller(
            *(Encoder(), Encoder(), adam, adam), mechanism="M3", warmup_epochs=0, refresh=refresh, influence=SOLVE
        )
        records = distiller.fit(loader, DataLoader(rows[8:], batch_size=4), 2)
        assert records[-1]["student_accuracy"] is not None
        assert (distiller.weighting.weights != 1).all()


def test_label_revision_with_data_selection():
    """Half of the samples hear the teacher's revised labels, the rest only the given ones."""
    distiller = make(**label_revision(share=0.5))
    distiller.fit(*loaders(), 2)
    weights = distiller.weighting.weights
    assert sorted(weights.unique().tolist()) in ([0.0, 1.0], [0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="refresh is 'step'"):
        make(**{**label_revision(share=0.5), "refresh": "step"}).fit(*loaders(), 1)


def test_negative_labels_are_the_business_of_ones_own_losses():
    x, y, _ = samples(24)
    data = TensorDataset(x, 2 * (y % 2) - 1)

    def hinge(outputs, targets, teacher_logits=None):
        return (1 - targets * outputs[:, 0]).clamp(min=0)

    distiller = make(mechanism="M3", loss=hinge, teacher_loss=hinge, influence={"curvature": "identity"})
    records = distiller.fit(DataLoader(data, batch_size=6), DataLoader(list(data), batch_size=24), 1)
    assert records[0]["student_loss"] > 0


class TestBadInput:
    def test_another_number_of_classes(self):
        teacher, student = network(), nn.Linear(FEATURES, CLASSES + 1)
        distiller = Distiller(teacher, student, adam, adam)
        with pytest.raises(ValueError, match=r"teacher gives outputs \(12, 3\) and student \(12, 4\)"):
            distiller.fit(*loaders(), 1)

    @pytest.mark.parametrize("val", [[], DataLoader(TensorDataset(torch.zeros(0, FEATURES)), batch_size=2)])
    @pytest.mark.parametrize("mechanism", ["M3", "online"])
    def test_an_empty_validation_loader(self, val, mechanism):
        with pytest.raises(ValueError, match="empty"):
            make(mechanism=mechanism).fit(loaders()[0], val, 1)

    @pytest.mark.parametrize("mechanism", ["M1", "online"])
    def test_validation_batches_that_can_be_had_only_once(self, mechanism):
        train, val = loaders()
        batches = (batch for batch in val)
        with pytest.raises(TypeError, match="generator"):
            make(mechanism=mechanism).fit(train, batches, 2)
        assert len(list(batches)) == 1

    def test_no_validation_loader(self):
        with pytest.raises(ValueError, match="val_loader is None"):
            make(mechanism="M3").fit(loaders()[0], None, 1)
        assert make(mechanism="online").fit(loaders()[0], None, 1)[0].get("student_accuracy") is None

    @pytest.mark.parametrize("refresh", ["step", "epoch"])
    @pytest.mark.parametrize("mechanism", ["M3", "vanilla"])
    def test_samples_without_a_label(self, mechanism, refresh):
        x, y, _ = samples(24)
        y[[5, 17]] = -1
        loader = DataLoader(TensorDataset(x, y), batch_size=24)
        distiller = make(mechanism=mechanism, warmup_epochs=1, refresh=refresh)
        with pytest.raises(ValueError, match=r"indices 5, 17 .* label -1.*SemiSupervisedDistiller"):
            distiller.fit(loader, loaders()[1], 2)

    @pytest.mark.parametrize("refresh", ["step", "epoch"])
    @pytest.mark.parametrize("warmup", [0, 1])
    def test_a_loss_that_is_not_finite_names_the_samples(self, refresh, warmup, tmp_path):
        x, y, _ = samples(24, 1)
        distiller = make(mechanism="M3", refresh=refresh, warmup_epochs=warmup, run_dir=tmp_path)
        distiller.fit(*loaders(), 1)
        kept = (tmp_path / "checkpoint.safetensors").read_bytes()
        before = [p.detach().clone() for p in distiller.student.parameters()]
        x[[3, 11]] = float("nan")
        with pytest.raises(LossNotFiniteError, match="3, 11") as caught:
            make(mechanism="M3", refresh=refresh, warmup_epochs=warmup, run_dir=tmp_path).fit(
                DataLoader(TensorDataset(x, y), batch_size=24), loaders()[1], 3
            )
        assert caught.value.indices == [3, 11]
        assert (tmp_path / "checkpoint.safetensors").read_bytes() == kept
        assert all(p.isfinite().all() for p in before)

    def test_unknown_rules(self):
        with pytest.raises(ValueError, match=r"'sigmod'.*sigmoid"):
            make(rule="sigmod")

    @pytest.mark.parametrize("refresh", ["batch", 0, -1, True, 1.5, None])
    def test_schedules_that_are_none(self, refresh):
        with pytest.raises(ValueError, match="refresh is"):
            make(refresh=refresh)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"weights": torch.ones(3), "mechanism": "online"}, "mechanism 'online' uses none"),
            ({"weights": torch.tensor([1.0, float("nan")])}, r"not finite at \[1\]"),
            ({"weights": torch.tensor([1.0, -0.5])}, r"negative at \[1\]"),
            ({"weights": [1.0]}, r"expected a floating-point tensor \[N\]"),
            ({"accumulate": 0}, "accumulate is 0"),
            ({"checkpoint_every": 0}, "checkpoint_every is 0"),
            ({"autocast": torch.float16}, "autocast is torch.float16"),
            ({"tensorboard": True}, "run_dir is None"),
            ({"clip_norm": -1.0}, r"clip_norm is -1\.0"),
            ({"ema": 1.0}, "ema is 1.0"),
            ({"warmup_epochs": -1}, "warmup_epochs is -1"),
            ({"solve_samples": 0}, "solve_samples is 0"),
        ],
    )
    def test_settings_that_make_no_sense(self, settings, message):
        with pytest.raises((ValueError, TypeError), match=message):
            make(**settings)

    @pytest.mark.parametrize("mechanism", ["online", "vanilla", "M3"])
    def test_networks_with_parts_in_common(self, mechanism):
        teacher, student = network(), network()
        student[0] = teacher[0]
        optimizer = None if mechanism == "vanilla" else adam
        with pytest.raises(ValueError, match=r"parameters in common: the student's 0\.weight, 0\.bias"):
            Distiller(teacher, student, optimizer, adam, mechanism=mechanism)
        teacher[0].requires_grad_(False)
        Distiller(teacher, student, optimizer, adam, mechanism=mechanism)

    def test_what_a_bad_batch_measures_is_not_kept(self):
        distiller = make(mechanism="M3", refresh="step")
        train = distiller.prepare(*loaders())
        distiller.start_epoch(0)
        indexed = next(iter(train))
        bias = distiller.student[2].bias.detach()
        kept = bias.clone()
        bias.fill_(float("nan"))
        with pytest.raises(LossNotFiniteError, match="student's loss"):
            distiller.step(indexed)
        bias.copy_(kept)
        assert distiller.weighting.weights.isfinite().all()
        assert distiller.step(indexed).weights.isfinite().all()

    def test_given_weights_of_another_number_of_samples(self):
        with pytest.raises(ValueError, match=r"7 weights .* 24 samples"):
            make(weights=torch.ones(7)).fit(*loaders(), 1)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"influence": {"dampng": 1.0}}, "option 'dampng'"),
            ({"influence": {"solver": "gmres"}}, "solver is 'gmres'"),
            ({"rule": lambda phi: phi}, "stats, phi, epoch"),
            ({"facts": SampleFacts(flipped=torch.ones(10, dtype=torch.bool))}, r"facts\.flipped has 10"),
            ({"loss": lambda outputs, targets, logits: outputs.sum(1)}, "first batch of val_loader"),
        ],
    )
    def test_what_is_wrong_is_said_before_training(self, settings, message):
        def no_step(optimizer):
            raise AssertionError("a step was taken")

        def optimizer(parameters):
            made = sgd(parameters)
            made.register_step_pre_hook(lambda *args: no_step(made))
            return made

        with pytest.raises((ValueError, TypeError), match=message):
            make(warmup_epochs=2, optimizer=optimizer, **settings).fit(*loaders(), 3)

    def test_data_that_are_no_batches(self):
        data = TensorDataset(*samples(24)[:2])
        with pytest.raises(TypeError, match="train_loader is a TensorDataset"):
            make().fit(data, loaders()[1], 1)
        with pytest.raises(TypeError, match="val_loader is a TensorDataset"):
            make().fit(loaders()[0], data, 1)
        with pytest.raises(ValueError, match=r"train_loader is empty: it has no batch .*drop_last"):
            make().fit(DataLoader(data, batch_size=50, drop_last=True), loaders()[1], 1)
        with pytest.raises(ValueError, match=r"epochs is 1\.5"):
            make().fit(*loaders(), 1.5)

    def test_optimizers_of_other_networks(self):
        other = adam(network().parameters())
        with pytest.raises(ValueError, match="student_optimizer has none of the parameters"):
            Distiller(network(), network(), adam, other)
        with pytest.raises(ValueError, match="teacher_optimizer is None"):
            Distiller(network(), network(), None, adam)
        with pytest.raises(TypeError, match=r"student_optimizer is 0\.1"):
            Distiller(network(), network(), adam, 0.1)

    def test_batches_without_indices(self):
        distiller = make(mechanism="online")
        with pytest.raises(TypeError, match="with_indices"):
            distiller.step((torch.zeros(2, FEATURES), torch.zeros(2, dtype=torch.int64)))
        with pytest.raises(RuntimeError, match="call prepare"):
            make(mechanism="M3").step(IndexedBatch(torch.arange(2), (torch.zeros(2, FEATURES), torch.tensor([0, 1]))))

    def test_validation_samples_that_are_trained_on(self):
        x, y, _ = samples(30)
        data = TensorDataset(x, y)
        train = DataLoader(Subset(data, range(20)), batch_size=5, shuffle=True)
        with pytest.warns(UserWarning, match="2 samples are both in the training and in the validation data"):
            make(mechanism="M1").prepare(train, DataLoader(Subset(data, range(18, 30)), batch_size=6))

    def test_a_failed_step_leaves_no_gradients_behind(self):
        distiller = make(mechanism="online", optimizer=sgd)
        train = distiller.prepare(*loaders())
        x, y, _ = samples(6)
        with pytest.raises(LossNotFiniteError):
            distiller.step(IndexedBatch(torch.arange(6), (x * float("nan"), y)))
        before = [p.detach().clone() for p in distiller.student.parameters()]
        assert all(p.grad is None for p in distiller.student.parameters())
        distiller.step(next(iter(train)))
        assert all(p.isfinite().all() for p in distiller.student.parameters())
        assert len(before) == 4


def test_default_loss_is_the_distillation_loss():
    assert isinstance(Distiller(network(), network(), adam, adam).loss, DistillationLoss)
