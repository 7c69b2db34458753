"""What evidence.py claims: python -m pytest notebooks"""

import shutil

import evidence
import npp
import numpy as np
import pytest

FASHION = evidence.ROOT / "data" / "fashion"
LINES = evidence.read_lines()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """data/fashion with few real images to compare with, a smaller model, results of its own"""
    folder = tmp_path / "small"
    shutil.copytree(FASHION, folder)
    full = np.load(FASHION / "reference.npz")
    np.savez(folder / "reference.npz", arr_0=full["arr_0"][:100], mu=full["mu"],
             sigma=full["sigma"])
    (tmp_path / "results.jsonl").touch()
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(evidence, "OUT", tmp_path / "out")
    monkeypatch.setattr(evidence, "SAMPLES", 20)
    monkeypatch.setattr(evidence, "FEW", 10)
    monkeypatch.setattr(evidence, "SWEEP", (1.0, 2.0))
    monkeypatch.setitem(npp.SIZES, "tiny", dict(n_layer=1, n_head=2, dim=16))
    return folder


def test_run_is_scored_once_and_continues(small, capsys):
    command = ["run", "--only", "2-1,constant_equal_cost", "--seeds", "7", "--steps", "4",
               "--data", str(small)]
    evidence.main(command)
    text = evidence.RESULTS.read_text()
    evidence.RESULTS.write_text(text.splitlines(keepends=True)[0])
    shutil.rmtree(next(evidence.OUT.glob("*_2-1_*")))
    evidence.main(command)
    assert not list(evidence.OUT.glob("*_2-1_*"))       # its line is there: not trained again
    assert evidence.RESULTS.read_text() == text         # the other one: from its checkpoint

    ours, equal = evidence.read_lines()
    assert [equal["steps"], equal["grid_steps"], equal["patches"]] == [3, 4, [1]]
    assert equal["cost"] / ours["cost"] == pytest.approx(3 / (4 * 82 / 130))
    assert [step for step, _ in ours["validation"]] == [1, 2, 3, 4]
    assert ours["best"]["n"] == 20
    assert ours.keys() - LINES[-1].keys() <= {"data"}
    capsys.readouterr()
    evidence.main(["report"])
    words = f"| 2-1 | --patches 2,1 | 0.631 | 1 | {ours['val_loss']:.3f} |"
    assert words in capsys.readouterr().out


def test_runs_of_older_programs_count_as_done(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "OUT", tmp_path)
    evidence.main(["run", "--only", "constant,plain,constant_2-1,2-1", "--seeds", "0,4"])
    evidence.main(["run", "--only", "constant_equal_cost", "--seeds", "1", "--lr", "4e-3"])
    assert not list(tmp_path.iterdir())
    assert evidence.read_lines() == LINES


def test_contrast_is_paired_by_seed_with_students_interval():
    a = {0: {"loss": 2.0}, 1: {"loss": 4.0}, 2: {"loss": 6.0}, 3: {"loss": 99.0}}
    b = {0: {"loss": 1.0}, 1: {"loss": 2.0}, 2: {"loss": 3.0}, 4: {"loss": -99.0}}
    # Deviation 1, three seeds. 4.303 is the 97.5 % quantile of t with two degrees of freedom.
    half = 4.302653 / 3**0.5
    expected = f"+2.000 ({2 - half:+.3f} to {2 + half:+.3f})"
    assert evidence.contrast({"a": a, "b": b}, {"a": 1, "b": -1}, "loss") == expected


def test_report_has_known_numbers(capsys):
    evidence.main(["report"])
    table = capsys.readouterr().out
    for words in (
            "| 3.612 ± 0.049 |", "k_times_0.3 | (2,1), lam 0.3, K times the images at p = 2 | 1.",
            "| plain | --patches 1 | 1.000 | 3 | 5.147 ± 0.040 | 3.754 ± 0.006 | 0.94 ± 0.06 |",
            "| schedule (plain) | -0.191 (-0.254 to -0.129) |",
            "| patches (constant_2-1) | +0.061 (-0.009 to +0.131) |",
            "| interaction | +0.101 (+0.038 to +0.164) |", "| total | -0.030 (-0.099 to +0.040) |",
            "| 4-2-1 | +0.054 (+0.026 to +0.082) |"):
        assert words in table
