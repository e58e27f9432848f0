"""docs/asyncapi.yaml is current and valid, and what is published fits it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator, FormatChecker

from llm_sidecar.cloud_event import CloudEvent
from llm_sidecar.db import Phi3FeedbackSchema
from llm_sidecar.models.base import ChoiceScores
from llm_sidecar.services.events import PAYLOADS, RECEIVED, cloud_event
from llm_sidecar.services.proposal_run import AssessedProposal
from tests import asyncapi
from tests.docs_tables import COMMAND, DOCS
from tests.unit.fakes import FakeSidecar, completion, last_of

DOCUMENT: dict[str, Any] = yaml.safe_load((DOCS / "asyncapi.yaml").read_text())
MESSAGES: dict[str, dict[str, Any]] = DOCUMENT["components"]["messages"]


def check(schema: dict[str, Any], value: Any) -> None:
    """Raises if a value does not fit a schema of the document."""
    whole = schema | {"components": DOCUMENT["components"]}
    Draft7Validator(whole, format_checker=FormatChecker()).validate(value)


def test_it_is_current() -> None:
    assert (DOCS / "asyncapi.yaml").read_text() == asyncapi.text(), f"run {COMMAND}"


def test_it_is_an_asyncapi_document() -> None:
    with warnings.catch_warnings():
        # Two of its fields have names that pydantic uses.
        warnings.filterwarnings("ignore", 'Field name "schema" in', UserWarning)
        from asyncapi3 import AsyncAPI3
    assert AsyncAPI3.model_validate(DOCUMENT).asyncapi == "3.0.0"


def test_every_reference_leads_somewhere() -> None:
    found = list(references(DOCUMENT))
    assert found
    for reference in found:
        at: Any = DOCUMENT
        for part in reference.removeprefix("#/").split("/"):
            at = at[part]


def references(node: Any) -> Iterator[str]:
    """Every `$ref` below a node."""
    if isinstance(node, dict):
        yield from (text for key, text in node.items() if key == "$ref")
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from references(child)


def test_every_schema_is_valid() -> None:
    for schema in DOCUMENT["components"]["schemas"].values():
        Draft7Validator.check_schema(schema)


@pytest.mark.parametrize("name", MESSAGES)
def test_every_message_has_an_example_that_fits(name: str) -> None:
    for example in MESSAGES[name]["examples"]:
        check(MESSAGES[name]["payload"], example["payload"])


def test_every_field_of_a_payload_is_described() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    assert [
        f"{name}.{key}"
        for name, schema in schemas.items()
        for key, field in schema["properties"].items()
        if not field.get("description")
    ] == []


def test_an_entry_of_the_stream_has_the_fields_of_a_cloud_event() -> None:
    event = CloudEvent("t", "{}", source="/s", dataschema="d", traceparent="00-1-2-01")
    assert asyncapi.CLOUD_EVENT["properties"].keys() == event.fields().keys()
    without = CloudEvent("t", "{}", source="/s", dataschema="d")
    assert set(asyncapi.CLOUD_EVENT["required"]) == without.fields().keys()


@pytest.mark.parametrize("channel", PAYLOADS)
def test_the_dataschema_of_an_event_is_its_schema(channel: str) -> None:
    model = PAYLOADS[channel]
    example = MESSAGES[model.__name__]["examples"][0]["payload"]
    event = cloud_event(model.model_validate_json(json.dumps(example)))
    page, _, pointer = event.dataschema.partition("#")
    assert page == "docs/asyncapi.yaml"
    assert pointer == f"/components/schemas/{model.__name__}"
    check(MESSAGES[f"{model.__name__}Entry"]["payload"], event.fields())


def test_the_inbox_takes_the_example() -> None:
    entry = MESSAGES["InboxEntry"]["examples"][0]["payload"]
    RECEIVED[entry["type"]].model_validate_json(entry["data"])


async def test_what_the_sidecar_publishes_fits() -> None:
    proposal = {"ticker": "A", "action": "adjust", "side": "LONG", "confidence": 0.5}
    proposal |= {"new_stop_pct": 1.0, "new_target_pct": 2.0, "rationale": "So."}
    fake_sidecar = FakeSidecar()
    fake_sidecar.phi3.answers = [completion(json.dumps(proposal))]
    fake_sidecar.hermes.answers = [
        completion("Fine."),
        ChoiceScores({str(n): 0.1 for n in range(11)}),
    ]
    await last_of(
        fake_sidecar.sidecar.orchestrator.propose("Long A.", 256, None, fake_sidecar.attempt()),
        AssessedProposal,
    )
    await fake_sidecar.sidecar.feedback.submit(
        Phi3FeedbackSchema(transaction_id="t", feedback_type="rating", feedback_content="5"),
        None,
        fake_sidecar.attempt(),
    )
    published = fake_sidecar.happened.of("event")
    assert {channel for channel, _ in published} == PAYLOADS.keys() - {"phi3.adapter.swapped"}
    for channel, payload in published:
        check(MESSAGES[PAYLOADS[channel].__name__]["payload"], payload)
