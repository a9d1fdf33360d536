"""Running a study with all that is around it: lock, ledger, workers, report, registry; for command line and flow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from jfhpo.earlier_studies import earlier_studies
from jfhpo.places import check_places
from jfhpo.study_facts import facts
from jfhpo_core.errors import CheckpointError, Interruption, LedgerError
from jfhpo_core.optimizer.joint_fidelity import JointFidelity
from jfhpo_core.optimizer.known_optima import described
from jfhpo_core.optimizer.strategy import load_strategy
from jfhpo_core.report.page import PLOTS, REPORT, write_plots, write_report
from jfhpo_core.report.why import Why, why
from jfhpo_core.run.dispatch import Dispatcher, InlineDispatcher
from jfhpo_core.run.outcome import SearchResult, conclude
from jfhpo_core.run.planning import Phase, patience, plan_next
from jfhpo_core.run.preflight import DOCTOR_PARAMETERS, doubts, measured, refuse_unusable, trains_models
from jfhpo_core.run.scheduler import POOL
from jfhpo_core.run.search import Progress, run_search
from jfhpo_core.run.standing import rank
from jfhpo_core.store.checkpoints import CheckpointStore
from jfhpo_core.store.ledger import Ledger
from jfhpo_core.store.outbox import Outbox
from jfhpo_core.store.retention import Judgement, judge
from jfhpo_core.study.resolved import Study, resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import canonical_json
from jfhpo_core.trainers.base import Level

if TYPE_CHECKING:
    from mlflow_plugin.ledger import MlflowLedger

INLINE = "inline"
LOCK = "run.lock"
OUTBOX = "outbox.jsonl"
PUBLISHED = "published"
MODEL_URI = "model_uri"
MODEL_NOTE = "model_note"
UNFINISHED = "the study is not finished"


@dataclass(frozen=True)
class StudyOutcome:
    """What a study came to, and where to look at it.

    Attributes:
        tracking_uri: The MLflow store that holds it.
        url: The study's page, if the store is a server.
        page: The trials in MLflow's UI, as what follows the address of its server.
        report: The HTML report.
        model_uri: The registered version of the target model, e.g. 'models:/demo/1'; None if none was registered.
        model_note: Which alias it was given and why, or why nothing was registered.
        moved_alias: The alias that this call has given to the version; None if it had it before, or has none.
    """

    result: SearchResult
    tracking_uri: str
    url: str | None
    report: Path
    model_uri: str | None
    model_note: str
    page: str
    moved_alias: str | None = None


def run_study(
    spec: StudySpec,
    on_progress: Callable[[Progress], None] | None = None,
    on_status: Callable[[str], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
    on_open: Callable[[Ledger], None] = lambda _: None,
    around: Callable[[Dispatcher], Dispatcher] = lambda dispatcher: dispatcher,
    *,
    accept_changes: bool = False,
    forget: bool = False,
) -> StudyOutcome:
    """Run or continue a study until it is done; a study that is done gives the same outcome again without training.

    However this call ends (Ctrl-C, SIGTERM turned into an exception, kill -9), calling it again continues the study.

    Args:
        spec: The study.
        on_progress: Called after every event of the search.
        on_status: Called with a few words when something begins that takes seconds.
        on_note: Called with what was found before the first trial: warnings, and what untrained models score.
        on_open: Called with the ledger as soon as it is open, before anything is trained.
        around: Called after `on_open` with the dispatcher; returns the one to be used, which closes the other.
        accept_changes: Go on although data, rewards or models have changed since the study began; marks every later
            trial.
        forget: Go on without what was deleted of the study in MLflow.

    Raises:
        SpecError: The study is not usable; nothing has been started then.
        LedgerError: Another process runs the study, or the ledger holds a different one of its name.
    """
    study = informed(resolve(spec), on_status)
    check_places(spec)
    strategy = load_strategy(study)
    # A study with a report has most likely been finished: look into its ledger before starting workers for nothing.
    reported = (study.folder / REPORT).exists()
    if not reported and trains_models(study):
        _rehearse(study, on_status, on_note)
    with _exclusive(study):
        on_status("opening the ledger" if reported else "starting workers and opening the ledger")
        dispatcher = None if reported else _start_dispatcher(spec)
        try:
            ledger, outbox = _open(study, accept_changes=accept_changes, forget=forget)
            study = replace(study, changed=ledger.changed)
            with _shown(ledger):
                on_open(outbox)
                trials = outbox.trials()
                if reported and plan_next(study, strategy, trials, patience(trials)).phase is Phase.DONE:
                    result = conclude(study, trials, strategy, complete=True)
                else:
                    dispatcher = around(dispatcher or _start_dispatcher(spec))
                    result = run_search(study, outbox, dispatcher, on_progress, strategy)
        finally:
            if dispatcher is not None:
                on_status("releasing the workers")
                dispatcher.close()
        on_status("writing the report and registering the model")
        with _shown(ledger, complete=result.complete):
            outbox.deliver()
            return outbox.wait_for(lambda: _publish(study, ledger, result))


def _rehearse(study: Study, on_status: Callable[[str], None], on_note: Callable[[str], None]) -> None:
    """Refuse what is unusable; before the first trial also say what is doubtful, and what untrained models score."""
    on_status("trying models and reward on held-out prompts")
    findings = refuse_unusable(study)
    if recorded(study) is not None:
        return
    for finding in (*findings, *doubts(study)):
        if finding.level is Level.WARNING:
            on_note(f"{finding.level}: {finding.message}")
    on_status("scoring the untrained models")
    for finding in measured(study, DOCTOR_PARAMETERS):
        kind = "warning:" if finding.level is Level.WARNING else "untrained"
        on_note(f"{kind} {finding.message}")


def informed(study: Study, on_status: Callable[[str], None] = lambda _: None) -> Study:
    """The study with the earlier ones that its `warm_start` stands for.

    Args:
        study: As its file has it.
        on_status: Told which they are, and why, and what the search expects from published recipes and recorded runs.

    Raises:
        LedgerError: The ledger does not hold one of them.
        SpecError: The models of one of them cannot be found any more.
    """
    strategy = load_strategy(study)
    known = described(strategy.expected(study), study.space) if isinstance(strategy, JointFidelity) else None
    if known is not None:
        on_status(f"{known} (strategy.settings.prior: none leaves that out)")
    if not study.spec.warm_start:
        return study
    found = earlier_studies(study)
    for item in found:
        on_status(f"learning from study {item.name!r}: {item.why}")
    if not found:
        on_status("warm_start: no earlier study in the ledger fits this one")
    return replace(study, earlier=tuple(item.study for item in found))


def recorded(study: Study) -> MlflowLedger | None:
    """The study's ledger for reading only, also while the study is being run; None if nothing is recorded."""
    from mlflow_plugin.ledger import MlflowLedger

    ledger = MlflowLedger()
    return ledger if ledger.look(study.spec) else None


def look(spec: StudySpec) -> SearchResult:
    """The outcome so far, from the ledger alone; runs and writes nothing.

    Raises:
        LedgerError: The ledger holds no such study.
    """
    return _look(informed(resolve(spec)))[1]


def rebuild_report(spec: StudySpec) -> StudyOutcome:
    """Write the report of a study again from its ledger, whatever state the study is in. Registers nothing.

    Raises:
        LedgerError: The ledger holds no such study.
    """
    study = informed(resolve(spec))
    ledger, result = _look(study)
    known = ledger.facts()
    return StudyOutcome(
        result=result,
        tracking_uri=ledger.tracking_uri,
        url=ledger.url(),
        report=_write_report(study, ledger, result),
        model_uri=str(known.get(MODEL_URI, "")) or None,
        model_note=str(known.get(MODEL_NOTE, UNFINISHED)),
        page=ledger.page(),
    )


def promote_model(spec: StudySpec) -> str:
    """Serve the model version that the study has registered as the champion, and say so.

    Raises:
        LedgerError: The ledger holds no such study, or it has registered nothing.
    """
    from mlflow_plugin.registry import promote

    study = resolve(spec)
    with _exclusive(study):
        ledger = recorded(study)
        known = ledger.facts() if ledger is not None else {}
        uri = str(known.get(MODEL_URI, ""))
        if ledger is None or not uri:
            raise LedgerError(
                f"study {spec.study!r} has registered no model, so there is none to promote: "
                f"{known.get(MODEL_NOTE, UNFINISHED)}"
            )
        name, _, version = uri.removeprefix("models:/").rpartition("/")
        registration = promote(ledger.client, name, version, spec.study)
        ledger.summarize({MODEL_NOTE: registration.note})
    return f"{uri}, {registration.note}"


def judge_checkpoints(spec: StudySpec, limit_bytes: int | None = None, *, delete: bool = False) -> list[Judgement]:
    """Which checkpoints of a study are worth their space; deletes the others only if asked to.

    Args:
        spec: The study.
        limit_bytes: Most that may be kept; None sets no limit.
        delete: Delete what is not worth its space.

    Raises:
        LedgerError: The ledger holds no such study; or something is to be deleted while another process runs the study,
            or while trials of it wait to be written to the ledger.
    """
    study = informed(resolve(spec))
    with _exclusive(study) if delete else nullcontext():
        if delete and (study.folder / OUTBOX).exists():
            raise LedgerError(
                f"{study.folder / OUTBOX} holds trials that the ledger does not know yet; run `jfhpo search` first, "
                "which delivers them, so that their checkpoints are not taken for nobody's"
            )
        ledger, result = _look(study)
        ranked = [item.configuration for item in rank(study, load_strategy(study), result.trials)]
        judgements = judge(study, result.trials, result.target_trial, ranked, result.complete, limit_bytes)
        gone = [judgement for judgement in judgements if delete and not judgement.keep]
        for judgement in gone:
            # The index first: what it offers must be there, also if this process dies in between.
            newest = judgement.trial.checkpoint if judgement.trial is not None else None
            if newest is not None and study.store / newest.path == judgement.folder:
                ledger.forget_checkpoint(judgement.folder.parent.name)
            CheckpointStore(study.store).delete(judgement.folder)
    return judgements


def _look(study: Study) -> tuple[MlflowLedger, SearchResult]:
    strategy = load_strategy(study)
    ledger = recorded(study)
    trials = ledger.trials() if ledger is not None else []
    if ledger is None or not trials:
        raise LedgerError(
            f"the ledger holds no trials of study {study.spec.study!r}; begin it with `jfhpo search`, or correct "
            "tracking.uri (or MLFLOW_TRACKING_URI, or the folder you are in)"
        )
    complete = plan_next(study, strategy, trials).phase is Phase.DONE
    return ledger, conclude(study, trials, strategy, complete)


@contextmanager
def _exclusive(study: Study) -> Iterator[None]:
    """Hold the study: a ledger has one writer. The lock goes with the process, so a crash leaves none behind."""
    there = [folder for folder in (study.folder, study.folder.parent) if folder.exists()]
    study.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(study.folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LedgerError(
            f"study {study.spec.study!r} is being run by another process ({lock.lock_file} is held); wait for it, end "
            "it, or give this study another name"
        ) from None
    try:
        yield
    finally:
        if not any(file.name != LOCK for file in study.folder.glob("*")):
            # Nothing has begun. Who waits for a lock whose file goes away makes it anew: filelock sees to that.
            (study.folder / LOCK).unlink(missing_ok=True)
        lock.release()
        for folder in (study.folder, study.folder.parent):
            if folder not in there and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _open(study: Study, *, accept_changes: bool, forget: bool) -> tuple[MlflowLedger, Outbox]:
    """The ledger, and what the search writes to instead: the search shall go on while an MLflow server is away."""
    from mlflow_plugin.ledger import MlflowLedger

    ledger = MlflowLedger(accept_changes=accept_changes, forget=forget)
    outbox = Outbox(ledger, study.folder / OUTBOX)
    outbox.open(study.spec)
    return ledger, outbox


@contextmanager
def _shown(ledger: MlflowLedger, *, complete: bool = False) -> Iterator[None]:
    """Let MLflow show it if what is done inside fails or is interrupted; a complete study stays finished then."""
    from mlflow_plugin.presentation import StudyState

    try:
        yield
    except BaseException as error:
        failed = isinstance(error, Exception) and not isinstance(error, Interruption)
        over = StudyState.FINISHED if complete else StudyState.INTERRUPTED
        ledger.end(StudyState.FAILED if failed else over)
        raise


def _start_dispatcher(spec: StudySpec) -> Dispatcher:
    """The study's dispatcher. Ray comes up in the background, while this process imports what it needs itself."""
    if spec.cluster.address == INLINE:
        return InlineDispatcher(spec.slots, nodes={POOL: spec.cluster.devices} if spec.cluster.devices else None)
    from jfhpo_core.run.ray_dispatch import RayDispatcher

    return RayDispatcher(spec.cluster, spec.slots, trainer=spec.trainer.name)


def _write_report(study: Study, ledger: MlflowLedger, result: SearchResult, explained: Why | None = None) -> Path:
    records = {trial.key: ledger.step_records(trial.key) for trial in result.trials}
    return write_report(result, records, study.folder, ledger.facts(), explained=explained)


def _publish(study: Study, ledger: MlflowLedger, result: SearchResult) -> StudyOutcome:
    """Registered model, figures and report, once per state of the study."""
    from mlflow_plugin.presentation import StudyState
    from mlflow_plugin.registry import register_target

    report = study.folder / REPORT
    moved: str | None = None
    trials = [trial.model_dump(mode="json") for trial in result.trials]
    state = canonical_json([trials, study.spec.tracking.registered_model])
    digest = hashlib.sha256(state.encode()).hexdigest()[:16]
    if ledger.facts().get(PUBLISHED) != digest or not report.exists():
        uri, note = "", UNFINISHED
        if result.complete:
            try:
                registration = register_target(study, result, ledger)
            except CheckpointError as error:
                # Not published: once the checkpoint is back, the next call registers it.
                note, digest = f"the recommended run cannot be registered: {error}", ""
            else:
                # The version, and not its alias, which moves on to later versions.
                note, uri = registration.note, registration.uri or ""
                moved = registration.alias if registration.moved else None
        ledger.summarize({**facts(result), MODEL_URI: uri, MODEL_NOTE: note})
        explained = why(result)
        plots = write_plots(result, study.folder / PLOTS, explained)
        ledger.present(result, plots, explained.metrics())
        ledger.summarize({PUBLISHED: digest}, [_write_report(study, ledger, result, explained)])
    ledger.end(StudyState.FINISHED if result.complete else StudyState.INTERRUPTED)
    known = ledger.facts()
    return StudyOutcome(
        result,
        ledger.tracking_uri,
        ledger.url(),
        report,
        str(known[MODEL_URI]) or None,
        str(known[MODEL_NOTE]),
        ledger.page(),
        moved,
    )
