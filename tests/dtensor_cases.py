"""What the losses of DTensors are tested on: arguments of the whole batch, and where each of them is."""

from typing import Any, NamedTuple

import torch

from fastkd import functional


class Case(NamedTuple):
    """places: by argument, "" for a plain tensor; of each dimension of the mesh "R" replicated, "P" a sum that is
    pending, a number the dimension that is split; of a list of tensors one for all."""

    loss: str
    why: str
    shapes: dict[str, Any]
    places: dict[str, str]
    options: dict[str, Any] = {}  # noqa: RUF012
    dtype: torch.dtype = torch.float32
    before: Any = None  # of a student that is a DTensor: what makes the logits of it

    def __str__(self):
        return f"{self.loss}: {self.why}"

    def arguments(self):
        """The same on every rank, as plain tensors."""
        generator = torch.Generator().manual_seed(len(self.why))
        return {name: self.drawn(name, shape, generator) for name, shape in self.shapes.items()} | self.options

    def drawn(self, name, shape, generator):
        if isinstance(shape, list):
            return [self.drawn(name, x, generator) for x in shape]
        if name in ("mask", "key_mask"):
            return torch.rand(shape, generator=generator) < 0.6
        if name in ("labels", "target"):
            return torch.randint(0, 3 if name == "labels" else 7, shape, generator=generator)
        if name in ("weight", "temperature", "teacher_temperature", "alpha", "beta", "gamma"):
            return torch.rand(shape, generator=generator) + (0.0 if name == "beta" else 0.5)
        if name == "normalizer":
            return torch.full(shape, 7.0)
        return torch.randn(shape, generator=generator).to(self.dtype)

    def function(self):
        """Of several results their sum."""
        loss = getattr(functional, self.loss)
        return (lambda *given, **options: sum(loss(*given, **options))) if "return_parts" in self.options else loss


B, L, V = 5, 3, 7  # two ranks have three and two of the batch
LOGITS = {"student": (B, L, V), "teacher": (B, L, V)}
SPLIT, WHOLE = {"student": "0", "teacher": "0"}, {"student": "R", "teacher": "R"}
ROWS = {"mask": (B, L), "weight": (B, L)}
REDUCTIONS = ("batchmean", "mean", "sum", "none")


def target_cases():
    with_target, options = LOGITS | {"target": (B, L)}, {"temperature": 2.0, "ignore_index": 3, "label_smoothing": 0.1}
    for reduction in ("batchmean", "sum", "none"):
        of_rows = SPLIT | {"target": "0", "mask": "0", "weight": "0"}
        yield Case("kd_loss", f"targets, {reduction}", with_target | ROWS, of_rows, options | {"reduction": reduction})
        parts = options | {"reduction": reduction, "return_parts": True}
        yield Case("kd_loss", f"targets and parts, {reduction}", with_target | ROWS, of_rows, parts)
    yield Case("kd_loss", "parts, no mask", with_target, SPLIT, options | {"return_parts": True})
    yield Case("kd_loss", "parts, replicated", with_target, WHOLE, options | {"return_parts": True})
    small = with_target | {"target": (2, L), "student": (2, L, V), "teacher": (2, L, V)}
    yield Case("kd_loss", "one row a rank", small, SPLIT | {"target": "0"}, options)
    yield Case("kd_loss", "a plain target", with_target, SPLIT, options)
    yield Case("kd_loss", "a whole target and a plain mask", with_target | ROWS, SPLIT | {"target": "R"}, options)
    yield Case("kd_loss", "a target alone is a DTensor", with_target, {"target": "0"}, options)
    yield Case("kd_loss", "replicated", with_target, WHOLE | {"target": "R"}, options | {"divergence": "js_div"})
    for loss, weights in (("dkd_loss", ("alpha", "beta")), ("nkd_loss", ("gamma",))):
        options = {"temperature": 2.0, "ignore_index": 3}
        of_rows = SPLIT | {"target": "0", "mask": "0", "weight": "0"}
        for reduction in ("batchmean", "sum", "none"):
            yield Case(loss, f"targets, {reduction}", with_target | ROWS, of_rows, options | {"reduction": reduction})
        shapes = with_target | {name: (B, 1) for name in weights}
        yield Case(
            loss, "weights of the parts, of rows", shapes, SPLIT | dict.fromkeys(("target", *weights), "0"), options
        )
        plain = with_target | {name: (L,) for name in weights}
        yield Case(loss, "plain weights of the parts", plain, SPLIT, options | {"reduction": "none"})
        yield Case(loss, "a plain target", with_target, SPLIT, options)
        yield Case(loss, "replicated", with_target, WHOLE | {"target": "R"}, options)


def padded_cases():
    """Heads of other widths."""
    shapes = {"student": (B, L, V), "teacher": (B, L, V + 2)}
    for reduction in ("mean", "none"):
        yield Case("kl_div", f"padded, {reduction}", shapes, SPLIT, {"num_classes": V - 1, "reduction": reduction})
    yield Case("dist_loss", "padded", shapes, WHOLE, {"num_classes": V - 1})


def dist_cases():
    options = {"temperature": 2.0, "intra_weight": 0.5}
    yield Case("dist_loss", "replicated", LOGITS, WHOLE, options)
    yield Case("dist_loss", "a mask that is split", LOGITS | {"mask": (B, L)}, WHOLE | {"mask": "0"})
    yield Case("dist_loss", "a plain teacher and a plain mask", LOGITS | {"mask": (B, L)}, {"student": "R"})
    yield Case("dist_loss", "a plain student", LOGITS, {"teacher": "R"}, {"dim": 1})
    yield Case("dist_loss", "sums that are pending", LOGITS, {"student": "P", "teacher": "R"})
    yield Case("dist_loss", "inplace", LOGITS, WHOLE, {"inplace": True}, before=lambda x: 1.5 * x)


def logit_cases():
    for loss in ("kl_div", "reverse_kl_div", "js_div", "soft_cross_entropy"):
        for reduction in REDUCTIONS:
            options = {"temperature": 2.0, "reduction": reduction}
            yield Case(loss, f"the batch split, {reduction}", LOGITS, SPLIT, options)
            rows = {"mask": "0", "weight": "0"}
            yield Case(loss, f"rows that count and weights, {reduction}", LOGITS | ROWS, SPLIT | rows, options)
        yield Case(loss, "replicated", LOGITS | ROWS, WHOLE | {"mask": "R", "weight": "R"})
    kl = "kl_div"
    yield Case(kl, "a student alone is a DTensor", LOGITS | ROWS, {"student": "0"})
    yield Case(kl, "a teacher alone is a DTensor", LOGITS, {"teacher": "0"})
    yield Case(kl, "a mask alone is a DTensor", LOGITS | ROWS, {"mask": "0"}, {"reduction": "none"})
    yield Case(kl, "a whole teacher of a split student", LOGITS, {"student": "0", "teacher": "R"})
    yield Case(kl, "a split teacher of a whole student", LOGITS, {"student": "R", "teacher": "0"})
    yield Case(kl, "another dimension of the teacher", LOGITS, {"student": "0", "teacher": "1"})
    yield Case(kl, "tokens are split", LOGITS | ROWS, {"student": "1", "teacher": "1", "mask": "1"})
    yield Case(kl, "tokens are split, row by row", LOGITS, {"student": "1", "teacher": "1"}, {"reduction": "none"})
    yield Case(kl, "a mask of all the batch alike", LOGITS | {"mask": (L,)}, SPLIT | {"mask": "R"})
    yield Case(kl, "a plain mask of all the batch alike", LOGITS | {"mask": (1, L)}, SPLIT)
    yield Case(kl, "a mask of whole sequences", LOGITS | {"mask": (B, 1)}, SPLIT | {"mask": "0"})
    yield Case(kl, "a mask that is split elsewhere", LOGITS | ROWS, SPLIT | {"mask": "1", "weight": "R"})
    temperatures = {"temperature": (B, 1), "teacher_temperature": (L,)}
    yield Case(kl, "temperatures", LOGITS | temperatures, SPLIT | {"temperature": "0"}, {"t_squared": False})
    yield Case("js_div", "betas of rows", LOGITS | {"beta": (B, 1)}, SPLIT | {"beta": "0"})
    yield Case("js_div", "plain betas of rows", LOGITS | {"beta": (L,)}, SPLIT, {"reduction": "none"})
    for loss in ("negative_log_acceptance", "alpha_beta_div", "bernoulli_kl_div"):
        for reduction in REDUCTIONS:
            options, rows = {"temperature": 2.0, "reduction": reduction}, {"mask": "0", "weight": "0"}
            yield Case(loss, f"rows that count and weights, {reduction}", LOGITS | ROWS, SPLIT | rows, options)
    powers, both = {"alpha": (B, 1), "beta": (B, L)}, {"alpha": "0", "beta": "0"}
    yield Case("alpha_beta_div", "powers of rows", LOGITS | powers, SPLIT | both)
    yield Case("alpha_beta_div", "plain powers of rows", LOGITS | powers, SPLIT | {"beta": "0"}, {"reduction": "none"})
    yield Case(kl, "a normalizer", LOGITS | ROWS, SPLIT | {"mask": "0"}, {"normalizer": 11})
    yield Case(kl, "a normalizer that is a tensor", LOGITS | {"normalizer": ()}, SPLIT, {"reduction": "mean"})
    yield Case(kl, "a normalizer that is pending", LOGITS | {"normalizer": ()}, SPLIT | {"normalizer": "P"})
    one = {"student": (1, L, V), "teacher": (1, L, V), "mask": (1, L)}
    yield Case(kl, "a rank without rows", one, SPLIT | {"mask": "0"})
    yield Case(kl, "a rank without rows, row by row", one, SPLIT | {"mask": "0"}, {"reduction": "none"})
    yield Case(kl, "nobody has rows", {"student": (0, V), "teacher": (0, V)}, SPLIT)
    nothing = {"mask": torch.zeros(B, L, dtype=torch.bool)}
    yield Case(kl, "no row counts", LOGITS, SPLIT | {"mask": "0"}, nothing)
    of_one_rank = {"mask": torch.tensor([1, 0, 1, 0, 0], dtype=torch.bool)[:, None]}
    yield Case(kl, "no row of one rank counts", LOGITS, SPLIT | {"mask": "0"}, of_one_rank | {"reduction": "mean"})
    yield Case(kl, "sums that are pending", LOGITS, {"student": "P", "teacher": "P"})
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        yield Case(kl, f"{dtype}", LOGITS | ROWS, SPLIT | {"mask": "0"}, {}, dtype)
    for options in ({"temperature": 2.0}, {"reduction": "none"}):
        yield Case(
            kl, f"standardized, {options}", LOGITS | ROWS, SPLIT | {"mask": "0"}, options | {"standardize": True}
        )
    yield Case(kl, "inplace", LOGITS | ROWS, SPLIT | {"mask": "0"}, {"inplace": True}, before=lambda x: 1.5 * x)
    options = {"inplace": True, "reduction": "none"}
    yield Case(kl, "inplace, row by row", LOGITS, SPLIT, options, before=lambda x: 1.5 * x)
    maps, rows = {"student": (B, V, 2, L), "teacher": (B, V, 2, L)}, {"mask": (B, 2, L)}
    yield Case(kl, "maps", maps | rows, SPLIT | {"mask": "0"}, {"dim": 1})
    yield Case(
        kl, "maps that are split by width", maps, {"student": "3", "teacher": "3"}, {"dim": 1, "reduction": "none"}
    )
    even = {"student": (2, 4, V), "teacher": (8, V), "mask": (8,)}
    places = {"student": "1", "teacher": "R", "mask": "0"}
    yield Case(kl, "flattened dimensions", even, places, before=lambda x: x.flatten(0, 1))


D = 6
FEATURES = {"student": (B, L, D), "teacher": (B, L, D)}
LAYERS = {"student": [(B, L, D), (4, 8), (B, 2, 2, 3)], "teacher": [(B, L, D), (4, 8), (B, 2, 2, 3)]}
MAPS = {"student": (B, 4, 2, 3), "teacher": (B, 4, 2, 3)}


def feature_cases():
    for loss in ("feature_mse", "feature_cosine"):
        for reduction in REDUCTIONS:
            options = {"reduction": reduction}
            yield Case(loss, f"the batch split, {reduction}", FEATURES, SPLIT, options)
            rows = {"mask": "0", "weight": "0"}
            yield Case(loss, f"rows that count and weights, {reduction}", FEATURES | ROWS, SPLIT | rows, options)
            of_layers = {"return_layers": True, "layer_weights": [1.0, 0.5, 2.0]}
            yield Case(loss, f"layers, {reduction}", LAYERS, SPLIT, options | of_layers)
        masks = {"mask": [(B, L), (4,), (B, 1, 1)], "weight": [(B, 1), (4,), (B, 2, 3)]}
        yield Case(loss, "masks of layers", LAYERS | masks, SPLIT | {"mask": "0"}, {"return_layers": True})
        yield Case(loss, "replicated", FEATURES | ROWS, WHOLE | {"mask": "R"})
        yield Case(loss, "replicated layers", LAYERS, WHOLE, {"return_layers": True})
        yield Case(loss, "a normalizer", FEATURES | ROWS, SPLIT | {"mask": "0"}, {"normalizer": 3.0})
    mse = "feature_mse"
    yield Case(mse, "maps", MAPS | {"mask": (2, 3)}, SPLIT | {"mask": "R"}, {"normalize": "l2"})
    split = {"student": "2", "teacher": "2"}
    yield Case(mse, "maps, split by height", MAPS | {"mask": (B, 2, 3)}, split | {"mask": "1"})
    yield Case(mse, "maps, split by width, row by row", MAPS, {"student": "3"}, {"reduction": "none"})
    smooth = {"normalize": "standardize", "beta": 0.5}
    for reduction in REDUCTIONS:
        yield Case("feature_smooth_l1", f"layers, {reduction}", LAYERS, SPLIT, {"reduction": reduction, **smooth})
    yield Case("feature_smooth_l1", "absolute differences", FEATURES | ROWS, SPLIT | {"mask": "0"}, {"beta": 0})
    yield Case(mse, "a rank without rows", {"student": (1, D), "teacher": (1, D)}, SPLIT)
    yield Case(mse, "no row counts", FEATURES, SPLIT, {"mask": torch.zeros(B, 1, dtype=torch.bool)})
    yield Case(mse, "bfloat16", FEATURES, SPLIT, {}, torch.bfloat16)
    yield Case(mse, "float16", FEATURES, SPLIT, {}, torch.float16)
    projector = {"student": (B, L, D), "projector_weight": (8, D), "teacher": (B, L, 8)}
    linear = "linear_feature_mse"
    for reduction in REDUCTIONS:
        shapes = projector | {"projector_bias": (8,)} | ROWS
        places = SPLIT | {"projector_weight": "R", "projector_bias": "R", "mask": "0"}
        yield Case(linear, f"the batch split, {reduction}", shapes, places, {"reduction": reduction})
    yield Case(linear, "a plain projector", projector, SPLIT)
    yield Case(linear, "a projector that is split", projector, SPLIT | {"projector_weight": "0"})
    yield Case(linear, "replicated", projector, WHOLE | {"projector_weight": "R"})
    yield Case("attention_transfer", "the batch split", MAPS, SPLIT)
    yield Case("attention_transfer", "replicated", MAPS, WHOLE, {"p": 1.5})
    yield Case("attention_transfer", "a rank without maps", {"student": (1, 4, 2, 2), "teacher": (1, 3, 2, 2)}, SPLIT)


N = 6
EMBEDDINGS = {"student": (N, 4), "teacher": (N, 5)}


def relational_cases():
    losses = (
        "rkd_distance", "rkd_angle", "rkd_loss", "similarity_preserving", "gram_mse", "pkt", "relation_kl",
        "relational_triplet",
    )  # fmt: skip
    for loss in losses:
        yield Case(loss, "replicated", EMBEDDINGS, WHOLE)
        mask = {"mask": (N,)}
        yield Case(loss, "a mask that is split", EMBEDDINGS | mask, WHOLE | {"mask": "0"})
        yield Case(loss, "a plain teacher and a plain mask", EMBEDDINGS | mask, {"student": "R"})
        yield Case(loss, "a plain student", EMBEDDINGS, {"teacher": "R"})
    yield Case("rkd_distance", "a weight", EMBEDDINGS | {"weight": (N,)}, WHOLE | {"weight": "R"})
    yield Case("gram_mse", "sums that are pending", EMBEDDINGS, {"student": "P", "teacher": "R"})
    keys = {"student_keys": (9, 4), "teacher_keys": (9, 5), "key_mask": (9,), "temperature": (N,)}
    places = {"student_keys": "R", "teacher_keys": "R", "key_mask": "R", "temperature": "0"}
    yield Case("relation_kl", "keys", EMBEDDINGS | keys, WHOLE | places)
    betas, js = {"beta": (N,)}, {"divergence": "js_div"}
    yield Case("relation_kl", "betas of rows", EMBEDDINGS | betas, WHOLE | {"beta": "0"}, js)
    labels = {"student": (N, 4), "labels": (N,)}
    yield Case("relational_triplet", "labels", labels, {"student": "R", "labels": "0"}, {"return_active": True})


def on_four_ranks():
    """A mesh [2, 2]."""
    rows = {"mask": "0 R", "weight": "R 0"}
    for places in ("0 R", "R 0", "0 1", "0 0", "R R"):
        both = {"student": places, "teacher": "R R"}
        for reduction in ("mean", "none"):
            yield Case("kl_div", f"student {places}, {reduction}", LOGITS | ROWS, both | rows, {"reduction": reduction})
        yield Case("feature_mse", f"student {places}", FEATURES | ROWS, both | rows)
        projector = {"projector_weight": (8, D), "teacher": (B, L, 8)}
        yield Case("linear_feature_mse", f"student {places}", FEATURES | projector, both | {"projector_weight": "R R"})
    yield Case("kl_div", "sums that are pending", LOGITS, {"student": "P 0"})
    yield Case("attention_transfer", "both", MAPS, {"student": "0 0", "teacher": "R 0"})
    yield Case("rkd_distance", "replicated", EMBEDDINGS, {"student": "R R", "teacher": "R R"})


CASES = {
    2: [*logit_cases(), *padded_cases(), *target_cases(), *dist_cases(), *feature_cases(), *relational_cases()],
    4: list(on_four_ranks()),
}  # by number of ranks
