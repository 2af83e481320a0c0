"""Progress of the study: jobs and core-hours, done and left."""

from examples.study.jobs import Job


def progress(jobs: list[Job], rows: list[dict]) -> str:
    """[done/all, CPU time spent, CPU time left], left by the estimates, scaled by what the finished jobs took."""
    spent = {row["job"]: row["cpu_seconds"] for row in rows}
    done = [job for job in jobs if job.name in spent]
    # A kind of job at a time: an estimate may be right for trainings and wrong for attacks.
    left = sum(_left(jobs, spent, what) for what in dict.fromkeys(job.what for job in jobs))
    used = sum(spent.values()) / 3600
    return f"[{len(done)}/{len(jobs)} jobs, {used:.2f} core-hours spent, about {left / 3600:.2f} left]"


def _left(jobs: list[Job], spent: dict[str, float], what: str) -> float:
    """CPU seconds that the jobs of a kind will still take."""
    own = [job for job in jobs if job.what == what]
    done = [job for job in own if job.name in spent]
    estimate = sum(job.seconds for job in own if job.name not in spent)
    ratio = sum(spent[job.name] for job in done) / sum(job.seconds for job in done) if done else 1.0
    return estimate * ratio
