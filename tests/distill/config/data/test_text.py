import torch

from kdaif_fast.distill.config.data import PaddedCollate, Vocabulary
from kdaif_fast.distill.config.data.text import Encoded, words


def test_words():
    assert words("It's  FINE, isn't it?") == ["it's", "fine", ",", "isn't", "it", "?"]


def test_vocabulary():
    vocabulary = Vocabulary(["b a b", "c b a"], size=4)
    assert vocabulary.numbers == {"b": 2, "a": 3}  # the two most frequent; 0 and 1 are taken
    assert vocabulary.encode("A B c") == [3, 2, 1]
    assert vocabulary.encode("a b c", longest=2) == [3, 2]
    assert vocabulary.encode("") == [1]
    assert len(vocabulary) == 4


def test_padding():
    dataset = Encoded({"input_ids": [[5, 6, 7], [8]], "token_type_ids": [[0, 1, 1], [1]]}, [1, 0])
    inputs, labels = PaddedCollate(padding=9)([dataset[0], dataset[1]])
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert inputs["token_type_ids"].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert torch.equal(labels, torch.tensor([1, 0]))
