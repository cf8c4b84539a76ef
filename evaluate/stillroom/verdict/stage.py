"""The verdict stage: join what was measured, judge it, write verdict.json, report.html and the plots. No torch."""

from __future__ import annotations

from stillroom.artifact import environment
from stillroom.stage import Job, StageResult
from stillroom.verdict.join import build_verdict
from stillroom.verdict.report import write_report
from stillroom.verdict.verdict import VERDICT_FILE


def run(job: Job) -> StageResult:
    """Judge the variants in `job.inputs`; a failed gate is a result, not an error."""
    verdict = build_verdict(job.config, job.inputs, environment(), job.seed)
    (job.out_dir / VERDICT_FILE).write_text(verdict.model_dump_json(indent=2) + "\n", encoding="utf-8")
    write_report(verdict, job.out_dir)
    job.progress.log(verdict.sentence)
    failed = [gate.gate for gate in verdict.gates if gate.status == "fail"]
    return StageResult(details={"passed": verdict.passed, "sentence": verdict.sentence, "failed_gates": failed})
