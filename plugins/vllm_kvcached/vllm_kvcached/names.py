<<<<<<< HEAD
"""Names that vLLM's command line and environment carry between the processes of an engine."""
=======
"""Names by which vLLM and the processes of an engine find this plugin's classes and each other."""
>>>>>>> 39707db (The start and vLLM's plugin in plain English; names.py ends the plugin's import circle)

from __future__ import annotations

WORKER = "vllm_kvcached.worker.ElasticWorker"
SCHEDULER = "vllm_kvcached.scheduler.ElasticScheduler"

<<<<<<< HEAD
# Set in the first process of an engine and inherited by the others: part of the name by which they meet.
=======
# Set in the first process of an engine and inherited by the others: a part of the engine's instance name.
>>>>>>> 39707db (The start and vLLM's plugin in plain English; names.py ends the plugin's import circle)
RUN_VARIABLE = "_KVCACHED_RUN"
