"""torchdistill: a framework of training recipes; its losses take dictionaries of modules' outputs."""

NAME, PACKAGE = "torchdistill", "torchdistill"
DEVICES, ELSEWHERE = ("cpu", "cuda"), ""
HOLDS = 1.0
OTHERWISE = "has no such loss"


def _of_outputs(loss):
    return lambda student, teacher: loss({"x": {"output": student}}, {"x": {"output": teacher}})


def _kl_div(temperature):
    from torchdistill.losses.mid_level import KDLoss

    loss = _of_outputs(KDLoss("x", "output", "x", "output", temperature, alpha=0, reduction="batchmean"))
    return lambda student, teacher: loss(student, teacher) * temperature**2


def _rkd(distance, angle):
    def make():
        from torchdistill.losses.mid_level import RKDLoss

        return _of_outputs(RKDLoss("x", "x", distance, angle, "mean"))

    return make


def _similarity_preserving():
    from torchdistill.losses.mid_level import SPKDLoss

    return _of_outputs(SPKDLoss("x", "x", "batchmean"))


def _pkt():
    from torchdistill.losses.mid_level import PKTLoss

    return _of_outputs(PKTLoss("x", "output", "x", "output"))


def _attention_transfer():
    from torchdistill.losses.mid_level import ATLoss

    where = {"io": "output", "path": "x"}
    loss = _of_outputs(ATLoss({"pair": {"student": where, "teacher": where}}, mode="code"))
    return lambda students, teachers: loss(students[0], teachers[0])


LOSSES = {
    "kl_div": _kl_div,
    "rkd_distance": _rkd(1.0, 0.0),
    "rkd_angle": _rkd(0.0, 1.0),
    "rkd_loss": _rkd(25.0, 50.0),
    "similarity_preserving": _similarity_preserving,
    "pkt": _pkt,
    "attention_transfer": _attention_transfer,
}
