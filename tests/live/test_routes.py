"""The contract's endpoints, over HTTP against a running server."""

from __future__ import annotations

import json
import socket
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from llm_sidecar.grounding import ungrounded_fields
from llm_sidecar.proposals import MAX_COMPLETION_TOKENS, Proposal
from osiris.llm_client import Assessment, Done, LLMClient, Token
from osiris.llm_client import Proposal as StreamedProposal
from tests.in_process import in_process
from tests.live_server import LiveServer, serve

PROMPT = {"prompt": "Long ABC from 100, now 112.5, RSI 81."}
FEEDBACK = {"transaction_id": "t-1", "feedback_type": "rating", "feedback_content": "good"}
CORRECTED = {"ticker": "ABC", "action": "pass", "confidence": 0.5, "rationale": "Nothing to do."}


@pytest.fixture(scope="module")
def tight_server(
    random_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server with a queue of two, a short deadline and small bodies."""
    limits = {"QUEUE_LENGTH": "2", "REQUEST_TIMEOUT_SECONDS": "0.6", "MAX_BODY_BYTES": "4096"}
    folder = tmp_path_factory.mktemp("tight")
    with serve(folder, **random_models, **limits, PRELOAD_MODELS="true") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def empty_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server without models, and with a database that cannot be."""
    folder = tmp_path_factory.mktemp("empty")
    (folder / "file").write_text("in the way")
    with serve(
        folder, LANCEDB_URI=str(folder / "file" / "db"), REDIS_URL="redis://127.0.0.1:1/0"
    ) as s:
        yield s


def post(server: LiveServer, path: str, body: Any = None, **options: Any) -> httpx.Response:
    return server.client.post(path, json=body, **options)


# Every path, with and without its slash


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/generate", PROMPT),
        ("POST", "/generate/hermes", PROMPT),
        ("POST", "/generate/phi3", PROMPT),
        ("POST", "/propose_trade_adjustments", PROMPT),
        ("POST", "/score/hermes", {"proposal": CORRECTED}),
        ("POST", "/feedback/phi3", FEEDBACK),
        ("GET", "/examples", None),
        ("POST", "/adapters/swap", None),
        ("GET", "/health", None),
        ("GET", "/health/live", None),
        ("GET", "/health/ready", None),
    ],
)
def test_every_path_answers_directly(
    server: LiveServer, method: str, path: str, body: Any, slash: str
) -> None:
    response = server.client.request(method, path + slash, json=body)
    assert response.status_code == 200, response.text
    assert not response.history


# Generation


def test_generate_uses_hermes_by_default(server: LiveServer) -> None:
    response = post(server, "/generate/", {**PROMPT, "max_length": 5})
    assert list(response.json()) == ["generated_text"]
    assert response.headers["X-Model"].startswith("hermes/")
    assert "X-Grounded" not in response.headers
    assert int(response.headers["X-Completion-Tokens"]) <= 5


@pytest.mark.parametrize(
    ("query", "body"),
    [("", {"model_id": "phi3"}), ("?model_id=phi3", {}), ("?model_id=phi3", {"model_id": "phi3"})],
)
def test_generate_with_phi3_returns_the_proposal(
    server: LiveServer, query: str, body: dict[str, str]
) -> None:
    response = post(server, f"/generate/{query}", PROMPT | body)
    Proposal.model_validate(response.json())
    assert response.headers["X-Model"].startswith("phi3/")
    assert response.headers["X-Finish-Reason"] == "stop"
    assert int(response.headers["X-Prompt-Tokens"]) > 0
    assert 0 < int(response.headers["X-Completion-Tokens"]) <= MAX_COMPLETION_TOKENS
    missing = ungrounded_fields(response.json(), PROMPT["prompt"])
    # Random weights do not name the ticker of the prompt.
    assert missing[0] == "ticker"
    assert response.headers["X-Grounded"] == ",".join(missing)


def test_a_proposal_is_assessed_stored_and_scored(server: LiveServer) -> None:
    def scores() -> int:
        return max(int(health["num_hermes_scores_last_24h"]) for health in server.healths())

    before = scores()
    response = post(server, "/propose_trade_adjustments/", PROMPT)
    body = response.json()
    assert set(body) == {"transaction_id", "phi3_proposal", "hermes_assessment"}
    uuid.UUID(body["transaction_id"])
    Proposal.model_validate(body["phi3_proposal"])
    assert 0.0 <= float(response.headers["X-Hermes-Score"]) <= 1.0
    server.wait_until(lambda: scores() > before)
    means = [health["mean_hermes_score_last_24h"] for health in server.healths()]
    assert all(0.0 <= mean <= 1.0 for mean in means if mean is not None)


def test_a_proposal_and_its_critique_are_streamed(server: LiveServer) -> None:
    with LLMClient(server.url) as client:
        events = list(client.stream_propose_trade_adjustments(PROMPT["prompt"]))
    tokens = [event for event in events if isinstance(event, Token)]
    proposal, assessment, done = (event for event in events if not isinstance(event, Token))
    assert isinstance(proposal, StreamedProposal)
    assert isinstance(assessment, Assessment)
    assert isinstance(done, Done)
    written = [token.text for token in tokens if token.model == "phi3"]
    assert json.loads("".join(written)) == proposal.proposal == done.answer["phi3_proposal"]
    judged = "".join(token.text for token in tokens if token.model == "hermes")
    assert judged == assessment.text == done.answer["hermes_assessment"]
    assert done.headers["X-Hermes-Score"] == f"{assessment.score:.6f}"


def test_a_score_repeats_and_keeps_the_proposals_id(server: LiveServer) -> None:
    identifier = str(uuid.uuid4())
    body = {"proposal": {**CORRECTED, "id": identifier}, "context": "ABC is quiet."}
    first, second = (post(server, "/score/hermes/", body).json() for _ in range(2))
    assert first["proposal_id"] == identifier
    assert first["score"] == pytest.approx(second["score"], abs=1e-6)
    assert 0.0 <= first["score"] <= 1.0


def test_a_score_of_a_proposal_without_uuid_gets_one(server: LiveServer) -> None:
    response = post(server, "/score/hermes/", {"proposal": {**CORRECTED, "id": "seven"}})
    uuid.UUID(response.json()["proposal_id"])


def test_a_correction_is_an_example_for_the_next_proposal(server: LiveServer) -> None:
    transaction = post(server, "/propose_trade_adjustments/", PROMPT).json()["transaction_id"]
    before = int(post(server, "/generate/phi3", PROMPT).headers["X-Prompt-Tokens"])
    correction = {
        "transaction_id": transaction,
        "feedback_type": "correction",
        "feedback_content": {"why": "no reason to move"},
        "corrected_proposal": CORRECTED,
    }
    response = post(server, "/feedback/phi3/", correction)
    assert response.json()["transaction_id"] == transaction
    assert response.json()["message"].endswith("is an example for the next ones.")

    def is_an_example() -> bool:
        after = int(post(server, "/generate/phi3", PROMPT).headers["X-Prompt-Tokens"])
        return after > before + 20

    # Another sidecar learns of it within two seconds.
    server.wait_until(lambda: all(is_an_example() for _ in server.sidecars), 5)


def test_an_invalid_correction_is_stored_and_is_not_an_example(
    server: LiveServer,
) -> None:
    response = post(server, "/feedback/phi3/", FEEDBACK | {"corrected_proposal": {"ticker": "A"}})
    assert response.status_code == 200
    assert "not a valid proposal (action, confidence, rationale)" in response.json()["message"]


def test_the_message_says_that_a_correction_of_an_unknown_run_is_not_an_example(
    server: LiveServer,
) -> None:
    response = post(server, "/feedback/phi3/", FEEDBACK | {"corrected_proposal": CORRECTED})
    assert response.status_code == 200
    assert "is not an example, because" in response.json()["message"]


# Request ids


def test_a_request_id_is_echoed(server: LiveServer) -> None:
    response = server.client.get("/health", headers={"X-Request-ID": "order-77"})
    assert response.headers["X-Request-ID"] == "order-77"


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129])
def test_a_bad_request_id_is_replaced(server: LiveServer, sent: str) -> None:
    response = server.client.get("/health", headers={"X-Request-ID": sent})
    uuid.UUID(response.headers["X-Request-ID"])


# 422


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/generate/phi3/", {}, "prompt"),
        ("/generate/phi3/", {"prompt": ""}, "prompt"),
        ("/generate/phi3/", {"prompt": "  \n"}, "prompt"),
        ("/generate/phi3/", {"prompt": 7}, "prompt"),
        ("/generate/phi3/", {"prompt": "x" * 40_000}, "prompt"),
        ("/generate/hermes/", {"prompt": "価" * 9000}, "prompt"),
        ("/generate/phi3/", PROMPT | {"max_length": 0}, "max_length"),
        ("/generate/phi3/", PROMPT | {"max_length": "many"}, "max_length"),
        ("/generate/phi3/", PROMPT | {"max_length": 10}, "max_length"),
        ("/generate/phi3/", PROMPT | {"max_length": 10**9}, "max_length"),
        ("/generate/phi3/", PROMPT | {"temperature": 1}, "known ones are prompt, max_length"),
        ("/generate/", PROMPT | {"model_id": "gpt"}, "model_id"),
        ("/generate/?model_id=gpt", PROMPT, "model_id"),
        ("/generate/?model_id=hermes", PROMPT | {"model_id": "phi3"}, "model_id"),
        ("/propose_trade_adjustments/", {}, "prompt"),
        ("/propose_trade_adjustments/", PROMPT | {"max_length": 10}, "max_length"),
        ("/score/hermes/", {}, "proposal"),
        ("/score/hermes/", {"proposal": "buy"}, "proposal"),
        ("/score/hermes/", {"proposal": {}}, "proposal"),
        ("/feedback/phi3/", {}, "transaction_id"),
        ("/feedback/phi3/", FEEDBACK | {"feedback_type": "shout"}, "feedback_type"),
        ("/feedback/phi3/", FEEDBACK | {"feedback_content": 3}, "feedback_content"),
        ("/feedback/phi3/", FEEDBACK | {"timestamp": "noon"}, "timestamp"),
        ("/feedback/phi3/", FEEDBACK | {"corrected_proposal": "pass"}, "corrected_proposal"),
    ],
)
def test_bad_input_is_422_and_names_the_field(
    server: LiveServer, path: str, body: Any, field: str
) -> None:
    response = post(server, path, body)
    assert response.status_code == 422
    assert field in str(response.json()["detail"])


@pytest.mark.parametrize("body", [b"", b"{", b'{"prompt":"\xff"}', b'{"prompt":"\\ud800"}', b"[1]"])
def test_a_body_that_is_not_a_json_object_is_422(server: LiveServer, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = server.client.post("/generate/phi3/", content=body, headers=headers)
    assert response.status_code == 422
    assert response.json()["detail"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("feedback_content", '{"secret plan": NaN}'),
        ("feedback_content", '{"secret plan": 1e999}'),
        ("feedback_content", '{"a":' * 100 + '"secret plan"' + "}" * 100),
        ("corrected_proposal", '{"secret plan": -Infinity}'),
        ("timestamp", '"0001-01-01T00:00:00+05:00"'),
        ("timestamp", '"9999-12-31T23:59:59-05:00"'),
    ],
)
def test_feedback_that_cannot_be_stored_is_422_and_not_repeated(
    server: LiveServer, field: str, value: str
) -> None:
    body = json.dumps({name: given for name, given in FEEDBACK.items() if name != field})
    content = f'{body[:-1]}, "{field}": {value}}}'
    headers = {"Content-Type": "application/json"}
    response = server.client.post("/feedback/phi3/", content=content, headers=headers)
    assert response.status_code == 422, response.text
    assert field in str(response.json()["detail"])
    assert "secret plan" not in response.text + server.logged()


def test_a_422_does_not_repeat_the_input(server: LiveServer) -> None:
    response = post(server, "/generate/phi3/", {"prompt": 7, "secret-plan": "buy everything"})
    assert "everything" not in response.text


# 413, 429, 503, 504


def test_a_declared_large_body_is_413(tight_server: LiveServer) -> None:
    response = post(tight_server, "/generate/phi3/", {"prompt": "x" * 5000})
    assert response.status_code == 413
    assert "4096" in response.json()["detail"]


def test_a_chunked_large_body_is_413(tight_server: LiveServer) -> None:
    chunks = iter([b'{"prompt":"'] + [b"x" * 1000] * 8)
    headers = {"Content-Type": "application/json"}
    response = tight_server.client.post("/generate/phi3/", content=chunks, headers=headers)
    assert response.status_code == 413


def test_a_full_queue_is_429_and_the_deadline_cuts_the_others(tight_server: LiveServer) -> None:
    long = {**PROMPT, "max_length": 7900}

    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{tight_server.url}/generate/hermes/", json=long, timeout=30)

    count = 6 * len(tight_server.sidecars)
    with ThreadPoolExecutor(count) as pool:
        responses = list(pool.map(ask, range(count)))
    statuses = {response.status_code for response in responses}
    assert statuses == {429, 200}, [response.text for response in responses]
    for response in responses:
        if response.status_code == 200:
            assert response.headers["X-Finish-Reason"] == "deadline"
        else:
            assert int(response.headers["Retry-After"]) >= 1
            assert "queue is full" in response.json()["detail"]
    tight_server.wait_until(
        lambda: post(tight_server, "/generate/phi3/", PROMPT).status_code == 200, 20
    )


@pytest.mark.parametrize(
    ("path", "body", "variable"),
    [
        ("/generate/phi3/", PROMPT, "MICRO_LLM_MODEL_PATH"),
        ("/generate/hermes/", PROMPT, "HERMES_MODEL_PATH"),
        ("/propose_trade_adjustments/", PROMPT, "MICRO_LLM_MODEL_PATH"),
        ("/score/hermes/", {"proposal": CORRECTED}, "HERMES_MODEL_PATH"),
        ("/feedback/phi3/", FEEDBACK, "LANCEDB_URI"),
    ],
)
def test_a_missing_part_is_503_and_names_its_variable(
    empty_server: LiveServer, path: str, body: Any, variable: str
) -> None:
    response = post(empty_server, path, body)
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) >= 1
    assert variable in response.json()["detail"]


def test_health_is_200_and_names_what_is_wrong(empty_server: LiveServer) -> None:
    health = empty_server.wait_until(
        lambda: (
            (h := empty_server.client.get("/health").json())["database"]["state"] == "away" and h
        )
    )
    assert health["status"] == "error"
    assert health["phi3_loaded"] is health["hermes_loaded"] is False
    assert health["phi3_model_file_exists"] is False
    assert "HERMES_MODEL_PATH" in health["models"]["hermes"]["reason"]
    assert health["event_bus"]["connected"] is False
    ready = empty_server.client.get("/health/ready")
    assert ready.status_code == 503
    assert ready.json()["missing"] == ["phi3", "hermes", "database"]
    assert empty_server.client.get("/health/live").status_code == 200


def test_unknown_paths_and_methods_keep_the_shape_of_errors(server: LiveServer) -> None:
    assert server.client.get("/nothing").json() == {"detail": "Not Found"}
    response = server.client.get("/generate/phi3/")
    assert response.status_code == 405
    assert response.json()["detail"]


# Adapters


def test_swapping_without_adapters_succeeds(server: LiveServer) -> None:
    assert post(server, "/adapters/swap/").json() == {"status": "ok", "phi3_adapter_date": None}


async def test_a_broken_adapter_is_refused_and_the_model_still_answers(
    random_models: dict[str, str], tmp_path: Path
) -> None:
    adapter = tmp_path / "adapters" / "20260102"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    environ = random_models | {"PHI3_ADAPTER_DIR": str(adapter.parent)}
    async with in_process(tmp_path, **environ) as client:
        response = await client.post("/adapters/swap/")
        assert response.status_code == 409
        assert "20260102" in response.json()["detail"]
        assert (await client.post("/generate/phi3/", json=PROMPT)).status_code == 200
        assert (await client.get("/health")).json()["phi3_adapter_date"] is None


# Hanging up


@pytest.mark.parametrize("accept", ["*/*", "text/event-stream"])
def test_a_client_that_disconnects_stops_its_generation(server: LiveServer, accept: str) -> None:
    def tokens() -> int:
        return server.total("models", "hermes", "completion_tokens_total")

    before = tokens()
    host, port = server.url.removeprefix("http://").split(":")
    body = b'{"prompt":"count","max_length":7900}'
    head = b"POST /generate/hermes/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Accept: {accept}\r\n".encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        server.wait_until(lambda: tokens() > before, 10)

    def stands_still() -> bool:
        seen = tokens()
        threading.Event().wait(0.2)
        return tokens() == seen

    server.wait_until(stands_still, 1.0)
    assert tokens() < before + 7900
