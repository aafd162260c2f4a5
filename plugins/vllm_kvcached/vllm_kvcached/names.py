"""Names that vLLM's command line and environment carry between the processes of an engine."""

from __future__ import annotations

WORKER = "vllm_kvcached.worker.ElasticWorker"
SCHEDULER = "vllm_kvcached.scheduler.ElasticScheduler"

# Set in the first process of an engine and inherited by the others: part of the name by which they meet.
RUN_VARIABLE = "_KVCACHED_RUN"
