"""I12: preemption for a floor does not change a request's output, with and without steps in flight."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from vllm.v1.outputs import ModelRunnerOutput

from kvcached_core.scheduler.floor_grace import FLOOR_GRACE_SECONDS
from tests.vllm.elastic import Engine, running
from tests.vllm.engines import request, vllm_config


class Pipeline:
    """Steps in flight, as in asynchronous scheduling, of a model whose next token depends on the position."""

    def __init__(self, engine: Engine, depth: int) -> None:
        self.engine = engine
        self.depth = depth
        self._flying: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self.stale = 0

    @staticmethod
    def token(name: str, place: int) -> int:
        """Return the token at this position of a request."""
        return (int(name.rpartition("-")[2]) * 31 + place * 7) % 500

    def step(self) -> None:
        """Schedule one step; answer the oldest step once more than `depth` are in flight."""
        scheduler = self.engine.scheduler
        output = self.engine.begin_step(grant=not self.engine.memory._governor.target)
        names = list(output.num_scheduled_tokens)
        requests = [scheduler.requests[name] for name in names]
        # A chunk that ends before the last known token samples no token.
        tokens = [
            [] if each.is_prefill_chunk else [self.token(each.request_id, each.num_computed_tokens)]
            for each in requests
        ]
        places = {name: at for at, name in enumerate(names)}
        self._flying.append(
            (output, ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=tokens))
        )
        self.stale += sum(bool(each.num_stale_output_tokens) for each in scheduler.waiting)
        while len(self._flying) >= self.depth:
            self._land()

    def _land(self) -> None:
        output, answer = self._flying.popleft()
        for outputs in self.engine.scheduler.update_from_output(output, answer).values():
            for each in outputs.outputs:
                self.engine.tokens.setdefault(each.request_id, []).extend(each.new_token_ids)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_i12_outputs_of_preempted_requests_do_not_change(
    tmp_path_factory: pytest.TempPathFactory, depth: int
) -> None:
    config = vllm_config(tmp_path_factory.mktemp("model"))
    config.scheduler_config.async_scheduling = depth > 1
    with running(config) as engine:
        pipeline = Pipeline(engine, depth)
        requests = [request(30 + 17 * at, 90) for at in range(6)]
        prompts = {each.request_id: each.num_prompt_tokens for each in requests}
        for each in requests:
            engine.scheduler.add_request(each)
        for step in range(2000):
            if not engine.scheduler.has_unfinished_requests():
                break
            must = (0, 9, 0, 4, 0, 14, 2)[step // 7 % 7]  # granules; 0: no engine asks
            engine.ask(target=must, must=must)
            engine.now += FLOOR_GRACE_SECONDS / 3
            pipeline.step()
        assert not engine.scheduler.has_unfinished_requests()
        assert engine.scheduler._kv_demand.preemptions > 6 and (depth == 1 or pipeline.stale > 0)
        for name, prompt in prompts.items():
            expected = [Pipeline.token(name, prompt + at) for at in range(90)]
            assert engine.tokens[name] == expected
