"""The rule of the score, and Hermes' lessons."""

from __future__ import annotations

import pytest

from llm_sidecar import hermes_plugin
from llm_sidecar.models.files import DEMO_DIR
from llm_sidecar.models.prompts import read_prompts
from training.demo_models import judgement


@pytest.mark.parametrize(
    ("stop", "target", "points"), [(2, 2, 5), (1, 4, 10), (4, 1, 0), (2, 4, 7.5)]
)
def test_the_score_grows_with_reward_to_risk(stop: float, target: float, points: float) -> None:
    proposal = {"new_stop_pct": stop, "new_target_pct": target}
    assert judgement.score(proposal, fits=True) == pytest.approx(points)
    assert judgement.score(proposal, fits=False) == pytest.approx(max(0, points - 3))


def test_hermes_lessons_use_the_prompts_that_the_model_carries() -> None:
    assert read_prompts(DEMO_DIR / "hermes") == judgement.PROMPTS
    teach = judgement.curriculum(1)
    chats = [teach(1.0).messages for _ in range(200)]
    whole = [chat for chat in chats if chat[0]["role"] == "system"]
    assert len(whole) > 100
    tasks = set()
    for chat in whole:
        assert chat[0]["content"] == judgement.PROMPTS.system
        tasks.add(chat[1]["content"].rpartition("\n\n")[2])
        if chat[1]["content"].endswith(judgement.PROMPTS.score_task):
            assert chat[-1]["content"] in hermes_plugin.SCORE_ANSWERS
    assert {judgement.PROMPTS.score_task, judgement.PROMPTS.critique_task} <= tasks
