# vLLM's official image plus the elastic KV cache. Build from the root of the checkout, after `make wheels`:
#   docker build -f docker/vllm.Dockerfile -t vllm-kvcached:0.1.0 .
ARG VLLM_VERSION=v0.32.0
FROM vllm/vllm-openai:${VLLM_VERSION}
ARG CUDA=cuda13
COPY build/dist/*.whl /tmp/wheels/
RUN pip install --no-cache-dir --find-links /tmp/wheels "vllm-kvcached[${CUDA}]" \
    && rm -r /tmp/wheels
ENV KVCACHED_RUNTIME_DIR=/run/kvcached
# The official image's entry point plus the backend. Arguments after the image's name go to vllm serve.
ENTRYPOINT ["vllm", "serve", "--kv-cache-backend", "kvcached"]
