"""Stores fine-tuning jobs with their events and checkpoints, in the database of files and batches.

FOLDER/ID/checkpoint.safetensors   of a job that has not ended: weights, moments and progress
"""

import shutil
import sqlite3
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import orjson

from loraplex_adapter_store.report import JsonValue
from loraplex_server.api.batches.batch_store import BatchStore
from loraplex_server.api.batches.batch_tables import insert_file, json_text, page, row_by_id
from loraplex_server.api.batches.records import FileRecord
from loraplex_server.api.request_info import BatchCaller
from loraplex_server.errors import ApiError, too_many

from .records import TuningJob, TuningStatus

_JOB, _EVENT, _CHECKPOINT = "fine_tuning_job", "fine_tuning_event", "fine_tuning_checkpoint"
_MAX_ACTIVE = 16  # unfinished jobs of a tenant
_N_KEPT = 1000  # jobs of a tenant
_DAY_S = 24 * 3600
_METRICS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_IN_COLUMNS = ("id", "caller", "training_file", "validation_file", "status", "created")


class TuningStore:
    """The only owner of the jobs. All methods block, on the thread of the batches' store.

    Each tenant sees only its own jobs.
    """

    def __init__(self, folder: Path, files: BatchStore) -> None:
        self.files = files
        self._folder, self._transaction = folder, files.tables.transaction

    def checkpoint_path(self, job_id: str) -> Path:
        return self._folder / job_id / "checkpoint.safetensors"

    def unfinished(self) -> list[TuningJob]:
        """Return the jobs that go on after a start, and delete the folders of ended ones."""
        if not self._folder.is_dir():  # no job has ever trained
            return []
        with self._transaction() as db:
            rows = db.execute("SELECT * FROM fine_tuning_job WHERE NOT has_ended ORDER BY number")
            jobs = [_job_of(row) for row in rows]
        known = {job.id for job in jobs}
        for folder in self._folder.iterdir():
            if folder.name not in known:
                shutil.rmtree(folder)
        return [job for job in jobs if job.status is not TuningStatus.PAUSED]

    def add(self, job: TuningJob) -> None:
        """Raises ApiError (429) if the tenant has too many unfinished jobs."""
        tenant = job.caller.tenant
        with self._transaction() as db:
            (n,) = db.execute(
                "SELECT count(*) FROM fine_tuning_job WHERE tenant = ? AND NOT has_ended", (tenant,)
            ).fetchone()
            if n >= _MAX_ACTIVE:
                raise too_many(
                    f"this tenant has {n} unfinished fine-tuning jobs, the limit; wait for the end "
                    "of one, or cancel it",
                    "quota_exceeded",
                    60.0,
                )
            db.execute(
                "INSERT INTO fine_tuning_job "
                "(id, tenant, key_id, training_file, validation_file, status, created, n_bytes, "
                "n_tokens, details) VALUES (?, ?, ?, ?, ?, ?, ?, 0, 0, ?)",
                (
                    *(job.id, tenant, job.caller.key_id, job.training_file, job.validation_file),
                    *(job.status.value, job.created, _details(job)),
                ),
            )
            self.checkpoint_path(job.id).parent.mkdir(parents=True)
            _add_event(db, job.id, f"Created fine-tuning job: {job.id}")
            _delete_old(db, tenant)

    def remove(self, job_id: str) -> None:
        """Delete a job that has not started."""
        with self._transaction() as db:
            _delete(db, job_id)

    def job(self, tenant: str, job_id: str) -> TuningJob:
        """Return a job. Raises ApiError (404)."""
        with self._transaction() as db:
            return _job_of(row_by_id(db, _JOB, tenant, job_id, "fine_tuning_job_id"))

    def jobs(
        self, tenant: str, *, limit: int, after: str | None, metadata: Mapping[str, str]
    ) -> tuple[list[TuningJob], bool]:
        """Return a page, newest first, and True if more jobs follow. Raises ApiError (400).

        ``metadata``: entries that the jobs must have.
        """
        with self._transaction() as db:
            wanted = json_text(metadata)
            rows = page(db, _JOB, tenant, limit, after, metadata=wanted)
        return [_job_of(row) for row in rows[:limit]], len(rows) > limit

    def events(
        self, tenant: str, job_id: str, *, limit: int, after: str | None
    ) -> tuple[list[dict[str, object]], bool]:
        """Return a page of events, newest first. Raises ApiError (400, 404)."""
        return self._of_job(_EVENT, tenant, job_id, limit, after)

    def checkpoints(
        self, tenant: str, job_id: str, *, limit: int, after: str | None
    ) -> tuple[list[dict[str, object]], bool]:
        """Return a page of checkpoints, newest first. Raises ApiError (400, 404)."""
        return self._of_job(_CHECKPOINT, tenant, job_id, limit, after)

    def move(
        self,
        job: TuningJob,
        status: TuningStatus,
        message: str,
        *,
        sources: tuple[TuningStatus, ...],
        results: FileRecord | None = None,
        **changes: Any,
    ) -> TuningJob:
        """Move a job that is in one of the states ``sources``. Changes are fields of the job.

        ``results``: the file of metrics, which has no row yet. Raises ApiError (409) for a job in
        another state.
        """
        with self._transaction() as db:
            now = _job_of(row_by_id(db, _JOB, job.caller.tenant, job.id, "fine_tuning_job_id"))
            if now.status not in sources:
                raise ApiError(
                    409,
                    f"the job is {now.status.value}; it must be "
                    f"{' or '.join(each.value for each in sources)} to become {status.value}",
                    code="wrong_job_status",
                    param="fine_tuning_job_id",
                )
            if status.has_ended:
                changes["finished"] = int(time.time())
            if results is not None:
                insert_file(db, job.caller.tenant, results)
                changes["result_files"] = (results.id,)
            job = replace(now, status=status, **changes)
            _write(db, job)
            level = "error" if status is TuningStatus.FAILED else "info"
            _add_event(db, job.id, message, level=level)
        if status.has_ended:
            shutil.rmtree(self._folder / job.id, ignore_errors=True)
        return job

    def add_metrics(
        self, job_id: str, message: str, data: Mapping[str, object], *, estimated_finish: int
    ) -> None:
        """Add the event of a step. ``data`` has the step's number."""
        with self._transaction() as db:
            _add_event(db, job_id, message, data=data)
            db.execute(
                "UPDATE fine_tuning_job SET details = json_set(details, '$.estimated_finish', ?) "
                "WHERE id = ?",
                (estimated_finish, job_id),
            )

    def add_event(self, job_id: str, message: str, *, level: str = "info") -> None:
        with self._transaction() as db:
            _add_event(db, job_id, message, level=level)

    def rewind(self, job_id: str, step: int) -> None:
        """Forget the metrics of steps after ``step``, which are done again."""
        with self._transaction() as db:
            db.execute(
                "DELETE FROM fine_tuning_event WHERE job_id = ? AND step > ?", (job_id, step)
            )

    def metrics(self, job_id: str) -> list[dict[str, Any]]:
        """Return the data of all steps, in their order."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT data FROM fine_tuning_event WHERE job_id = ? AND step IS NOT NULL "
                "ORDER BY step",
                (job_id,),
            )
            return [orjson.loads(row["data"]) for row in rows]

    def add_checkpoint(
        self, job: TuningJob, name: str, step: int, metrics: Mapping[str, object], *, n_kept: int
    ) -> list[str]:
        """Add a checkpoint, unless it is known. Return the names of those beyond ``n_kept``."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO fine_tuning_checkpoint "
                "(id, job_id, created, name, step, metrics) VALUES (?, ?, ?, ?, ?, ?)",
                (
                    *(f"ftckpt_{uuid.uuid4().hex}", job.id, int(time.time())),
                    *(name, step, json_text(metrics)),
                ),
            )
            _add_event(db, job.id, f"Checkpoint created at step {step}")
            old = db.execute(
                "SELECT id, name FROM fine_tuning_checkpoint WHERE job_id = ? "
                "ORDER BY number DESC LIMIT -1 OFFSET ?",
                (job.id, n_kept),
            ).fetchall()
            for row in old:
                db.execute("DELETE FROM fine_tuning_checkpoint WHERE id = ?", (row["id"],))
            return [row["name"] for row in old]

    def finish(self, job: TuningJob, evaluation: Mapping[str, JsonValue] | None) -> TuningJob:
        """Write the file of metrics and end the job. Raises ApiError (409) if it was stopped."""
        lines = [",".join(_METRICS)]
        for data in self.metrics(job.id):
            values = [data.get(name) for name in _METRICS]
            lines.append(",".join("" if value is None else str(value) for value in values))
        text = "\n".join(lines) + "\n"
        results = self.files.write_results(f"{job.id}_metrics.csv", text.encode())
        self.add_event(job.id, f"New fine-tuned model created: {job.fine_tuned_model}")
        return self.move(
            job,
            TuningStatus.SUCCEEDED,
            "The job has successfully completed",
            sources=(TuningStatus.RUNNING,),
            results=results,
            evaluation=evaluation,
        )

    def n_bytes(self, tenant: str) -> int:
        """Return the bytes of the checkpoints of the tenant's unfinished jobs. Any thread."""
        with self._transaction() as db:
            (n,) = db.execute(
                "SELECT coalesce(sum(n_bytes), 0) FROM fine_tuning_job "
                "WHERE tenant = ? AND NOT has_ended",
                (tenant,),
            ).fetchone()
        return int(n)

    def reserve(
        self, job: TuningJob, *, n_bytes: int, n_tokens: int, max_tokens: int | None
    ) -> None:
        """Count bytes on disk and tokens for the job. Raises ApiError (403) for too many tokens.

        ``max_tokens`` limits the tokens of the tenant's jobs of the last 24 hours.
        """
        with self._transaction() as db:
            (n_others,) = db.execute(
                "SELECT coalesce(sum(n_tokens), 0) FROM fine_tuning_job "
                "WHERE tenant = ? AND created > ? AND id != ?",
                (job.caller.tenant, int(time.time()) - _DAY_S, job.id),
            ).fetchone()
            if max_tokens is not None and n_others + n_tokens > max_tokens:
                raise ApiError(
                    403,
                    f"max_training_tokens: the job would train {n_tokens:,} tokens, and this "
                    f"tenant has {max(0, max_tokens - n_others):,} of {max_tokens:,} a day left; "
                    "use fewer epochs or examples, or wait",
                    code="quota_exceeded",
                    param="training_file",
                )
            db.execute(
                "UPDATE fine_tuning_job SET n_bytes = ?, n_tokens = ? WHERE id = ?",
                (n_bytes, n_tokens, job.id),
            )

    def _of_job(
        self, table: str, tenant: str, job_id: str, limit: int, after: str | None
    ) -> tuple[list[dict[str, object]], bool]:
        with self._transaction() as db:
            row_by_id(db, _JOB, tenant, job_id, "fine_tuning_job_id")
            rows = page(db, table, job_id, limit, after)
        shown = _event_json if table == _EVENT else _checkpoint_json
        return [shown(row) for row in rows[:limit]], len(rows) > limit


def _delete_old(db: sqlite3.Connection, tenant: str) -> None:
    """Delete the tenant's ended jobs beyond the newest ``_N_KEPT`` jobs. Their results stay."""
    rows = db.execute(
        "SELECT id, has_ended FROM fine_tuning_job WHERE tenant = ? ORDER BY number DESC "
        "LIMIT -1 OFFSET ?",
        (tenant, _N_KEPT),
    ).fetchall()
    for row in rows:
        if row["has_ended"]:
            _delete(db, row["id"])


def _delete(db: sqlite3.Connection, job_id: str) -> None:
    db.execute("DELETE FROM fine_tuning_job WHERE id = ?", (job_id,))
    db.execute("DELETE FROM fine_tuning_event WHERE job_id = ?", (job_id,))
    db.execute("DELETE FROM fine_tuning_checkpoint WHERE job_id = ?", (job_id,))


def _write(db: sqlite3.Connection, job: TuningJob) -> None:
    db.execute(
        "UPDATE fine_tuning_job SET status = ?, details = ? WHERE id = ?",
        (job.status.value, _details(job), job.id),
    )


def _add_event(
    db: sqlite3.Connection,
    job_id: str,
    message: str,
    *,
    level: str = "info",
    data: Mapping[str, object] | None = None,
) -> None:
    db.execute(
        "INSERT INTO fine_tuning_event (id, job_id, created, level, message, step, data) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            *(f"ftevent-{uuid.uuid4().hex}", job_id, int(time.time()), level, message),
            *((data or {}).get("step"), json_text(data or {})),
        ),
    )


def _event_json(row: sqlite3.Row) -> dict[str, object]:
    return {
        "id": row["id"],
        "object": "fine_tuning.job.event",
        "created_at": row["created"],
        "level": row["level"],
        "message": row["message"],
        "type": "message" if row["step"] is None else "metrics",
        "data": orjson.loads(row["data"]),
    }


def _checkpoint_json(row: sqlite3.Row) -> dict[str, object]:
    return {
        "id": row["id"],
        "object": "fine_tuning.job.checkpoint",
        "created_at": row["created"],
        "fine_tuned_model_checkpoint": row["name"],
        "fine_tuning_job_id": row["job_id"],
        "step_number": row["step"],
        "metrics": orjson.loads(row["metrics"]),
    }


def _details(job: TuningJob) -> str:
    return json_text({k: v for k, v in asdict(job).items() if k not in _IN_COLUMNS})


def _job_of(row: sqlite3.Row) -> TuningJob:
    details = orjson.loads(row["details"])
    details["result_files"] = tuple(details["result_files"])
    return TuningJob(
        id=row["id"],
        caller=BatchCaller(row["key_id"], row["tenant"]),
        training_file=row["training_file"],
        validation_file=row["validation_file"],
        status=TuningStatus(row["status"]),
        created=row["created"],
        **details,
    )
