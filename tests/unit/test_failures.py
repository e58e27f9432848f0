"""How an error of a worker reaches the server."""

from __future__ import annotations

from llm_sidecar.errors import InvalidRequest, ModelUnavailable
from llm_sidecar.models.local.failures import error_of, failed


def test_an_invalid_request_keeps_its_field() -> None:
    sent = InvalidRequest("it is too long", field="prompt", exceeds_context=True)
    error = error_of(failed(1, sent), "phi3")
    assert isinstance(error, InvalidRequest)
    assert (error.detail, error.problem) == ("prompt: it is too long", "it is too long")
    assert (error.field, error.exceeds_context) == ("prompt", True)


def test_a_copy_for_one_request_keeps_the_field() -> None:
    error = InvalidRequest("it is too long", field="prompt").of_request(None, stored=False)
    assert (error.detail, error.field) == ("prompt: it is too long", "prompt")


def test_a_failure_of_the_model_is_no_invalid_request() -> None:
    error = error_of(failed(1, KeyError("a prompt")), "phi3")
    assert isinstance(error, ModelUnavailable)
    assert error.detail == "The phi3 model failed on this request (KeyError); see the log."
