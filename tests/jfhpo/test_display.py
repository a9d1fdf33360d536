from __future__ import annotations

import io
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from jfhpo.display.live import LiveDisplay, PlainDisplay
from jfhpo.display.plan import plan_view
from jfhpo.display.result import result_view
from jfhpo.display.trials import TrialList
from jfhpo.display.watch import Quiet, Watch
from jfhpo.display.words import bill, describe_untrained, duration, trend
from jfhpo.planning import Prospect
from jfhpo_core.optimizer.cost import CostEstimate
from jfhpo_core.optimizer.forecast import forecast
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.run.scheduler import Load
from jfhpo_core.run.search import Progress, run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.resolved import Study, resolve
from jfhpo_core.study.trial import Example, Trial
from tests.studies import simulated_study, step_record, trained
from tests.trainers.openrlhf.conftest import study as openrlhf_study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return simulated_study(tmp_path)


def follow(study: Study, *watchers: LiveDisplay | PlainDisplay) -> tuple[SearchResult, list[Progress]]:
    snapshots: list[Progress] = []

    def on_progress(progress: Progress) -> None:
        snapshots.append(progress)
        for watcher in watchers:
            watcher.progress(progress)

    return run_search(study, MemoryLedger(), InlineDispatcher(2), on_progress), snapshots


def text_of(view: RenderableType, width: int = 200) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(view)
    return console.export_text()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (4.21, "4.2 s"), (45.4, "45 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations_read_naturally(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_known_cost_has_no_interval() -> None:
    assert bill(CostEstimate(600, 600, 600)) == "10 min 00 s"
    assert bill(CostEstimate(0, 0, 0)) == "0.0 s"
    assert bill(CostEstimate(60, 30, 120)) == "1 min 00 s (30 s to 2 min 00 s)"


def test_a_trend_spans_its_own_range() -> None:
    assert trend([0.1, 0.2, 0.4]) == "▁▃█"
    assert trend([0.3, 0.3]) == "▁▁"
    assert trend([math.nan, 0.1, math.inf]) == ""


def test_plain_lines_tell_every_segment_once_with_its_reason(study: Study) -> None:
    lines: list[str] = []
    result, _ = follow(study, PlainDisplay(lines.append))
    ended = [(trial, part) for trial in result.trials for part in trial.segments]
    assert len(lines) == len(ended)
    for trial, part in ended:
        line = next(line for line in lines if f"| #{trial.number} {trial.model} " in line)
        if part.decision is not None:
            assert f"stopped by {part.decision.rule} at step {part.end_step}" in line
            assert part.decision.signal in line
        else:
            assert f"trained to step {part.end_step} of {trial.total_steps}" in line


def test_an_untrained_model_is_told_with_its_completions(study: Study) -> None:
    trial = trained(study, {"learning_rate": 1e-4}, "small", [0.25, 0.5])
    (part,) = trial.segments
    assert describe_untrained(trial, part) == []
    base = part.evaluations[0].model_copy(update={"examples": (Example(prompt="1+1=", completion="3", reward=0.0),)})
    shown = part.model_copy(update={"evaluations": (base, *part.evaluations[1:])})
    assert describe_untrained(trial, shown) == ["untrained small: score 0.250 ± 0.020", "'1+1=' -> '3', reward 0"]


def test_what_an_untrained_model_scores_is_told_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    example = Example(prompt="1+1=", completion="3", reward=0.0)
    trials = []
    for number, model in enumerate(("small", "small", "large")):
        trial = trained(study, {"learning_rate": 1e-4 * (1 + number)}, model, [0.25, 0.5], number)
        (part,) = trial.segments
        base = part.evaluations[0].model_copy(update={"examples": (example,)})
        part = part.model_copy(update={"evaluations": (base, *part.evaluations[1:])})
        trials.append(trial.model_copy(update={"segments": (part,)}))
    _, snapshots = follow(study)

    def told(*known: Trial) -> list[str]:
        watch = Watch()
        watch.news(replace(snapshots[0], trials=known))
        return [line for line in watch.news(replace(snapshots[0], trials=trials)) if line.startswith("untrained")]

    assert [line.split(":")[0] for line in told()] == ["untrained small", "untrained large"]
    assert [line.split(":")[0] for line in told(trials[0])] == ["untrained large"]
    # Before the first trial, a search says what models score that are small enough.
    monkeypatch.setattr("jfhpo_core.run.preflight.trains_models", lambda _: True)
    assert told() == []


def test_a_continued_study_tells_only_what_is_new(study: Study) -> None:
    _, snapshots = follow(study)
    watch, later = Watch(), len(snapshots) // 2
    assert watch.news(snapshots[later]) == []
    assert 0 < watch.share_done() < 1
    finished = sum(len(trial.segments) for trial in snapshots[-1].trials)
    before = sum(len(trial.segments) for trial in snapshots[later].trials)
    assert len(watch.news(snapshots[-1])) == finished - before
    assert watch.left() == CostEstimate(0, 0, 0)
    assert watch.share_done() == 1


def test_the_live_view_shows_budget_standings_running_trials_and_events(study: Study) -> None:
    console = Console(width=140, force_terminal=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    display = LiveDisplay(console, "test")
    assert "checking the study" in text_of(display.render())
    _, snapshots = follow(study, display)
    middle = snapshots[len(snapshots) // 2]
    running = next(trial for trial in middle.trials if trial.open_segment is not None)
    live = Progress(
        study, middle.phase, middle.trials, {running.key: step_record(7, reward=0.25, kl=0.125)},
        middle.load, middle.spent_seconds, middle.elapsed_seconds,
    )  # fmt: skip
    display.progress(live)
    view = text_of(display.render())
    assert f"of {duration(study.spec.budget.device_seconds)} of trial time spent" in view
    assert re.search(rf"#{running.number} +large +7/30 +0\.250 +0\.125", view)
    assert re.search(r"best on the target +0\.\d+ ± 0\.\d+", view)
    assert "trained to step 30 of 30" in view
    assert re.search(r"final score +0\.\d+ \(80 % interval 0\.\d+ to \d\.\d+\)", view)


def test_the_live_view_shows_who_waits_for_devices(study: Study) -> None:
    display = LiveDisplay(Console(width=140, record=True, force_terminal=False), "test")
    _, snapshots = follow(study)
    progress = next(snapshot for snapshot in snapshots if any(trial.open_segment for trial in snapshot.trials))
    waiting = next(trial for trial in progress.trials if trial.open_segment)
    display.progress(replace(progress, live={}, load=Load(5, 8, {waiting.key: 240.0})))
    view = text_of(display.render())
    told = f"#{waiting.number} waits for 1 ({waiting.model}), about {duration(240)} to go"
    assert re.search(rf"devices +5 of 8 busy; {re.escape(told)}", view)
    assert re.search(rf"#{waiting.number} +{waiting.model} +0/\d+ +waiting", view)


def test_the_live_view_draws_a_step_once_however_long_it_takes(study: Study) -> None:
    display = LiveDisplay(Console(width=200, record=True, force_terminal=False), "test")
    _, snapshots = follow(study)
    progress = next(snapshot for snapshot in snapshots if any(trial.open_segment for trial in snapshot.trials))
    running = next(trial for trial in progress.trials if trial.open_segment)
    for step, reward in enumerate((0.1, 0.2, 0.4), start=1):
        for _ in range(30):
            display.progress(replace(progress, live={running.key: step_record(step, reward=reward)}))
    assert trend((0.1, 0.2, 0.4)) in text_of(display.render())


def test_the_result_shows_every_row_and_does_not_overclaim(tmp_path: Path) -> None:
    # The baseline is the best configuration of the landscape: nothing can be clearly better.
    best = {"learning_rate": 5e-4, "kl_coefficient": 3e-3, "clip_high": 0.28, "max_grad_norm": 0.7}
    study = simulated_study(tmp_path, baselines=[{"name": "optimum", "configuration": best}])
    result, _ = follow(study)
    view = text_of(result_view(result))
    assert "optimum" in view
    assert "clearly better than optimum" not in re.sub("not clearly better than", "", view)
    assert re.search(r"not (clearly )?better than|clearly worse than", view)
    assert re.search(r"cost per trial .* for a full target trial", view)


def test_the_result_of_an_unfinished_study_says_so(study: Study) -> None:
    result, snapshots = follow(study)
    assert "not finished" not in text_of(result_view(result))
    early = SearchResult(study, snapshots[0].trials, None, None, (), 0.0, complete=False)
    view = text_of(result_view(early))
    assert "not finished" in view
    assert "Nothing can be recommended" in view


def test_the_trial_table_has_all_trials(study: Study) -> None:
    result, _ = follow(study)
    rows = [line for line in text_of(TrialList(result.trials)).splitlines() if re.match(r" +\d+ ", line)]
    assert len(rows) == len(result.trials)


def test_at_80_columns_a_trial_takes_two_lines_with_all_its_values(study: Study) -> None:
    result, _ = follow(study)
    lines = text_of(TrialList(result.trials), width=80).splitlines()
    assert all(len(line) <= 80 for line in lines)
    listed, _, legend = "\n".join(lines).partition("\n\n")
    assert len(listed.splitlines()) == 2 * len(result.trials)
    marks = dict(reversed(item.split()) for item in " ".join(legend.split()).split(", "))
    for trial, what, values in zip(result.trials, lines[::2], lines[1::2], strict=False):
        assert re.match(rf" *{trial.number} {trial.label or trial.purpose} on {trial.model}, {trial.state}", what)
        assert f"{trial.step}/{trial.total_steps}" in what
        assert [item.partition("=")[0] for item in values.split()] == [marks[name] for name in trial.configuration]
        assert f"{marks['learning_rate']}={trial.configuration['learning_rate']:.2g}" in values


def test_at_80_columns_intervals_stay_in_one_line(tmp_path: Path) -> None:
    recipe = {"name": "size-appropriate", "configuration": {"learning_rate": 1e-4}}
    study = simulated_study(tmp_path, baselines=[recipe])
    result, _ = follow(study)
    view = text_of(result_view(result), width=80)
    assert re.search(r"size-appropriate .* [+-]\d\.\d{3} \([+-]\d\.\d{3} to [+-]\d\.\d{3}\)", view)
    plan = text_of(plan_view(Prospect(study, forecast(study, []), None)), width=80)
    assert "(90 % interval)" in plan


def test_a_value_that_looks_like_markup_is_shown_as_it_is(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    trial = study.new_trial(0, {"learning_rate": 1e-3}, "small", 0)
    shown = text_of(TrialList([trial.model_copy(update={"configuration": {"prompt": "[INST]q[/INST]"}})]))
    assert "[INST]q[/INST]" in shown


def test_a_plan_warns_if_the_budget_cannot_validate(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, budget={"trial_seconds": 20})
    result, _ = follow(simulated_study(tmp_path))
    assert "less than one full target trial" in text_of(
        plan_view(Prospect(study, forecast(study, result.trials), None))
    )
    rich = simulated_study(tmp_path, budget={"trial_seconds": 20000})
    assert "less than one full" not in text_of(plan_view(Prospect(rich, forecast(rich, result.trials), None)))


def test_while_nothing_is_heard_a_line_now_and_then_says_that_work_goes_on(study: Study) -> None:
    """A reward that sleeps (case 14) is no hang."""
    _, snapshots = follow(study)
    busy = next(one for one in snapshots if any(trial.open_segment for trial in one.trials))
    trial = next(trial for trial in busy.trials if trial.open_segment is not None)
    now = [0.0]
    quiet = Quiet(lambda: now[0])
    said: list[tuple[float, str]] = []
    for second in range(0, 200, 10):
        now[0] = second
        # The second step comes after 100 seconds, and something else is said at 150.
        live = {trial.key: step_record(1 if second < 100 else 2)}
        here = replace(busy, live=live, trials=[trial])
        said += [(second, line) for line in quiet.heard(here, spoken=second == 150)]
    assert [second for second, _ in said] == [30, 60, 90, 130, 180]
    assert f"#{trial.number} {trial.model} at step 1 of 30, nothing heard for 30 s" in said[0][1]
    assert "at step 2 of 30, nothing heard for 1 min 20 s" in said[-1][1]
    waiting = replace(here, load=replace(busy.load, waiting={trial.key: 60.0}))
    assert quiet.heard(waiting, spoken=False) == []


def test_as_long_as_one_trial_is_heard_of_the_silence_of_another_is_no_news(study: Study) -> None:
    _, snapshots = follow(study)
    busy = next(one for one in snapshots if sum(trial.open_segment is not None for trial in one.trials) == 2)
    first, second = (trial for trial in busy.trials if trial.open_segment is not None)
    now = [0.0]
    quiet = Quiet(lambda: now[0])
    said = []
    for second_step in range(0, 100, 10):
        now[0] = second_step
        live = {first.key: step_record(1), second.key: step_record(1 + min(second_step, 60) // 10)}
        said += [(second_step, line) for line in quiet.heard(replace(busy, live=live), spoken=False)]
    assert [(at, f"#{second.number} {second.model} at step 7 " in line) for at, line in said] == [(90, True)]


@pytest.mark.parametrize("kind", ["plain", "live"])
def test_a_trial_that_trains_in_this_very_process_is_seen_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Case 14 with `cluster: {address: inline}`: its steps are shown as they come, and so is their absence."""
    monkeypatch.setattr("jfhpo.display.watch.QUIET_SECONDS", 0.2)
    monkeypatch.setattr("jfhpo.display.live.LISTEN_SECONDS", 0.01)
    monkeypatch.setattr("jfhpo_core.run.dispatch.TELL_SECONDS", 0.0)
    settings = {"real_seconds_per_step": 0.5}
    study = simulated_study(
        tmp_path, trainer={"name": "simulated", "settings": settings}, fidelity={"horizon_prompts": 16, "rungs": 1}
    )
    lines: list[str] = []
    seen: list[tuple[int, int]] = []
    console = Console(width=160, force_terminal=True, file=io.StringIO())
    display = PlainDisplay(lines.append) if kind == "plain" else LiveDisplay(console, "test")

    def on_progress(progress: Progress) -> None:
        display.progress(progress)
        running = [trial for trial in progress.trials if trial.open_segment is not None]
        assert len(running) == 1
        seen.append((running[0].number, progress.live[running[0].key].step if progress.live else 0))
        if seen[-1][1]:
            raise KeyboardInterrupt

    with display, pytest.raises(KeyboardInterrupt):
        run_search(study, MemoryLedger(), InlineDispatcher(1), on_progress)
    assert seen == [(0, 0), (0, 1)]
    said = "\n".join(lines) if isinstance(display, PlainDisplay) else text_of(display.render())
    assert "still at work: #0 " in said


def test_what_takes_long_before_the_first_trial_says_that_it_goes_on() -> None:
    now = [0.0]
    quiet = Quiet(lambda: now[0])
    assert quiet.heard(None, spoken=False) == []
    quiet.begin("trying models and reward")
    said = []
    for second in range(0, 70, 10):
        now[0] = second
        said += quiet.heard(None, spoken=False)
    assert said == [f"still at work: trying models and reward, for {seconds}" for seconds in ("30 s", "1 min 00 s")]


def test_at_80_columns_every_label_keeps_its_width(study: Study) -> None:
    display = LiveDisplay(Console(width=80, record=True, force_terminal=False), "test")
    _, snapshots = follow(study, display)
    running = next(item for item in reversed(snapshots) if any(trial.open_segment for trial in item.trials))
    trial = next(trial for trial in running.trials if trial.open_segment)
    display.progress(replace(running, live={trial.key: step_record(7)}))
    lines = text_of(display.render(), width=80).splitlines()
    assert all(len(line) <= 80 for line in lines)
    labels = ("budget", "time", "final score", "trials", "best on the target")
    for label in labels:
        assert any(re.match(rf"│ {label} +\S", line) for line in lines), label
    assert any(re.match(r"│ running +model +step +reward +KL +trend", line) for line in lines)


def test_time_left_at_the_start_is_that_of_the_whole_bill(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("jfhpo.display.watch.time.monotonic", lambda: clock[0])
    _, snapshots = follow(study)
    watch = Watch()
    watch.news(snapshots[0])
    before = watch.left()
    bills = forecast(study, [])
    assert before is not None
    assert before.seconds == pytest.approx(bills.wall().seconds)
    # The first segment took no time at all by the clock: that says little about the rest.
    first = next(item for item in snapshots if any(trial.segments for trial in item.trials))
    clock[0] = 0.1
    watch.news(first)
    after = watch.left()
    assert after is not None
    assert after.seconds > 0.5 * forecast(study, first.trials).wall().seconds


def test_with_an_hourly_cost_every_bill_is_in_money_too(tmp_path: Path) -> None:
    budget = {"trial_seconds": 300, "max_parallel": 2, "hourly_cost": 36.0, "currency": "EUR"}
    study = simulated_study(tmp_path, budget=budget)
    display = LiveDisplay(Console(width=200, record=True, force_terminal=False), "test")
    result, _ = follow(study, display)
    plan = text_of(plan_view(Prospect(study, forecast(study, []), None)))
    assert re.search(r"search +5 min 00 s, 3\.00 EUR ", plan)
    assert re.search(r"total .* EUR \([\d.]+ to [\d.]+\)", plan)
    assert re.search(r"cost left .* EUR", plan)
    assert re.search(r"of trial time spent, [\d.]+ EUR", text_of(display.render()))
    assert f"{result.spent_seconds / 100:.2f} EUR" in text_of(result_view(result))


def test_a_plan_says_how_many_runs_of_each_size_the_budget_buys(study: Study) -> None:
    result, _ = follow(study)
    bills = forecast(study, result.trials)
    plan = text_of(plan_view(Prospect(study, bills, None)))
    for model in study.ladder.models:
        cost = bills.full_runs[model.name]
        bought = int(study.spec.budget.device_seconds / cost.seconds)
        assert re.search(rf"{model.name} +{model.parameters:,} .* {bought} \(\d+ to \d+\)", plan)
    assert bills.full_trial == bills.full_runs["large"]


def test_a_plan_says_what_a_rung_takes() -> None:
    base = openrlhf_study()
    family = [model.model_dump(exclude_none=True) for model in base.family.models]
    family[-1]["parameters"] = 7_000_000_000
    settings = {**base.trainer.settings, "python": sys.executable}
    study = resolve(openrlhf_study(family=family, trainer={**base.trainer.model_dump(), "settings": settings}))
    plan = text_of(plan_view(Prospect(study, forecast(study, []), None)))
    # 16 bytes for each of seven billion parameters, at 1 GB/s.
    assert re.search(r"at each l is evaluated \(.+\) and saved \(1 min 52 s\), by estimates\s", plan)
    local = study.spec.cluster.model_copy(update={"local_folder": "/scratch"})
    study = replace(study, spec=study.spec.model_copy(update={"cluster": local}))
    plan = text_of(plan_view(Prospect(study, forecast(study, []), None)))
    assert re.search(r"saved \(56(\.0)? s\), by estimates; copying it takes 1 min 52 s", re.sub(r"\s+", " ", plan))
