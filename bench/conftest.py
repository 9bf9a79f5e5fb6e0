import pytest

from .measure import machine


def pytest_addoption(parser):
    parser.addoption(
        "--rounds", type=int, default=7, help="how often each provider is timed (small shapes: 4 times that)"
    )


@pytest.fixture
def rounds(request):
    return request.config.getoption("--rounds")


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["fastkd"] = machine()
