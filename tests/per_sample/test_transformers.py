"""The models of the transformers library, small and with random weights."""

import pytest
import torch

from kdaif_fast.per_sample import per_sample_grad_dots, per_sample_grad_norms, per_sample_grads, weighted_step

from .zoo import Case, assert_close, assert_same, flat, token_cross_entropy, trainable

pytestmark = pytest.mark.slow  # the library alone takes ten seconds to import

VOCABULARY, LENGTH, CLASSES = 11, 5, 3
SMALL = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def bert(library):
    config = library.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=8, num_labels=CLASSES, **SMALL)
    return library.BertForSequenceClassification(config)


def distilbert(library):
    config = library.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=8,
        n_layers=2,
        n_heads=2,
        hidden_dim=12,
        max_position_embeddings=8,
        num_labels=CLASSES,
    )
    return library.DistilBertForSequenceClassification(config)


def gpt2(library):
    return library.GPT2LMHeadModel(
        library.GPT2Config(
            vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
        )
    )


def llama(library):
    config = library.LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=8, tie_word_embeddings=True, **SMALL
    )
    return library.LlamaForCausalLM(config)


class T5(torch.nn.Module):
    """The encoder, its mean position, and a head."""

    def __init__(self, library):
        super().__init__()
        config = library.T5Config(vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)
        self.encoder, self.head = library.T5EncoderModel(config), torch.nn.Linear(8, CLASSES)

    def forward(self, input_ids, attention_mask):
        return self.head(self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state.mean(1))


def vit(library):
    return library.ViTForImageClassification(
        library.ViTConfig(image_size=6, patch_size=3, num_channels=1, num_labels=CLASSES, **SMALL)
    )


def tokens(n):
    mask = (torch.arange(LENGTH) < torch.arange(2, n + 2)[:, None]).long()
    return {"input_ids": torch.randint(VOCABULARY, (n, LENGTH)), "attention_mask": mask}


def plain_tokens(n):
    return {"input_ids": torch.randint(VOCABULARY, (n, LENGTH))}


def next_tokens(n):
    return torch.randint(VOCABULARY, (n, LENGTH))


MODELS = {
    "BERT": (bert, tokens, None),
    "DistilBERT": (distilbert, tokens, None),
    "T5": (T5, tokens, None),
    "GPT-2": (gpt2, plain_tokens, token_cross_entropy),
    "Llama": (llama, plain_tokens, token_cross_entropy),
    "ViT": (vit, lambda n: {"pixel_values": torch.randn(n, 1, 6, 6)}, None),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_against_a_loop(transformers, name):
    build, inputs, loss = MODELS[name]
    targets = next_tokens if loss else lambda n: torch.randint(CLASSES, (n,))
    case = Case(lambda: build(transformers), inputs, targets=targets, loss=loss, sizes=(LENGTH, 3))
    model = case.model()
    for n in case.sizes:
        batch = case.batch(n)
        truth = {}

        def losses(x, y):
            outputs = model(**x)
            return (loss or torch.nn.functional.cross_entropy)(getattr(outputs, "logits", outputs), y).sum()

        rows = []
        for i in range(n):
            one = losses({key: x[i : i + 1] for key, x in batch[0].items()}, batch[1][i : i + 1])
            rows.append(torch.autograd.grad(one, list(trainable(model).values()), allow_unused=True))
        for key, p, grads in zip(trainable(model), trainable(model).values(), zip(*rows, strict=True), strict=True):
            truth[key] = torch.stack([torch.zeros_like(p) if g is None else g for g in grads])
        assert_same(per_sample_grads(model, batch, loss), truth, 1e-7)
        assert_close(per_sample_grad_norms(model, batch, loss), flat(truth).norm(dim=1), 1e-7)
        v = torch.randn(flat(truth).shape[1]).double()
        assert_close(per_sample_grad_dots(model, batch, v, loss=loss), flat(truth) @ v, 1e-7)
        weights = torch.rand(n).double()
        step = weighted_step(model, batch, weights, direction=v, loss=loss)
        assert_close(step.phi, -flat(truth) @ v, 1e-7)
        grads = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in trainable(model).items()}
        assert_same(grads, {key: torch.einsum("n,n...->...", weights, g) / n for key, g in truth.items()}, 1e-7)
        model.zero_grad()
