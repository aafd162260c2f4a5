"""Names that vLLM's command line and environment carry between the processes of an engine."""

from __future__ import annotations

WORKER = "vllm_kvcached.worker.ElasticWorker"
SCHEDULER = "vllm_kvcached.scheduler.ElasticScheduler"

# Set in the first process of an engine and inherited by its other processes. A part of the instance name,
# by which scheduler and workers find each other in the ledger.
RUN_VARIABLE = "_KVCACHED_RUN"
