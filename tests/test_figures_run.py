# SPDX-License-Identifier: MIT
"""Figures of a run: what is drawn is what the log says, and the command that draws them."""

import json
import math

import numpy as np
import pytest
import torch
from drawn import is_whole
from refusals import refused

from dsv2_ref import figures
from dsv2_ref.__main__ import main
from dsv2_ref.config import TINY


def log(n=60, skipped=(), batch_from=4, layers=2):
    entries = []
    for i in range(n):
        entry = {"step": i + 1, "tokens": 100 * (i + 1), "language": 5 - i / 20,
                 "gradient_norm": 2.0 + i / n, "lr": 1e-3 * (1 - i / n),
                 "batch": max(batch_from, i), "expert": 0.1, "device": 0.1,
                 "communication": 0.1, "seconds": 0.5 * (i + 1)}
        if i in skipped:
            entry |= {"skipped": True, "gradient_norm": math.nan, "language": math.nan}
        if i % 20 == 0:
            entry |= {"expert_load": [[6, 2, 2, 2]] * (layers - 1) + [[1, 1, 1, 3 + i]],
                      "gate_entropy": [1.2] * (layers - 1) + [0.8 - i / 100],
                      "dropped": [0.0] * layers}
        entries.append(entry)
    return entries


LIVES = [{"first": 1, "last": 9, "states": [4, 8]}, {"first": 9, "last": 14, "states": [12]},
         {"first": 13, "last": 20, "states": [16, 20]}]
DRAW = {
    "gradient_norm": lambda: figures.gradient_norm(log()),
    "gradient_norm, skipped": lambda: figures.gradient_norm(log(skipped=(5, 30))),
    "gradient_norm, one entry": lambda: figures.gradient_norm(log(1)),
    "rate_curve": lambda: figures.rate_curve(log()),
    "rate_curve, one batch": lambda: figures.rate_curve(log(batch_from=99)),
    "balance_curves": lambda: figures.balance_curves(log(), first_layer=1),
    "balance_curves, many layers": lambda: figures.balance_curves(log(layers=26)),
    "run_lives": lambda: figures.run_lives(LIVES, 20),
    "run_lives, one": lambda: figures.run_lives(LIVES[:1], 20),
    "resume_gaps": lambda: figures.resume_gaps(
        [6, 7, 8], {"whole state": [0, 0, 0], "without moments": torch.tensor([0, 0.1, -0.2])}),
    "saving_cost": lambda: figures.saving_cost(
        [1, 10, 100], [0.3, 0.05, 0.2], {10: 0.06, 100: 0.2}),
}
TITLES = {
    "gradient_norm": ["Gradient norm: 2.5 in the median, no step skipped"],
    "gradient_norm, skipped": ["Gradient norm: 2.5 in the median, 2 of 60 steps skipped"],
    "rate_curve": ["Rate: 0.001 at step 1, 1.7e-05 at the end", "Batch: 4 to 59 sequences"],
    "rate_curve, one batch": ["Rate: 0.001 at step 1, 1.7e-05 at the end"],
    "balance_curves": ["Fullest: up to 3.7 shares, 3.7 at the end",
                       "Emptiest: 0.1 shares, 0.1 at the end"],
    "run_lives": ["2 kills: 3 of 20 steps are done again"],
    "run_lives, one": ["0 kills: 0 of 20 steps are done again"],
    "resume_gaps": ["At most: whole state 0, without moments 0.2 nats"],
    "saving_cost": ["Least is lost at a state every 10 minutes: 5.0 %"],
}
LABELS = {
    "gradient_norm": [("step", "gradient norm before clipping")],
    "rate_curve": [("step", "rate"), ("step", "sequences per step")],
    "balance_curves": [("step", "fullest expert (fair share = 1)"),
                       ("step", "emptiest expert (fair share = 1)")],
    "run_lives": [("step", "")],
    "resume_gaps": [("step", "loss less the unbroken run's (nats)")],
    "saving_cost": [("minutes between two states", "time lost (%)")],
}


@pytest.mark.parametrize("name", DRAW)
def test_nothing_is_clipped(name, tmp_path):
    figure = DRAW[name]()
    figures.save(figure, tmp_path / "figure.png")
    assert is_whole(figure)


@pytest.mark.parametrize("name", TITLES)
def test_titles_are_computed(name):
    assert [ax.get_title(loc="left") for ax in DRAW[name]().axes] == TITLES[name]


@pytest.mark.parametrize("name", LABELS)
def test_axes_say_what_and_in_which_unit(name):
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in DRAW[name]().axes] == LABELS[name]


def test_skipped_steps_are_marked_where_they_were():
    line, marks = DRAW["gradient_norm, skipped"]().axes[0].lines
    assert list(marks.get_xdata()) == [6, 31]
    assert list(np.flatnonzero(np.isnan(line.get_ydata()))) == [5, 30]
    assert np.isfinite(marks.get_ydata()).all()
    assert len(DRAW["gradient_norm"]().axes[0].lines) == 1


def test_load_is_relative_to_a_fair_share():
    fullest, emptiest = DRAW["balance_curves"]().axes
    assert [list(line.get_ydata()) for line in fullest.lines[:2]] == [
        [2, 2, 2], pytest.approx([2, 23 * 4 / 26, 43 * 4 / 46])]
    assert list(emptiest.lines[1].get_ydata()) == pytest.approx([4 / 6, 4 / 26, 4 / 46])
    assert fullest.lines[2].get_ydata()[0] == emptiest.lines[2].get_ydata()[0] == 1
    names = [text.get_text() for text in fullest.get_legend().get_texts()]
    assert names == ["layer 1", "layer 2"]
    assert DRAW["balance_curves, many layers"]().axes[0].get_legend() is None


def test_lives_are_what_is_kept_and_what_is_done_again():
    ax = DRAW["run_lives"]().axes[0]
    assert [(b.get_x(), b.get_width()) for b in ax.patches] == [
        (0.5, 8), (8.5, 1), (8.5, 4), (12.5, 2), (12.5, 8), (20.5, 0)]
    assert [list(line.get_xdata()) for line in ax.lines] == [[4.5, 8.5], [12.5], [16.5, 20.5]]


def test_gaps_and_costs_are_what_was_given():
    assert list(DRAW["resume_gaps"]().axes[0].lines[1].get_ydata()) == pytest.approx([0, 0.1, -0.2])
    formula, simulated = DRAW["saving_cost"]().axes[0].lines
    assert list(formula.get_ydata()) == pytest.approx([30, 5, 20])
    assert list(simulated.get_xdata()) == [10, 100]
    assert list(simulated.get_ydata()) == pytest.approx([6, 20])


def test_the_load_drawn_is_the_last_one_of_the_log():
    ax = figures.run_figures(log(), n_devices=2, first_layer=1)["expert_load"].axes[0]
    assert ax.images[0].get_array().tolist() == [
        pytest.approx([2] + [2 / 3] * 3), pytest.approx([4 / 46] * 3 + [43 * 4 / 46])]


def test_losses_that_are_no_numbers_leave_the_curve_whole():
    raw, smooth = figures.loss_curve(log(skipped=(5, 59))).axes[0].lines
    assert len(raw.get_xdata()) == 58 and np.isfinite(smooth.get_ydata()).all()


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps(entry) for entry in log(skipped=(5,))]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"step": 61, "to']))
    (tmp_path / "config.json").write_text(json.dumps(TINY.with_(
        n_layers=5, n_dense=3, n_routed=4, n_devices=2).to_hf()))
    return tmp_path


def test_the_command_draws_everything_there_is(folder, capsys, monkeypatch):
    seen = {}
    real = figures.run_figures
    monkeypatch.setattr(figures, "run_figures", lambda log, **layout: real(
        seen.setdefault("log", log), **seen.setdefault("layout", layout)))
    assert main(["figures", str(folder)]) == 0
    names = ["loss", "gradient_norm", "rate", "expert_load", "balance"]
    assert json.loads(capsys.readouterr().out)["figures"] == [
        str(folder / "figures" / f"{name}.png") for name in names]
    for name in names:
        assert (folder / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert seen["layout"] == {"n_devices": 2, "first_layer": 3} and len(seen["log"]) == 60


def test_without_load_and_config_it_draws_the_rest(tmp_path):
    entries = [{k: v for k, v in e.items() if k not in ("expert_load", "gate_entropy")}
               for e in log()]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert main(["figures", str(tmp_path)]) == 0
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        "loss.png", "gradient_norm.png", "rate.png"}


def test_a_run_for_something_else_is_drawn_by_its_whole_loss():
    entries = [{k: v for k, v in e.items() if k != "language"} | {"loss": 9 - i / 20}
               for i, e in enumerate(log())]
    drawn = figures.run_figures(entries)
    assert list(drawn["loss"].axes[0].lines[0].get_ydata()) == [e["loss"] for e in entries]


@pytest.mark.parametrize(("text", "message"), [
    (None, "cannot be read"), ("", "no entries"), ("hello\n[1]\n", "no entries"),
    ('{"step": 1}', "has no 'tokens'"),
])
def test_bad_folders_are_one_line_and_code_2(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    assert main(["figures", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_bad_logs_are_refused_in_one_line():
    refused(lambda: figures.gradient_norm([]), "log: empty")
    refused(lambda: figures.gradient_norm([{"step": 1, "gradient_norm": math.inf}]), "is a number")
    refused(lambda: figures.rate_curve([{"step": 1, "lr": 1}]), "no 'batch'")
    refused(lambda: figures.balance_curves([{"step": 1}]), "no entry has 'expert_load'")
    refused(lambda: figures.loss_curve([{"tokens": 1, "language": math.nan}]), "no loss")
    refused(lambda: figures.run_lives([], 9), "lives: none")
    refused(lambda: figures.resume_gaps([1, 2], {"a": [1]}), "gaps: [1] values", "2 each")
    refused(lambda: figures.saving_cost([1, 2], [1], {}), "predicted: 1 values", "expected 2")
