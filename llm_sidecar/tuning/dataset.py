"""Training data from corrections: chats for SFT, pairs for DPO.

`CHATS` gives the columns `prompt` and `completion`, `PAIRS` gives `prompt`, `chosen` and
`rejected`, each a list of chat messages: the conversational formats of TRL's SFT and DPO trainers
(https://huggingface.co/docs/trl/dataset_formats). The prompt is the chat with which the sidecar
asks Phi-3, so that training and serving agree.
"""

from __future__ import annotations

from typing import Any, Final

from llm_sidecar import proposals
from llm_sidecar.db.export import Content, Feedback, LeftOut, Record

_UNKNOWN: Final = "of an unknown transaction"
_INVALID: Final = "no valid proposal"
_NOTHING_TO_REJECT: Final = "without another proposal to reject"


def latest_corrections(feedback: list[Feedback]) -> list[Feedback]:
    """The latest correction of each transaction, oldest first.

    Args:
        feedback: oldest first.
    """
    latest: dict[str, Feedback] = {}
    for row in feedback:
        if row["corrected_proposal"]:
            # Removed first, so that the order is that of the latest corrections.
            latest.pop(row["transaction_id"], None)
            latest[row["transaction_id"]] = row
    return list(latest.values())


def chat(record: Record) -> dict[str, Any]:
    """A chat whose completion is the correction.

    Raises:
        LeftOut: the transaction is unknown, or the correction is not a valid proposal.
    """
    if record["prompt"] is None:
        raise LeftOut(_UNKNOWN)
    if not proposals.is_valid(record["corrected_proposal"]):
        raise LeftOut(_INVALID)
    return {
        "prompt": proposals.build_messages(record["prompt"]),
        "completion": _reply(record["corrected_proposal"]),
    }


def pair(record: Record) -> dict[str, Any]:
    """A chat with the correction as the chosen reply and the model's proposal as the rejected one.

    Raises:
        LeftOut: as `chat`, or the model's proposal is unknown or equal to the correction.
    """
    prompt, chosen = chat(record).values()
    rejected = _reply(record["proposal"] or {})
    if record["proposal"] is None or rejected == chosen:
        raise LeftOut(_NOTHING_TO_REJECT)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


CHATS: Final = Content(latest_corrections, chat, (_UNKNOWN, _INVALID))
PAIRS: Final = Content(latest_corrections, pair, (_UNKNOWN, _INVALID, _NOTHING_TO_REJECT))


def _reply(proposal: dict[str, Any]) -> list[dict[str, str]]:
    """The proposal as Phi-3 writes it: keys in the order of the guidance, null for a distance that
    the correction omits."""
    whole = {"new_stop_pct": None, "new_target_pct": None} | proposal
    text = proposals.dumps(proposals.in_order(whole) | whole)
    return [{"role": "assistant", "content": text}]
