"""The command `export`: feedback, and training data from it."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any, Final

import pytest

from llm_sidecar import proposals
from llm_sidecar.db import (
    FeedbackWithdrawalSchema,
    OrchestratorRunSchema,
    Phi3FeedbackSchema,
    ProposalSchema,
    Store,
    cli_main,
    export,
)
from llm_sidecar.db.store import AnyRow
from tests.test_db import HOSTILE, NOW, PROPOSAL, feedback, run

PROPOSED: Final = {
    "ticker": "ABC",
    "action": "adjust",
    "side": "LONG",
    "new_stop_pct": 2.5,
    "new_target_pct": 5.0,
    "confidence": 0.75,
    "rationale": "Volume is thin.",
}
CORRECTED: Final = PROPOSED | {"action": "pass", "new_stop_pct": None}
CORRECTED_TEXT: Final = (
    '{"ticker":"ABC","action":"pass","side":"LONG","new_stop_pct":null,"new_target_pct":5.0,'
    '"confidence":0.75,"rationale":"Volume is thin."}'
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LANCEDB_URI", str(tmp_path / "db"))
    return tmp_path / "db"


def fill(folder: Path, *rows: AnyRow) -> None:
    async def append() -> None:
        store = await Store.open(folder)
        await asyncio.gather(*map(store.append, rows))
        # A query moves the logged rows at once; closing takes longer.
        await store.last("proposals", 1)
        await store.close()

    asyncio.run(append())


def proposed(name: str = "t-1", **changes: Any) -> ProposalSchema:
    ours = {"transaction_id": name, "prompt": f"Prompt of {name}", "proposal": PROPOSED}
    return ProposalSchema(**PROPOSAL | ours | changes)


def corrected(
    name: str = "t-1", proposal: dict[str, Any] = CORRECTED, minutes: float = 0, **changes: Any
) -> Phi3FeedbackSchema:
    return feedback(
        transaction_id=name,
        feedback_type="correction",
        corrected_proposal=proposal,
        timestamp=NOW + datetime.timedelta(minutes=minutes),
        **changes,
    )


def exported(
    capsys: pytest.CaptureFixture[str], kind: str, *arguments: str
) -> tuple[list[dict[str, Any]], str]:
    """Runs an export; returns the lines on standard output, and standard error."""
    capsys.readouterr()
    assert cli_main(["export", "--format", kind, *arguments]) == 0
    output = capsys.readouterr()
    # Not splitlines: a hostile text may contain line separators of Unicode.
    return [json.loads(line) for line in output.out.split("\n")[:-1]], output.err


def replies(rows: list[dict[str, Any]], column: str = "completion") -> list[Any]:
    return [json.loads(row[column][0]["content"]) for row in rows]


def test_sft_writes_conversational_prompts_and_completions(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(folder, proposed(), corrected())
    rows, message = exported(capsys, "sft")
    assert rows == [
        {
            "prompt": [
                {"role": "system", "content": proposals.SYSTEM_PROMPT},
                {"role": "user", "content": "Prompt of t-1"},
            ],
            "completion": [{"role": "assistant", "content": CORRECTED_TEXT}],
        }
    ]
    assert message == "1 rows\n"


def test_dpo_writes_conversational_preferences_with_an_explicit_prompt(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(folder, proposed(), corrected())
    (row,), message = exported(capsys, "dpo")
    assert row == {
        "prompt": [
            {"role": "system", "content": proposals.SYSTEM_PROMPT},
            {"role": "user", "content": "Prompt of t-1"},
        ],
        "chosen": [{"role": "assistant", "content": CORRECTED_TEXT}],
        "rejected": [{"role": "assistant", "content": proposals.dumps(PROPOSED)}],
    }
    assert message == "1 rows\n"


def test_a_completion_is_written_as_the_guidance_requires(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A correction may omit fields and have them in any order."""
    short = {key: CORRECTED[key] for key in ("rationale", "confidence", "action", "ticker")}
    fill(folder, proposed(), corrected(proposal=short))
    (row,), _ = exported(capsys, "sft")
    assert row["completion"][0]["content"] == (
        '{"ticker":"ABC","action":"pass","new_stop_pct":null,"new_target_pct":null,'
        '"confidence":0.75,"rationale":"Volume is thin."}'
    )


def test_jsonl_writes_all_feedback_oldest_first_with_its_transaction(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(
        folder,
        proposed(),
        corrected(minutes=2).written_by("desk"),
        feedback(),
        feedback(transaction_id="unknown", timestamp=NOW + datetime.timedelta(minutes=1)),
    )
    rows, _ = exported(capsys, "jsonl")
    rating = {
        "transaction_id": "t-1",
        "timestamp": NOW.isoformat(),
        "feedback_type": "rating",
        "feedback_content": "good",
        "corrected_proposal": None,
        "author": None,
        "prompt": "Prompt of t-1",
        "proposal": PROPOSED,
        "assessment": "Fine.",
        "score": 0.5,
        "answer_mass": None,
    }
    unknown = {"prompt": None, "proposal": None, "assessment": None, "score": None}
    assert rows[0] == rating
    assert rows[1] == rating | unknown | {
        "transaction_id": "unknown",
        "timestamp": "2026-01-02T03:05:05.678901+00:00",
    }
    assert rows[2] == rating | {
        "feedback_type": "correction",
        "timestamp": "2026-01-02T03:06:05.678901+00:00",
        "corrected_proposal": CORRECTED,
        "author": "desk",
    }


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_latest_correction_of_a_transaction_is_exported(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    fill(folder, proposed(), corrected(proposal=CORRECTED | {"confidence": 0.5}, minutes=9))
    fill(folder, corrected(minutes=1), feedback(timestamp=NOW + datetime.timedelta(hours=1)))
    rows, _ = exported(capsys, kind)
    column = "completion" if kind == "sft" else "chosen"
    assert [proposal["confidence"] for proposal in replies(rows, column)] == [0.5]


def test_examples_are_in_the_order_of_the_latest_corrections(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(folder, proposed("a"), proposed("b"), corrected("a"), corrected("b", minutes=1))
    fill(folder, corrected("a", minutes=2))
    rows, _ = exported(capsys, "sft")
    assert [row["prompt"][-1]["content"] for row in rows] == ["Prompt of b", "Prompt of a"]


def test_corrections_without_an_example_are_counted_by_reason(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reordered = dict(reversed(PROPOSED.items()))
    fill(
        folder,
        corrected("unknown-1"),
        corrected("unknown-2"),
        proposed("invalid"),
        corrected("invalid", {"ticker": "ABC"}),
        proposed("equal"),
        corrected("equal", reordered),
        run(run_id="failed", final_output="", status="error"),
        corrected("failed"),
        proposed("good"),
        corrected("good", minutes=1),
    )
    rows, message = exported(capsys, "sft")
    assert len(rows) == 3
    assert message == "3 rows; left out: 2 of an unknown transaction, 1 no valid proposal\n"
    rows, message = exported(capsys, "dpo")
    assert [row["prompt"][-1]["content"] for row in rows] == ["Prompt of good"]
    assert message == (
        "1 rows; left out: 2 of an unknown transaction, 1 no valid proposal, "
        "2 without another proposal to reject\n"
    )


def test_withdrawn_feedback_is_left_out_and_counted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    better = CORRECTED | {"confidence": 0.5}
    fill(
        folder,
        proposed("a"),
        proposed("b"),
        corrected("a", feedback_id="older"),
        corrected("a", better, minutes=1, feedback_id="newer"),
        corrected("b", minutes=2, feedback_id="only"),
        feedback(feedback_id="rating"),
        *(
            FeedbackWithdrawalSchema(feedback_id=name, transaction_id="any")
            for name in ("newer", "only", "rating")
        ),
    )
    rows, message = exported(capsys, "sft")
    assert replies(rows) == [CORRECTED]
    assert message == "1 rows; left out: 3 withdrawn\n"
    assert replies(exported(capsys, "dpo")[0], "chosen") == [CORRECTED]
    assert [row["corrected_proposal"] for row in exported(capsys, "jsonl")[0]] == [CORRECTED]


def test_a_correction_that_omits_a_null_of_the_proposal_is_equal_to_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {key: value for key, value in CORRECTED.items() if value is not None}
    fill(folder, proposed(proposal=CORRECTED), corrected(proposal=short))
    assert exported(capsys, "dpo")[0] == []


def test_the_proposal_of_a_run_without_a_stored_proposal_is_read_from_its_output(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = {"proposal": PROPOSED, "assessment": "Bold.", "score": 0.25}
    fill(
        folder,
        OrchestratorRunSchema(
            run_id="old",
            input_query="Old prompt",
            final_output=json.dumps(output),
            status="success",
        ),
        corrected("old"),
    )
    (row,), _ = exported(capsys, "dpo")
    assert row["prompt"][-1]["content"] == "Old prompt"
    assert replies([row], "rejected") == [PROPOSED]
    (row,), _ = exported(capsys, "jsonl")
    assert (row["prompt"], row["assessment"], row["score"]) == ("Old prompt", "Bold.", 0.25)


def test_an_unreliable_score_is_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = {"proposal": PROPOSED, "assessment": "Bold."}
    unreliable = {"score": 0.25, "answer_mass": 0.125, "score_reliable": False}
    fill(
        folder,
        run(run_id="run", final_output=json.dumps(output | unreliable)),
        proposed("a", **unreliable),
        proposed("b", **unreliable | {"answer_mass": 0.75, "score_reliable": True}),
        proposed("c", score=0.25),
        *(corrected(name) for name in ("run", "a", "b", "c")),
    )
    rows, _ = exported(capsys, "jsonl")
    assert {row["transaction_id"]: (row["score"], row["answer_mass"]) for row in rows} == {
        "run": (None, 0.125),
        "a": (None, 0.125),
        "b": (0.25, 0.75),
        "c": (0.25, None),
    }


@pytest.mark.parametrize("output", ["", "[]", "{", '{"proposal":"none"}', "null"])
def test_a_run_without_a_proposal_is_exported_for_sft_only(
    folder: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    fill(folder, run(final_output=output), corrected("r-1"))
    assert replies(exported(capsys, "sft")[0]) == [CORRECTED]
    assert exported(capsys, "dpo")[0] == []


@pytest.mark.parametrize(
    ("since", "names"),
    [
        ("2026-01-02T03:04:05.678901Z", ["0", "1"]),
        ("2026-01-02T03:04:06", ["1"]),
        ("24h", ["now"]),
    ],
)
def test_since_excludes_earlier_feedback(
    folder: Path, capsys: pytest.CaptureFixture[str], since: str, names: list[str]
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    recent = feedback(transaction_id="now", corrected_proposal=CORRECTED, timestamp=now)
    fill(folder, *map(proposed, ("old", "0", "1", "now")))
    fill(folder, corrected("old", minutes=-1), corrected("0"), corrected("1", minutes=1), recent)
    rows, _ = exported(capsys, "sft", "--since", since)
    found = [row["prompt"][-1]["content"].removeprefix("Prompt of ") for row in rows]
    assert found == names if since == "24h" else found == [*names, "now"]


@pytest.mark.parametrize("kind", ["sft", "dpo", "jsonl"])
def test_hostile_texts_are_exported_unchanged(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    texts = [*HOSTILE, "\u2028 and \u2029 end lines for some"]
    corrections = [CORRECTED | {"rationale": text, "ticker": text} for text in texts]
    fill(
        folder,
        *(proposed(text, prompt=text) for text in texts),
        *(corrected(t, c, n) for n, (t, c) in enumerate(zip(texts, corrections, strict=True))),
    )
    rows, _ = exported(capsys, kind)
    if kind == "jsonl":
        assert [row["transaction_id"] for row in rows] == texts
        assert [row["prompt"] for row in rows] == texts
        assert [row["corrected_proposal"]["rationale"] for row in rows] == texts
    else:
        assert [row["prompt"][-1]["content"] for row in rows] == texts
        chosen = replies(rows, "completion" if kind == "sft" else "chosen")
        assert [proposal["rationale"] for proposal in chosen] == texts


@pytest.mark.parametrize("text", ["\ud800", "\x00 and \x0b and \u0085"])
def test_an_invalid_text_in_a_correction_does_not_break_an_export(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """Older versions stored such strings, and JSON can contain them."""
    spoiled = CORRECTED | {"rationale": text}
    fill(folder, proposed(), corrected().model_copy(update={"corrected_proposal": spoiled}))
    out = tmp_path / "out.jsonl"
    assert cli_main(["export", "--format", "jsonl", "--out", str(out)]) == 0
    (line,) = out.read_text("utf-8").split("\n")[:-1]
    assert json.loads(line)["corrected_proposal"] == spoiled
    assert exported(capsys, "sft")[1] == "0 rows; left out: 1 no valid proposal\n"


def test_transactions_are_read_in_several_queries(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_AT_ONCE", 3)
    names = [f"t-{number}" for number in range(10)]
    fill(folder, *map(proposed, names))
    fill(folder, *(corrected(name, minutes=number) for number, name in enumerate(names)))
    rows, _ = exported(capsys, "sft")
    assert [row["prompt"][-1]["content"] for row in rows] == [f"Prompt of {n}" for n in names]


def test_a_database_without_feedback_has_an_empty_export(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(folder, proposed())
    assert exported(capsys, "sft") == ([], "0 rows\n")


def test_datasets_loads_an_export(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    cache = tmp_path / "cache"
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(cache))
    from datasets import load_dataset

    fill(folder, proposed("t-1"), proposed("t-2"), corrected("t-1"), corrected("t-2", minutes=1))
    columns = {"sft": ["prompt", "completion"], "dpo": ["prompt", "chosen", "rejected"]}
    for kind, names in columns.items():
        file = tmp_path / f"{kind}.jsonl"
        assert cli_main(["export", "--format", kind, "--out", str(file)]) == 0
        loaded = load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
        assert loaded.column_names == names
        assert [row["prompt"][-1]["content"] for row in loaded] == [
            "Prompt of t-1",
            "Prompt of t-2",
        ]
        for name in names:
            assert {key for message in loaded[0][name] for key in message} == {"role", "content"}


# Files


def test_a_file_replaces_an_older_one_and_no_other_file_is_left(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(folder, proposed(), corrected())
    out = tmp_path / "out" / "train.jsonl"
    out.parent.mkdir()
    out.write_text("old")
    rows, message = exported(capsys, "sft", "--out", str(out))
    assert (rows, message) == ([], "1 rows\n")
    assert json.loads(out.read_text())["completion"]
    assert list(out.parent.iterdir()) == [out]


def test_a_file_has_the_permissions_of_the_umask(folder: Path, tmp_path: Path) -> None:
    fill(folder, proposed())
    before = os.umask(0o027)
    try:
        assert cli_main(["export", "--format", "sft", "--out", str(tmp_path / "new")]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("missing/train.jsonl", "No such file or directory"),
        ("file/train.jsonl", "Not a directory"),
        ("folder", "Is a directory"),
    ],
)
def test_an_unwritable_path_is_reported_on_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, why: str
) -> None:
    fill(folder, proposed(), corrected())
    (tmp_path / "file").write_text("as it was")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"), key=str)
    capsys.readouterr()
    assert cli_main(["export", "--format", "sft", "--out", str(tmp_path / where)]) == 1
    assert capsys.readouterr().err == f"{tmp_path / where} cannot be written: {why}\n"
    outside = [path for path in before if folder not in path.parents]
    after = sorted(tmp_path.rglob("*"), key=str)
    assert [path for path in after if folder not in path.parents] == outside
    assert (tmp_path / "file").read_text() == "as it was"


def test_a_full_disk_is_reported_on_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A device of this test, so that a defect cannot replace the real /dev/full.
    full = tmp_path / "full"
    try:
        os.mknod(full, stat.S_IFCHR | 0o600, os.makedev(1, 7))
        full.open("rb").close()
    except PermissionError:
        pytest.skip("no device may be made here")
    fill(folder, proposed(), corrected())
    capsys.readouterr()
    assert cli_main(["export", "--format", "sft", "--out", str(full)]) == 1
    assert capsys.readouterr().err == f"{full} cannot be written: No space left on device\n"
    assert full.is_char_device()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_reported_on_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(folder, proposed())
    locked = tmp_path / "locked"
    locked.mkdir(0o500)
    capsys.readouterr()
    assert cli_main(["export", "--format", "sft", "--out", str(locked / "out")]) == 1
    assert "Permission denied" in capsys.readouterr().err


def test_a_file_is_unchanged_if_the_database_fails_halfway(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "_AT_ONCE", 1)
    out = tmp_path / "out" / "train.jsonl"
    out.parent.mkdir()
    out.write_text("as it was")
    fill(folder, proposed("t-1"), corrected("t-1"))
    fill(folder, proposed("t-2"), corrected("t-2", minutes=1))
    newest = max(
        (folder / "proposals.lance" / "data").iterdir(), key=lambda path: path.stat().st_mtime_ns
    )
    newest.write_bytes(b"x" * newest.stat().st_size)
    capsys.readouterr()
    assert cli_main(["export", "--format", "sft", "--out", str(out)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert out.read_text() == "as it was"
    assert list(out.parent.iterdir()) == [out]


def test_the_target_of_a_link_is_replaced(folder: Path, tmp_path: Path) -> None:
    fill(folder, proposed(), corrected())
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert cli_main(["export", "--format", "sft", "--out", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "target").read_text())["prompt"]


def test_a_pipe_is_written_to_directly(folder: Path, tmp_path: Path) -> None:
    fill(folder, proposed(), corrected())
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    assert cli_main(["export", "--format", "sft", "--out", str(pipe)]) == 0
    assert pipe.is_fifo()
    reader.join(30)
    assert json.loads(got[0])["prompt"]


def test_without_a_database_no_file_is_created(folder: Path, tmp_path: Path) -> None:
    assert cli_main(["export", "--format", "sft", "--out", str(tmp_path / "out")]) == 1
    assert list(tmp_path.iterdir()) == []
