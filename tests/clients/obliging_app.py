"""The served app, with a Hermes that follows its prompts.

It derives its answer from the last turn and the schema of the guidance, as a good model would:
numbers and quoted texts of the turn become the values.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any

from llm_sidecar.deadline import Deadline
from llm_sidecar.models.base import Completion, Delta, GenerationRequest, Models
from llm_sidecar.models.fake import FakeModel
from llm_sidecar.settings import Settings
from osiris.server import create_app
from tests.quick_app import QuickModel
from tests.unit.services.samples import WRITTEN


class ObligingModel(FakeModel):
    """Writes free text without guidance; with guidance, the JSON that the last turn requests."""

    async def stream(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        turn = str(request.messages[-1]["content"])
        text = "Good day."
        if request.guidance is not None:
            schema = json.loads(request.guidance)
            text = json.dumps(Answer(schema, turn).value(schema), ensure_ascii=False)
        written = Completion(text, "hermes/obliging", None, "stop", 20, 8)
        self.calls, self.answers = [], [written]
        async for delta in super().stream(request, deadline, allow_partial=allow_partial):
            yield delta


class Answer:
    """Values that follow a schema, taken from a text."""

    def __init__(self, schema: Mapping[str, Any], turn: str) -> None:
        self._schema = schema
        self._has_result = turn.startswith("Result of ")
        self._quoted = re.findall(r"'([^']+)'", turn)
        self._numbers = map(int, re.findall(r"\d+", turn))

    def value(self, schema: Mapping[str, Any]) -> Any:
        """A value that follows the schema; knows the keywords that the tests use."""
        if "$ref" in schema:
            return self.value(self._target(schema["$ref"]))
        if alternatives := schema.get("anyOf"):
            # The last alternative is text for tools, and null for a value that may be null.
            return self.value(alternatives[-1 if self._has_result else 0])
        if "enum" in schema:
            return schema["enum"][0]
        match schema.get("type"):
            case "object":
                return dict(self._members(schema))
            case "array":
                return [self.value(schema["items"])]
            case "integer" | "number":
                return next(self._numbers, 0)
            case "boolean":
                return True
        return self._quoted[0] if self._quoted else "cats"

    def _members(self, schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        if "properties" not in schema:
            yield from ((name, "cats") for name in self._quoted)
        for name, part in schema.get("properties", {}).items():
            yield name, self.value(part)

    def _target(self, pointer: str) -> Mapping[str, Any]:
        found: Any = self._schema
        for key in pointer.removeprefix("#/").split("/"):
            found = found[key]
        assert isinstance(found, Mapping)
        return found


app = create_app(Settings.from_environ(), Models(QuickModel(WRITTEN), ObligingModel()))
