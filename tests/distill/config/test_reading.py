"""`kdaif-fast distill`: what a file may say, and what is said about a file that cannot be used."""

import re
import textwrap
from pathlib import Path

import pytest

from kdaif_fast.distill.config.command import MAY_CHANGE, OWN_FILES
from kdaif_fast.distill.config.data.columns import COLUMNS
from kdaif_fast.distill.config.data.options import COMMON, KINDS
from kdaif_fast.distill.config.reading import (
    DISTILL,
    EXAMPLE,
    INFLUENCE,
    MEASURE,
    MODEL,
    OPTIMIZERS,
    PRESETS,
    RUN,
    SCHEDULERS,
    SECTIONS,
    read_config,
)

from .config_project import CONFIG, changed, refuses

READING = [
    # sections and keys
    ("epochs = 2", "epochs =", "is not TOML"),
    ("[influence]", "[influense]", "the key 'influense' is unknown, expected one of data, teacher"),
    ("[influence]", "[influense]", "did you mean 'influence'?"),
    ("[run]", "[runs]", "the key 'runs' is unknown"),
    ("epochs = 2", "epoch = 2", "the key 'run.epoch' is unknown"),
    ("epochs = 2", "epoch = 2", "did you mean 'epochs'?"),
    ("epochs = 2", "", "the key 'run.epochs' is missing"),
    ('kind = "function"', "", "the key 'data.kind' is missing"),
    ('function = "project.py:make_data"', "", "the key 'data.function' is missing"),
    ("warmup_epochs = 1", "warm_up = 1", "the key 'distill.warm_up' is unknown"),
    ("validation = 20", "validate = 20", "the key 'data.validate' is unknown"),
    ("validation = 20", 'path = "."', "the key 'data.path' is unknown"),
    ("max_iter = 5", "max_iters = 5", "the key 'influence.max_iters' is unknown"),
    ("lr = 0.01", "learning_rate = 0.01", "the key 'student.optimizer.learning_rate' is unknown"),
    ("[influence]\nmax_iter = 5", "[influence.tol]\na = 1", "influence.tol is {'a': 1}, expected a number >= 0"),
    # types and values
    ("epochs = 2", "epochs = 0", "run.epochs is 0, expected a whole number >= 1"),
    ("epochs = 2", "epochs = true", "run.epochs is True, expected a whole number"),
    ("epochs = 2", "epochs = 2\nseed = -1", "run.seed is -1, expected a whole number >= 0"),
    ("epochs = 2", 'epochs = 2\nprecision = "half"', "run.precision is 'half', expected one of float32, bfloat16"),
    ("epochs = 2", "epochs = 2\nclip_norm = 0", "run.clip_norm is 0, expected a number > 0"),
    ("epochs = 2", "epochs = 2\ntensorboard = 1", "run.tensorboard is 1, expected true or false"),
    ("epochs = 2", "epochs = 2\ndevice = 3", "run.device is 3, expected text"),
    ('dir = "run"', 'dir = "project.py"', "run.dir is 'project.py', but "),
    ('"M3"', '"M5"', "run.toml: distill.mechanism is 'M5', expected one of vanilla, online, M1, M2, M3, M4"),
    ('"M3"', '"M3"\nema = 1.0', "distill.ema is 1.0, expected a number in [0, 1)"),
    ('"M3"', '"M3"\nalpha = 1.5', "distill.alpha is 1.5, expected a number in [0, 1]"),
    ('"M3"', '"M3"\ntemperature = 0', "distill.temperature is 0, expected a finite number > 0"),
    ('"M3"', '"M3"\ntemperature = inf', "distill.temperature is inf, expected a finite number > 0"),
    ('"M3"', '"M3"\nrefresh = "epochs"', "distill.refresh is 'epochs', expected 'epoch', 'step', or a number of"),
    ('"M3"', '"M3"\nrefresh = 0', "distill.refresh is 0, expected"),
    ('"M3"', '"M3"\ncombine = "sum"', "distill.combine is 'sum', expected one of mean, product, ema"),
    ('"M3"', '"M3"\nnormalize = "yes"', "distill.normalize is 'yes', expected true or false"),
    ('"M3"', '"M3"\nrule = "sigmod"', "distill.rule is 'sigmod', expected one of sigmoid, half_sigmoid"),
    ('"M3"', '"M3"\nrule = "sigmod"', "did you mean 'sigmoid'?"),
    ('"M3"', '"M3"\nrule = { gamma = -1 }', "distill.rule.gamma is -1"),
    ('"M3"', '"M3"\nrule = { gama = 1 }', "the key 'distill.rule.gama' is unknown, expected one of gamma, scale"),
    ('"M3"', '"M3"\nrule = { name = 3 }', "distill.rule.name is 3"),
    ('"M3"', '"M3"\nloss = "kd"', "distill.loss is 'kd', expected 'module:function'"),
    ('"M3"', '"M3"\nloss = "a:b"\nalpha = 0.5', "distill.alpha is 0.5, but distill.loss is 'a:b'"),
    ('"M3"', '"M1"\npreset = "revision"', "distill.preset is 'revision', expected one of label_revision"),
    ('"M3"', '"M1"\npreset = { name = "label_revision", rho = 1 }', "the key 'distill.preset.rho' is unknown"),
    ('"M3"', '"M1"\npreset = "label_revision"\nrule = "drop"', "distill.rule is 'drop', but distill.preset is"),
    ("max_iter = 5", 'curvature = "gng"', "influence.curvature is 'gng', expected one of "),
    ("max_iter = 5", 'solver = "gc"', "influence.solver is 'gc', expected one of "),
    ("max_iter = 5", "max_iter = 0", "influence.max_iter is 0, expected a whole number >= 1"),
    ("max_iter = 5", 'damping = "much"', "influence.damping is 'much', expected a number >= 0, or 'auto'"),
    ("max_iter = 5", "tol = -1", "influence.tol is -1, expected a number >= 0, or 'rank' or 'none'"),
    ("max_iter = 5", "params = [1]", "influence.params is [1], expected a text or a list of texts"),
    ("max_iter = 5", "solver_options = 1", "influence.solver_options is 1, expected a table"),
    ('"Adam"', '"Adamm"', "student.optimizer.name is 'Adamm', expected one of "),
    ('"Adam"', '"LBFGS"', "student.optimizer.name is 'LBFGS', expected one of "),
    ("[student.optimizer]", "[student.scheduler]", "student.scheduler.name is 'Adam', expected one of "),
    ("arguments = { width = 4 }", "arguments = 4", "student.arguments is 4, expected a table"),
    ("arguments = { width = 4 }", 'checkpoint = "no.pt"', "student.checkpoint is 'no.pt', but there is no "),
    ("arguments = { width = 4 }", 'auto = "AutoModel"', "student.auto is 'AutoModel', which is for models of transf"),
    ('kind = "function"', 'kind = "numbers"', "data.kind is 'numbers', expected one of digits, torchvision, datasets"),
    ('"project.py:make_data"', '"project.py"', "data.function is 'project.py', expected 'module:function'"),
    ("validation = 20", "validation = 1.0", "data.validation is 1.0, expected a share of the training samples"),
    ("validation = 20", "validation = 0", "data.validation is 0, expected a share"),
    ("batch_size = 16", "batch_size = 0", "data.batch_size is 0, expected a whole number >= 1"),
    ("batch_size = 16", "flip = 1.0", "data.flip is 1.0, expected a share in [0, 1)"),
    ("batch_size = 16", "classes = 1", "data.classes is 1, expected a whole number >= 2"),
    ('mechanism = "M3"', 'mechanism = "vanilla"', "distill.mechanism is 'vanilla', whose teacher is not trained"),
]


@pytest.mark.parametrize(("old", "new", "message"), READING)
def test_errors_of_reading_name_the_key(project, old, new, message):
    changed(project, (old, new))
    refuses(project, message)


@pytest.mark.parametrize("name", ["data", "teacher", "student"])
def test_a_missing_table(project, name):
    (project / "run.toml").write_text(re.sub(rf"\[{name}(\.\w+)?\]\n[^\[]*", "", CONFIG))
    refuses(project, f"the table [{name}] is missing")


ASSEMBLING = [
    ('"project.py:make_data"', '"projects.py:make_data"', "data.function is 'projects.py', but there is no file"),
    ('"project.py:make_data"', '"no_such_module:f"', "data.function is 'no_such_module', which cannot be imported"),
    (
        '"project.py:make_data"',
        '"project.py:make_date"',
        "data.function is 'project.py:make_date', but project.py has no",
    ),
    ('"project.py:make_data"', '"project.py:make_date"', "did you mean 'make_data'?"),
    ('"project.py:make_data"', '"project.py:number"', "data.function is 'project.py:number', which is a int, expected"),
    (
        '"project.py:make_data"',
        '"project.py:fails"',
        "data.function is 'project.py:fails', which failed: KeyError: 'gone'",
    ),
    ('"project.py:make_data"', '"project.py:fails"', "(project.py, line "),
    ('"project.py:make_data"', '"project.py:make_pair"', "which gave a Tensor, expected (train, validation[, test])"),
    (
        '"project.py:make_data"',
        '"project.py:make_loaders"',
        "data.validation is given, but the training part is a Data",
    ),
    (
        "validation = 20",
        "arguments = { sise = 3 }",
        "the key 'data.arguments.sise' is unknown, expected one of size; did",
    ),
    ("validation = 20", "validation = 80", "80 for validation and 10 for test held out of 90 samples leave none"),
    ("arguments = { width = 4 }", "arguments = { widht = 4 }", "the key 'student.arguments.widht' is unknown"),
    ("arguments = { width = 4 }", "", "student.model is 'project.py:make_model', whose argument 'width' is missing"),
    (
        "arguments = { width = 4 }",
        'arguments = { width = "4" }',
        "student.model is 'project.py:make_model', which failed",
    ),
    ("arguments = { width = 4 }", "arguments = { width = 4, classes = 5 }", "expected the same number of classes"),
    ("arguments = { width = 4 }", 'arguments = { width = 4 }\ncheckpoint = "project.py"', "student.checkpoint is "),
    ("arguments = { width = 8 }", 'arguments = { width = 8 }\ncheckpoint = "project.py"', "teacher.checkpoint is "),
    ("lr = 0.01", "lr = -1.0", "student.optimizer: Adam with lr = -1.0: Invalid learning rate"),
    ("lr = 0.01", 'lr = 0.01\n[student.scheduler]\nname = "StepLR"', "student.scheduler: StepLR with no settings: "),
    ("epochs = 2", 'epochs = 2\ndevice = "warp"', "run.device is 'warp'"),
    ('"M3"', '"M3"\nrule = "project.py:negative"', "distill.rule failed on the first samples: ValueError: "),
    ('"M3"', '"M3"\nrule = "project.py:number"', "distill.rule is 'project.py:number', which is a int, expected a"),
    ('"M3"', '"M3"\nloss = "project.py:one_loss"', "distill.loss returned"),
    ('"M3"', '"M3"\nteacher_loss = "project.py:one_loss"', "distill.teacher_loss failed on the first samples: "),
    ("max_iter = 5", 'params = ["7.weight"]', "influence.params contains '7.weight', which is no parameter"),
    ("max_iter = 5", "solver_options = { speed = 1 }", "speed"),
    ("warmup_epochs = 1", 'refresh = "step"\npreset = "label_revision"', "distill.refresh is 'step', "),
]


@pytest.mark.parametrize(("old", "new", "message"), ASSEMBLING)
def test_errors_of_assembling_name_the_key(project, old, new, message):
    changed(project, (old, new))
    refuses(project, message)


def test_a_model_that_is_none(project):
    changed(project, ('model = "project.py:make_model"\narguments = { width = 4 }', 'model = "project.py:make_pair"'))
    refuses(project, "student.model is 'project.py:make_pair', which gave a Tensor, expected a Module")


def test_a_model_of_other_outputs(project):
    changed(project, ('model = "project.py:make_model"\narguments = { width = 4 }', 'model = "project.py:make_other"'))
    refuses(project, "expected the same number of classes")


def test_batch_statistics_and_steps(project):
    new = 'model = "project.py:make_random"'
    changed(
        project,
        ('model = "project.py:make_model"\narguments = { width = 4 }', new),
        ('"M3"', '"M3"\nrefresh = "step"'),
    )
    refuses(project, "distill.refresh is 'step', but module '1' (BatchNorm1d)")


def test_flips_of_loaders(project):
    changed(project, ("make_data", "make_loaders"), ("validation = 20\ntest = 10", "flip = 0.1"))
    refuses(project, "data.flip is 0.1, but the training data are a DataLoader")


def test_data_that_can_be_gone_through_only_once(project):
    changed(project, ("make_data", "make_iterator"), ("validation = 20\ntest = 10", ""))
    refuses(project, "data gave a list_iterator for train, which can be gone through only once")


def test_names_of_files_that_python_has(project):
    (project / "random.py").write_text("def f(): pass")
    changed(project, ("project.py:make_data", "random.py:f"))
    refuses(project, "'random' is a module of Python's own; expected another name")


def test_a_module_with_an_error(project):
    (project / "broken.py").write_text("x = 1 / 0")
    changed(project, ("project.py:make_data", "broken.py:f"))
    refuses(project, "data.function is 'broken.py', which cannot be imported: ZeroDivisionError")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epochs=3", "the change is 'epochs=3', expected 'section.key=value'"),
        ("run.epochs", "the change is 'run.epochs', expected"),
        ("run.epochs=many", "run.epochs is 'many', expected a whole number"),
        ("run.epoch=3", "the key 'run.epoch' is unknown"),
        ("run.epochs.more=3", "run.epochs is 2, so that run.epochs.more cannot be set"),
    ],
)
def test_changes_that_cannot_be_made(project, change, message):
    refuses(project, message, "--set", change)


def test_changes(project):
    path = project / "run.toml"
    changes = ["run.epochs=7", "distill.rule.gamma=3", "teacher.optimizer.name = SGD", 'influence.damping="auto"']
    config = read_config(path, changes, out=project / "there")
    assert config.run.epochs == 7
    assert config.rule.settings == {"gamma": 3}
    assert config.teacher.optimizer.name == "SGD"
    assert config.distill["influence"] == {"max_iter": 5, "damping": "auto"}
    assert config.run.folder == project / "there"
    assert read_config(path).run.folder == project / "run"


def test_defaults(project):
    config = read_config(project / "run.toml")
    assert config.mechanism == "M3"
    assert config.rule.name == "sigmoid"
    assert config.distill["ema"] == 0.5
    assert (config.distill["temperature"], config.distill["alpha"]) == (1.0, 0.5)
    assert config.teacher.optimizer.name == "Adam"
    assert config.resolved["run"]["seed"] == 0
    assert config.resolved["data"]["flip"] == 0.0
    assert config.resolved["distill"]["warmup_epochs"] == 1


def test_the_example_of_the_help(project):
    (project / "example.toml").write_text(textwrap.dedent(EXAMPLE))
    config = read_config(project / "example.toml")
    assert config.data.kind == "digits"
    assert config.student.optimizer.settings == {"lr": 2e-3}


def test_every_optimizer_and_scheduler_can_be_named():
    assert {"Adam", "AdamW", "SGD", "RMSprop", "NAdam"} <= set(OPTIMIZERS)
    assert {"StepLR", "MultiStepLR", "CosineAnnealingLR", "OneCycleLR"} <= set(SCHEDULERS)
    assert not {"Optimizer", "LBFGS"} & set(OPTIMIZERS)
    assert not {"LRScheduler", "ReduceLROnPlateau", "LambdaLR"} & set(SCHEDULERS)


def test_every_key_is_described():
    text = (Path(__file__).parents[3] / "docs" / "config.md").read_text()
    keys = {*SECTIONS, *MODEL, *DISTILL, *INFLUENCE, *MEASURE, *RUN, *COMMON, *COLUMNS, *KINDS, *PRESETS}
    keys |= {key for adapter in KINDS.values() for key in adapter.KEYS}
    keys |= {key for names in PRESETS.values() for key in names}
    keys |= {key.split(".")[1] for key in MAY_CHANGE} | set(OWN_FILES)
    assert not {key for key in keys if not re.search(rf"\b{re.escape(key)}\b", text)}
