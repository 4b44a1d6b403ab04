"""A run with a curriculum, random-LTD, 1-bit Adam, tensor parallelism and accumulation at once: killed and resumed, by
one process and by four.
"""

from pathlib import Path

import pytest
from e2e_runs import close_to, curve, interrupted, launch, once, outcome, rows, said, train, write_config

STEPS = 14
SETTINGS = {
    "mesh": {"data": 2, "fsdp": 1, "tensor": 2, "zero_stage": 0, "cpu_devices": 4},
    "model": {"num_layers": 3, "num_heads": 2, "segments": [1, 1, 1]},
    "data": {"sequence_length": 32},
    "curriculum": {
        "difficulty": [{"metric": "vocab_rarity", "min": 30, "schedule": {"kind": "fixed_root", "steps": 6}}],
        "length": {"min": 8, "schedule": {"kind": "fixed_linear", "steps": 8}},
    },
    "random_ltd": {"min_kept": 8, "quantum": 4, "steps": 12},
    "optimizer": {
        "kind": "onebit_adam", "freeze_step": 12, "learning_rate": 3e-3,
        "schedule": {"kind": "cosine", "warmup": 3, "decay_by": "tokens"},
    },
    "train": {"steps": STEPS, "accumulation": 2, "ema_decay": 0.0, "max_programs": 3},
    "evaluate": {"every": 7},
    "checkpoint": {"every": 4, "keep_every": 4},
    "sample": {"prompt": ""},
}  # fmt: skip


@pytest.fixture(scope="session")
def both(shared, texts) -> Path:
    """A folder with a config and its run. Not to be changed."""

    def make(folder: Path) -> None:
        folder.mkdir()
        train(write_config(folder / "config.yaml", texts, **SETTINGS), "--run-dir", folder / "run", "--force")

    return once(shared, "data_efficiency", make)


def test_what_is_recorded(both):
    found = rows(both / "run")
    assert [row["length"] for row in found] == [8 * min(4, 1 + 3 * (t + 1) // 8) for t in range(STEPS)]
    kept = [min(8 + 24 * t // 12 // 4 * 4, 32) for t in range(STEPS)]
    assert [row["kept"] for row in found] == [min(k, row["length"]) for k, row in zip(kept, found, strict=True)]
    tokens = [16 * ((row["length"] * 2 + row["kept"]) // 3) for row in found]
    assert [row["tokens"] for row in found] == [sum(tokens[: t + 1]) for t in range(STEPS)]
    difficulties = [row["difficulty"] for row in found]
    assert difficulties == sorted(difficulties) and difficulties[0] > 30 and difficulties[-1] == 100
    assert 0 < found[-1]["saving"] < found[0]["saving"] < 1
    waited = [row["step"] for row in found if "stall_seconds" in row]
    assert waited[0] == 1 and len(waited) <= 3
    assert len({(row["length"], row["kept"]) for row in found}) > 6


@pytest.mark.slow
def test_killed_and_resumed(both, tmp_path):
    resumed = interrupted(both / "run", tmp_path / "run", step=8)
    train(both / "config.yaml", "--run-dir", resumed, "--resume", "--force")
    assert curve(resumed) == curve(both / "run")
    assert outcome(resumed) == outcome(both / "run")


@pytest.mark.slow
def test_four_processes_go_on_with_the_same_batches(both, tmp_path):
    """Rows by difficulty, their lengths and the tokens that layers keep: losses tell if one batch were another."""
    resumed = interrupted(both / "run", tmp_path / "run", step=8)
    with launch(tmp_path, 4, "--", both / "config.yaml", "--run-dir", resumed, "--resume", "--force") as launcher:
        assert launcher.wait() == 0, said(tmp_path)
    assert "resumed from step 8 of" in said(tmp_path)
    close_to(resumed, both / "run")


@pytest.mark.slow
def test_two_processes_cut_rows_alike(texts, tmp_path, zygote):
    """Each process holds one of two rows: neither could tell the longest from its own."""
    config = write_config(
        tmp_path / "config.yaml", texts,
        mesh={"data": 2, "fsdp": 1, "zero_stage": 0, "cpu_devices": 2},
        model={"num_layers": 1, "num_heads": 2, "segments": [1]},
        data={"sequence_length": 128, "pack": "none"},
        curriculum={"cut_to_longest": True},
        train={"steps": 6, "batch_size": 2, "max_programs": 2, "ema_decay": 0.0},
        evaluate={"every": 0},
        checkpoint={"every": 0},
        sample={"prompt": ""},
    )  # fmt: skip
    life = zygote.train(config, "--run-dir", tmp_path / "one")
    assert life.wait() == 0, life.said
    with launch(tmp_path, 2, "--", config, "--run-dir", tmp_path / "two", "--force") as launcher:
        assert launcher.wait() == 0, said(tmp_path)
    assert len({row["length"] for row in rows(tmp_path / "one")}) > 1
    close_to(tmp_path / "two", tmp_path / "one")
