"""Influence by kronfluence (1.0): EK-FAC factors, then scores of the summed validation gradient with every sample."""

import tempfile

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


def kronfluence_influence_scores(model: nn.Module, batch, val, damping: float, strategy: str = "ekfac") -> Tensor:
    """phi [N], positive = harmful. kronfluence's scores are positive = helpful, of summed validation losses.

    Its factors are means over the samples, so its damping means the same as ours.
    """
    import copy

    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.distributions import Categorical

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            inputs, labels = batch
            logits = model(inputs)
            if sample:
                labels = Categorical(logits=logits.detach()).sample()
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    train, queries = TensorDataset(*batch), TensorDataset(*val)
    task = Classification()
    model = prepare_model(copy.deepcopy(model), task)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("digits", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        analyzer.fit_all_factors(
            "factors", train, per_device_batch_size=len(train), factor_args=FactorArguments(strategy=strategy)
        )
        analyzer.compute_pairwise_scores(
            *("scores", "factors", queries, train),
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=len(train),
            score_args=ScoreArguments(damping_factor=damping, aggregate_query_gradients=True),
        )
        scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    return -scores.sum(0) / len(queries)
