"""metrics.jsonl holds each step once after a resume, and nothing that was written is lost."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.checkpoint.metrics_log import truncate_metrics


def rows(steps):
    return "".join(json.dumps({"step": step, "loss": step / 7}) + "\n" for step in steps)


@settings(deadline=None, max_examples=40)
@given(steps=st.lists(st.integers(0, 20), max_size=20), last=st.integers(0, 20), torn=st.integers(0, 12))
def test_rows_up_to_the_checkpoint_stay(tmp_path_factory, steps, last, torn):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    old = rows(steps) + '{"step": 21,'[:torn]
    path.write_text(old)
    cut = truncate_metrics(path, last)
    assert path.read_text() == rows(step for step in steps if step <= last)
    assert cut == sum(step > last for step in steps) + (torn > 0)
    backup = path.with_name("metrics.jsonl.bak")
    assert backup.read_text() == old if cut else not backup.exists()
    assert truncate_metrics(path, last) == 0


def test_an_earlier_backup_is_never_overwritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for last in (5, 3, 1):
        path.write_text(rows(range(last + 1)))
        assert truncate_metrics(path, last - 1) == 1
    saved = {file.name: len(file.read_text().splitlines()) for file in tmp_path.iterdir()}
    assert saved == {"metrics.jsonl": 1, "metrics.jsonl.bak": 6, "metrics.jsonl.bak.1": 4, "metrics.jsonl.bak.2": 2}


def test_a_whole_last_row_without_newline_gets_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert truncate_metrics(path, 2) == 0
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_damaged_row_in_the_middle_is_named_and_nothing_changes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2"):
        truncate_metrics(path, 1)
    assert len(list(tmp_path.iterdir())) == 1
    assert truncate_metrics(tmp_path / "none.jsonl", 1) == 0
