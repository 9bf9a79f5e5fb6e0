import pytest

from .measure import machine


def pytest_addoption(parser):
    parser.addoption("--bench-device", default="cpu", choices=("cpu", "cuda"), help="where it is measured")
    parser.addoption(
        "--rounds", type=int, default=7, help="how often each provider is timed (small shapes: 4 times that)"
    )


@pytest.fixture
def rounds(request):
    return request.config.getoption("--rounds")


@pytest.fixture
def device(request):
    return request.config.getoption("--bench-device")


def pytest_generate_tests(metafunc):
    """A file's CASES are those of the device."""
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.CASES[metafunc.config.getoption("--bench-device")]
        metafunc.parametrize("case", cases, ids=["-".join(case) for case in cases])


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["fastkd"] = machine(config.getoption("--bench-device"))
