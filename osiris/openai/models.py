"""`/v1/models`: the models and adapters that a request may name."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from llm_sidecar.input_model import Text
from llm_sidecar.services.served_models import ServedModel
from osiris.dependencies import CurrentSidecar
from osiris.openai.endpoint import openai_endpoint
from osiris.openai.schemas.models import Model, ModelList

router = APIRouter(tags=["openai"])


@openai_endpoint(
    router, "GET", "/v1/models", response_model=ModelList, response_description="The models"
)
async def list_models(sidecar: CurrentSidecar) -> ModelList:
    """The models and the adapters of phi3, whether in use or not."""
    return ModelList(data=[_shown(model) for model in await sidecar.served_models.list()])


@openai_endpoint(
    router,
    "GET",
    "/v1/models/{model}",
    404,
    422,
    response_model=Model,
    response_description="The model",
)
async def get_model(
    model: Annotated[
        Text,
        Path(description="the name of a model, as in the list of models", examples=["phi3"]),
    ],
    sidecar: CurrentSidecar,
) -> Model:
    """One model or adapter, whether in use or not."""
    return _shown(await sidecar.served_models.get(model))


def _shown(model: ServedModel) -> Model:
    return Model(id=model.name, created=model.created, parent=model.parent)
