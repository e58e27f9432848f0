"""Trains the two demo models that ship in `llm_sidecar/demo/`; its MODEL_CARD.md describes them.

`recipe` is the entry point of both. `market` draws synthetic prompts with the right proposal for
each, `proposal_lessons` and `judgement` make training chats of them, and `trainer` trains on those.
`held_out` draws the cases that `llm_sidecar.demo.evaluate` measures the models on.
"""
