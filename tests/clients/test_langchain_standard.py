"""LangChain's own tests of a chat model: those that need only text.

The model follows the instructions of the tests, which small models do not. `LEFT_OUT` lists the
other tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from tests.clients.sidecar import KEY, PYTHON
from tests.live_server import serve

TEXT_ONLY: Final = "hermes and phi3 read only text"
LEFT_OUT: Final = {
    "test_image_inputs": TEXT_ONLY,
    "test_image_tool_message": TEXT_ONLY,
    "test_pdf_inputs": TEXT_ONLY,
    "test_pdf_tool_message": TEXT_ONLY,
    "test_audio_inputs": TEXT_ONLY,
    "test_anthropic_inputs": "these are messages in the format of another API",
    "test_stream_time": "it replays recorded answers, without a server",
}


@pytest.fixture(scope="module")
def obliging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a sidecar whose Hermes follows its prompts."""
    folder = tmp_path_factory.mktemp("obliging")
    app = "tests.clients.obliging_app:app"
    with serve(folder, app=app, python=str(PYTHON), SIDECAR_API_KEYS=KEY) as server:
        yield f"{server.url}/v1"


@pytest.fixture(autouse=True)
def _leave_out(request: pytest.FixtureRequest) -> None:
    if reason := LEFT_OUT.get(request.node.originalname):
        pytest.skip(reason)


@pytest.mark.usefixtures("asked")
class TestHermes(ChatModelIntegrationTests):  # type: ignore[misc] # it has no types here
    """The tests of the base class."""

    url: str

    @pytest.fixture(scope="class")
    def asked(self, request: pytest.FixtureRequest, obliging: str) -> None:
        request.cls.url = obliging

    @property
    def chat_model_class(self) -> Any:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        asked = {"model": "hermes", "base_url": self.url, "api_key": KEY, "max_retries": 0}
        # With a base URL other than OpenAI's, it requests the usage of streams only if set.
        return {**asked, "stream_usage": True}

    @property
    def model_override_value(self) -> str:
        return "phi3"

    @property
    def supports_json_mode(self) -> bool:
        return True
