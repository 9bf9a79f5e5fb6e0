"""fastkd.integrations.sentence_transformers beside the losses of sentence-transformers, and in its trainer."""

import copy

import datasets
import pytest
import tokenizers
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import pairwise_cos_sim

import fastkd
from fastkd.integrations.sentence_transformers import MarginMSELoss, TeacherEmbeddingsLoss, TeacherScoresLoss

WORDS = ["a", "teacher", "tells", "its", "student", "which", "word", "comes", "next", "and", "why", "that", "one"]
WIDTH, B = 8, 6


def model():
    torch.manual_seed(0)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({x: i for i, x in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=WIDTH)], device="cpu")


def texts(shift):
    return [" ".join(WORDS[(i + shift) % 9 : (i + shift) % 9 + 3]) for i in range(B)]


def columns(of, count):
    return [of.preprocess(texts(3 * i)) for i in range(count)]


def drawn(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def both(mine, theirs, count, labels):
    found = []
    for loss in (mine, theirs):
        of = loss.model
        of.zero_grad()
        value = loss(columns(of, count), labels)
        value.backward()
        found.append([value.detach(), *(x.grad for x in of.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("labels", [drawn(B, WIDTH), drawn(B, 2, WIDTH)], ids=["one for all columns", "one each"])
def test_embeddings(labels):
    both(TeacherEmbeddingsLoss(model(), fastkd.FeatureMSELoss()), losses.MSELoss(model()), 2, labels)
    mine = TeacherEmbeddingsLoss(model(), fastkd.FeatureCosineLoss())
    both(mine, losses.EmbedDistillLoss(model(), distance_metric="cosine"), 2, labels)


@pytest.mark.parametrize("similarity", [None, pairwise_cos_sim])
def test_scores(similarity):
    options = {} if similarity is None else {"similarity_fct": similarity}
    labels = drawn(B, 3)
    mine = TeacherScoresLoss(model(), fastkd.KLDivLoss(temperature=2.0, teacher_temperature=0.5), **options)
    theirs = losses.DistillKLDivLoss(model(), student_temperature=2.0, teacher_temperature=0.5, **options)
    both(mine, theirs, 4, labels)
    for given in (labels, labels[:, 1:]):
        both(MarginMSELoss(model(), **options), losses.MarginMSELoss(model(), **options), 4, given)
    both(MarginMSELoss(model(), **options), losses.MarginMSELoss(model(), **options), 3, labels[:, 0])


def test_relations_need_no_common_width():
    for loss in (fastkd.RelationKLLoss(temperature=0.1), fastkd.GramMSELoss(), fastkd.RKDLoss(), fastkd.PKTLoss()):
        of = model()
        found = TeacherEmbeddingsLoss(of, loss)(columns(of, 1), drawn(B, 5))
        torch.testing.assert_close(found, loss(of(columns(of, 1)[0])["sentence_embedding"], drawn(B, 5)))


@pytest.mark.parametrize("name", ["embeddings", "relations", "scores"])
def test_trained(tmp_path, name):
    """By its trainer; the same steps as with its own losses, where it has them."""
    count = 3 if name == "scores" else 1
    data = {f"text_{i}": texts(3 * i) for i in range(count)}
    data["label"] = drawn(B, {"embeddings": WIDTH, "relations": 5, "scores": 2}[name]).tolist()

    def losses_of(of):
        if name == "relations":
            return [TeacherEmbeddingsLoss(of, fastkd.RelationKLLoss(temperature=0.1))] * 2
        if name == "embeddings":
            return [TeacherEmbeddingsLoss(of, fastkd.FeatureMSELoss()), losses.MSELoss(of)]
        return [TeacherScoresLoss(of, fastkd.KLDivLoss()), losses.DistillKLDivLoss(of)]

    first, found = model(), []
    for mine in (True, False):
        of = copy.deepcopy(first)
        arguments = SentenceTransformerTrainingArguments(
            output_dir=tmp_path, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=4,
            per_device_train_batch_size=3, learning_rate=0.05, seed=3,
        )  # fmt: skip
        SentenceTransformerTrainer(
            model=of, args=arguments, train_dataset=datasets.Dataset.from_dict(data), loss=losses_of(of)[not mine]
        ).train()
        found.append([x.detach() for x in of.parameters()])
    assert not torch.equal(found[0][0], next(first.parameters()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_bad_input():
    of = model()
    loss = TeacherEmbeddingsLoss(of, fastkd.FeatureMSELoss())
    with pytest.raises(TypeError, match="loss: a module or function of fastkd wanted, got str"):
        TeacherEmbeddingsLoss(of, "feature_mse")
    with pytest.raises(ValueError, match="labels: embeddings of the teacher wanted in a column 'label'"):
        loss(columns(of, 2), None)
    with pytest.raises(ValueError, match=r"labels: the teacher's embeddings \[B, D\] or \[B, 2, D\] wanted"):
        loss(columns(of, 2), drawn(B, 3, WIDTH))
    scores = TeacherScoresLoss(of, fastkd.KLDivLoss())
    with pytest.raises(ValueError, match=r"labels: the teacher's scores \[6, 2\] wanted, got \[6, 3\]"):
        scores(columns(of, 3), drawn(B, 3))
    with pytest.raises(ValueError, match="sentence_features: a query and two passages at least wanted, got 2"):
        scores(columns(of, 2), drawn(B, 1))
    with pytest.raises(ValueError, match=r"labels: the teacher's scores \[6, 2\] or margins \[6, 1\] wanted"):
        MarginMSELoss(of)(columns(of, 3), drawn(B, 3))
