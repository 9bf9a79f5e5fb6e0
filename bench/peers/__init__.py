"""What is measured side by side: fastkd's backends, and other libraries' losses.

A library is a module here: what it is called, how its losses are called from the inputs that all others
get, and where it cannot say anything, why not. What a loss needs done first (a log-softmax, say) is part
of it, and of its time. What cannot run is named in the tables with the reason.
"""

import functools
import importlib.metadata

from fastkd import _backend

from . import cut_cross_entropy, keops, liger, metric_learning, orda, torchdistill, torchtune, trl

LIBRARIES = (torchdistill, metric_learning, keops, liger, orda, cut_cross_entropy, trl, torchtune)


def first_line(error):
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def versions():
    """Of the libraries that are installed."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library.NAME] = importlib.metadata.version(library.PACKAGE)
        except importlib.metadata.PackageNotFoundError:
            found[library.NAME] = None
    return found


def peers(loss, device, held=0, most=float("inf"), work=0, **settings):
    """The libraries' losses by name, and of the others why not.

    Args:
        held: bytes that eager code holds, which makes every pair or triplet; a library that holds its share of these
            is left out where that is more than ``most``.
        work: N^2 D of pairs, of which a library may have a limit on the CPU.
        settings: what the makers of a loss take, such as its temperature.
    """
    found, missing = {}, {}
    installed = versions()
    for library in LIBRARIES:
        name = library.NAME
        if loss not in library.LOSSES:
            missing[name] = library.OTHERWISE
        elif installed[name] is None:
            missing[name] = f"{library.PACKAGE} is not installed"
        elif device not in library.DEVICES:
            missing[name] = library.ELSEWHERE
        elif library.HOLDS * held > most:
            missing[name] = f"would hold {library.HOLDS * held / 2**30:.0f} GiB"
        elif device == "cpu" and work > getattr(library, "MOST_WORK", work):
            missing[name] = f"left out on the CPU where N^2 D > {library.MOST_WORK:.1g}: its growth shows why"
        else:
            try:
                found[name] = library.LOSSES[loss](**settings)
            except Exception as error:  # whatever the import of somebody else's package may raise
                missing[name] = first_line(error)
    return found, missing


def own_backends(device):
    """Of fastkd, under the names that the tables have for them; and of the others why not."""
    if device == "cpu":
        return {"fastkd": "cpu"}, {}
    reasons = {f"fastkd {name}": _backend.unavailable(name) for name in ("cuda", "triton")}
    found = {name: name.split()[1] for name, reason in reasons.items() if not reason}
    return found, {name: reason for name, reason in reasons.items() if reason}


def with_backend(loss, backend):
    """The loss, computed by one of fastkd's backends; on the CPU that is the automatic choice."""
    if backend == "cpu":
        return loss

    @functools.wraps(loss)
    def chosen(*arguments):
        with _backend.backend(backend):
            return loss(*arguments)

    return chosen


def judge(found, missing, truth):
    """The errors of all that answer. What is not ours and fails is left out, with its reason."""
    errors = {}
    for provider in [p for p in found if p.answer]:
        try:
            errors[provider.name] = truth.errors(*provider.answer())
        except Exception as error:
            if provider.name.startswith("fastkd"):
                raise
            missing[provider.name] = first_line(error)
            found.remove(provider)
    return errors
