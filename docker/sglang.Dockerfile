# SGLang's official image plus the elastic KV cache. Build from the root of the checkout, after `make wheels`:
#   docker build -f docker/sglang.Dockerfile -t sglang-kvcached:0.1.0 .
ARG SGLANG_VERSION=v0.5.23
FROM lmsysorg/sglang:${SGLANG_VERSION}
ARG CUDA=cuda13
COPY build/dist/*.whl /tmp/wheels/
RUN pip install --no-cache-dir --find-links /tmp/wheels "sglang-kvcached[${CUDA}]" \
    && rm -r /tmp/wheels
ENV KVCACHED_RUNTIME_DIR=/run/kvcached ENABLE_KVCACHED=true
ENTRYPOINT ["python3", "-m", "sglang.launch_server"]
