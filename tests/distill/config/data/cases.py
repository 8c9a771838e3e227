"""Reading the table [data] of a config in a folder, and loading what it names."""

from kdaif_fast._config import Importer, Section, parse_toml
from kdaif_fast.distill.config.data import load_data, read_data


def loaded(folder, text, seed=0):
    path = folder / "run.toml"
    section = Section(path, "data", parse_toml(text))
    return load_data(read_data(section), Importer(path), seed)


def all_of(loader):
    """The samples of a loader without shuffling, one by one."""
    dataset = loader.dataset
    return [dataset[index] for index in range(len(dataset))]
