import pytest
from support.local_model import LocalModel
from support.tiny_gguf import write_tiny


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "engine.gguf"
    return write_tiny(
        path, layers=5, experts=16, top_k=3, vocab=300, quant="Q4_K_M", attention_interval=3
    )


@pytest.fixture(scope="session")
def model(model_path):
    return LocalModel(model_path)


@pytest.fixture(scope="session")
def prompt():
    return [(7 * i * i + 3 * i + 11) % 300 for i in range(37)]
