"""What is kept, by brute force, and that no half-removed checkpoint keeps its name."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.checkpoint import retention
from dsjax.checkpoint.config import CheckpointConfig

CONFIGS = st.builds(
    CheckpointConfig, keep_last=st.integers(1, 4), keep_best=st.integers(0, 4), keep_every=st.integers(0, 5)
)


@given(st.dictionaries(st.integers(0, 30), st.none() | st.integers(0, 5).map(float), max_size=12), CONFIGS)
def test_kept_is_what_the_rules_say_one_by_one(metrics, config):
    kept = retention.kept(metrics, config)
    for step, metric in metrics.items():
        newer = sum(other > step for other in metrics)
        better = sum(
            other is not None and (other < metric or (other == metric and at > step))
            for at, other in metrics.items()
            if metric is not None
        )
        by_rule = (
            newer < config.keep_last
            or (metric is not None and better < config.keep_best)
            or (config.keep_every > 0 and step % config.keep_every == 0)
        )
        assert (step in kept) == by_rule
    assert not metrics or max(metrics) in kept


def test_names_are_told_apart(tmp_path):
    names = ("step_00000100", "step_123456789", "step_7", "saving_1_step_00000200.orbax-checkpoint-tmp", "notes")
    for name in (*names, retention.unfinished_name(300, 2)):
        (tmp_path / name).mkdir()
    assert retention.committed(tmp_path) == [100, 123456789]
    assert retention.unfinished(tmp_path) == [200, 300]
    assert retention.committed(tmp_path / "none") == []


def test_a_removal_cut_short_leaves_no_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "step_00000100" / "state").mkdir(parents=True)

    def interrupted(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        for _ in range(2):  # and the name can be taken again
            with pytest.raises(KeyboardInterrupt):
                retention.remove(tmp_path, "step_00000100")
            assert retention.committed(tmp_path) == []
            (tmp_path / "step_00000100").mkdir()
    (tmp_path / "saving_1_step_00000300.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "saving_1_step_00000400").mkdir()
    (tmp_path / "saving_1_step_00000400.failed_1").touch()
    (tmp_path / "trash_talk").mkdir()
    retention.remove_rubbish(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000100", "trash_talk"]
