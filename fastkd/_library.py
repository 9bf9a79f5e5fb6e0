"""The ops: their schemas, and the compiled libraries that implement them; says why where there are none."""

import warnings
from pathlib import Path

import torch

from . import _calls, _divergences

SCHEMAS = (
    *(_calls.schema(name) for name in _calls.OPS),
    # embeddings [N, D_s] and [N, D_t]; count: rows from there on are not, they hold finite numbers; weight: one per
    # row; grad, here as below, is in float32 where the student is in float16, whose range it would leave before a
    # loss scaler multiplies it; empty where it is not saved
    "pairs_fwd(Tensor student, Tensor teacher, Tensor? count, Tensor? weight, int relation, float delta, "
    "bool normalize, bool save) -> (Tensor loss, Tensor grad)",
    # the weighted sum of both losses; a loss of weight 0 is left out
    "triples_fwd(Tensor student, Tensor teacher, Tensor? count, float angle_weight, float angle_delta, "
    "float distance_weight, float distance_delta, bool save) -> (Tensor loss, Tensor grad)",
    # Rows row .. row + n of all pairs of samples, in strips that become weights of the gradient; what is said of
    # samples is [N]. pkt: cosines [n, N - row], from the diagonal on, which become weights of unit vectors;
    # slopes += in float64; see csrc/cpu/pkt_kernel.h
    "pkt_strip_(Tensor(a!) student, Tensor teacher, Tensor(b!) slopes, Tensor here, Tensor student_inverse, "
    "Tensor teacher_inverse, Tensor weight, Tensor scale, float eps, int row) -> Tensor loss",
    # triplets: inner products [n, N] of centred rows, of which norms are the squared lengths; x: the rows as they were
    # given, [N, D]; positives of sample i: positives[first[i] .. last[i]]; count: of those that are here; grad, where
    # weights are wanted: += of near pairs, whose weights in the strip are 0; sums: of the loss, the active triplets
    # and all; see csrc/cpu/triplet_kernel.h
    "triplet_strip_(Tensor(a!) strip, Tensor x, Tensor norms, Tensor positives, Tensor first, Tensor last, "
    "Tensor here, Tensor count, Tensor weight, float margin, int row, Tensor(b!)? grad) -> Tensor sums",
    # features of one layer or more, whose rows are along feature_dim; mask, weight: one per layer, [N] each, or
    # none at all; loss: of all layers, weighted, one per row where nothing is reduced; layers: each one's own
    "elements_fwd(Tensor[] student, Tensor[] teacher, int[] feature_dim, int feature, Tensor[] mask, Tensor[] weight, "
    "int reduction, float[] layer_weights, bool save) -> (Tensor loss, Tensor layers, Tensor[] grad)",
    "elements_bwd(Tensor[] student, Tensor[] teacher, int[] feature_dim, int feature, Tensor[] mask, Tensor[] weight, "
    "int reduction, float[] layer_weights, Tensor upstream) -> Tensor[] grad",
    # one layer; the gradient is written over the student; reduction: per row, or their sum
    "elements_fwd_(Tensor(a!) student, Tensor teacher, int feature_dim, int feature, Tensor? mask, Tensor? weight, "
    "int reduction) -> Tensor loss",
    # maps [B, C, H, W], whose channels may differ in number
    "attention_fwd(Tensor student, Tensor teacher, float p, bool save) -> (Tensor loss, Tensor grad)",
    "attention_bwd(Tensor student, Tensor teacher, float p, Tensor upstream) -> Tensor grad",
    # x *= factor, of one element, for all x at once; nothing where it is 1, which is seen on the device
    "scale_(Tensor(a!)[] x, Tensor factor) -> ()",
)
_libraries = []  # a definition lasts as long as its library


def define(namespace):
    """Defines the ops once more, for another implementation. Here and not in C++: Triton's need no
    compiled library."""
    library = torch.library.Library(namespace, "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    return library


fastkd = define("fastkd")
fastkd.define("cpu_isa(str name) -> str")  # "?" only reads, "" chooses the best
fastkd.define("cpu_calls() -> str")  # _calls.digest() of the sources that a library was built from
fastkd.define("cuda_calls() -> str")
fastkd.define("cuda_code() -> str")  # "": the CUDA library has code for the current GPU; else why it has none
# matrix products, which torch has for every device: one implementation each, in ops/
# mask, weight: one per row
fastkd.define(
    "similarity_fwd(Tensor student, Tensor teacher, Tensor? mask, Tensor? weight, bool save) "
    "-> (Tensor loss, Tensor grad)"
)
# embeddings [N, D] or [B, N, D]; clamp: negative similarities of none, the teacher, both; mask, weight: one per row
fastkd.define(
    "gram_fwd(Tensor student, Tensor teacher, bool normalize, int clamp, Tensor? mask, Tensor? weight, bool save) "
    "-> (Tensor loss, Tensor grad)"
)

# embeddings [N, D]; mask, weight: one per row; strips: the namespace whose op computes each strip
fastkd.define(
    "pkt_fwd(Tensor student, Tensor teacher, float eps, Tensor? mask, Tensor? weight, str strips, bool save) "
    "-> (Tensor loss, Tensor grad)"
)
# who is similar to whom: labels, or the positives (0: the default) nearest to each row of the teacher; strips: the
# namespace whose op computes each strip; active: the share of triplets that have a loss
fastkd.define(
    "triplet_fwd(Tensor student, Tensor? teacher, Tensor? labels, int positives, float margin, Tensor? mask, "
    "Tensor? weight, str strips, bool save) -> (Tensor loss, Tensor active, Tensor grad)"
)
# embeddings [B, N, D_s], [B, N, D_t], their keys [B, M, *]: none, the rows themselves; what is said of rows is [B, N];
# exclude_self: key i from row i; rows: the namespace whose rows ops compute each strip of similarities
fastkd.define(
    "relation_kl_fwd(Tensor student, Tensor teacher, Tensor? student_keys, Tensor? teacher_keys, bool exclude_self, "
    "bool normalize, str rows, int divergence, float parameter, Tensor? parameter_rows, float temperature, "
    "Tensor? temperature_rows, float teacher_temperature, Tensor? teacher_temperature_rows, Tensor? mask, "
    "Tensor? key_mask, Tensor? weight, "
    "bool save, bool save_keys) -> (Tensor loss, Tensor grad, Tensor keys_grad)"
)

# the same on the CPU, of strips from the diagonal on, [n, N - row]: both orders of a pair at once; sums [N, 2]: += of
# exponentials, of student and teacher; then products become weights; see csrc/cpu/relation_kernel.h
_RELATION_STRIP = "Tensor here, float student_scale, float teacher_scale, int row"
fastkd.define(f"relation_sums(Tensor student, Tensor teacher, {_RELATION_STRIP}, Tensor(a!) sums) -> ()")
fastkd.define(
    f"relation_weights_(Tensor(a!) student, Tensor teacher, {_RELATION_STRIP}, Tensor student_inverse, "
    "Tensor teacher_inverse, Tensor difference, Tensor weight, Tensor scale) -> Tensor loss"
)

FOLDER = Path(__file__).parent / "lib"


def _load(name):
    """Loads a library of ops. Returns "" or the reason why it cannot be used."""
    path = FOLDER / name
    if not path.exists():
        return f"fastkd was installed without its compiled {'CUDA ' * ('cuda' in name)}kernels"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load in torch {torch.__version__}: {error}"
    calls = torch.ops.fastkd.cuda_calls if "cuda" in name else torch.ops.fastkd.cpu_calls
    try:
        built = calls()
    except NotImplementedError:  # it is older than this question
        built = ""
    if built != f"{_calls.digest()},{_divergences.digest()}":
        return f"{path.name} was built from other sources than fastkd's Python"
    return ""


def _load_cuda():
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return _load("libfastkd_cuda.so")


cpu_missing = _load("libfastkd_cpu.so")
cuda_missing = _load_cuda()
if cpu_missing:
    warnings.warn(
        f"{cpu_missing}; losses are computed by plain PyTorch, which is right but slow. "
        "Reinstalling with a C++ compiler at hand (pip install --no-build-isolation . in its sources) builds them.",
        RuntimeWarning,
        stacklevel=3,
    )
