# An image with kvctl only: no engine, no CUDA. Build from the root of the checkout, after `make wheels`:
#   docker build -f docker/kvctl.Dockerfile -t kvctl:0.1.0 .
FROM python:3.13-slim
COPY build/dist/*.whl /tmp/wheels/
RUN pip install --no-cache-dir --find-links /tmp/wheels kvctl \
    && rm -r /tmp/wheels
ENV KVCACHED_RUNTIME_DIR=/run/kvcached
ENTRYPOINT ["kvctl"]
