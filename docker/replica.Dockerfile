# The node image for NVIDIA GPUs: SGLang's own image, and replica/.
ARG SGLANG_IMAGE=lmsysorg/sglang:v0.5.23
ARG PYTHON_IMAGE=python:3.11-slim

# As an installed package, because SGLang finds our plug-in by its entry points; in a folder of its own, because
# then nothing hangs on how Python is set up in SGLang's image.
FROM ${PYTHON_IMAGE} AS package
WORKDIR /build
COPY pyproject.toml LICENSE ./
COPY replica replica
# An empty README will do: with the real one every change of it would make another image, and replace every replica.
RUN --mount=type=cache,target=/root/.cache/pip \
    touch README.md && pip install --quiet --root-user-action=ignore --no-deps --no-compile --target /opt/groundserve .

# hadolint ignore=DL3006
FROM ${SGLANG_IMAGE}
LABEL org.opencontainers.image.title="groundserve replica" \
      org.opencontainers.image.description="SGLang on a GPU of its own" \
      org.opencontainers.image.version="0.2.0.dev0" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 0:0
# 1777, as /tmp: whoever the container runs as may write there, and so may the volumes' later users. Empty, because
# containers that start together on a new volume would all fill it from here, and fall over each other.
RUN mkdir -p /home/groundserve/.cache /huggingface /leases \
    && chmod 1777 /home/groundserve /home/groundserve/.cache /huggingface /leases
COPY --from=package /opt/groundserve /opt/groundserve
COPY docker/healthcheck.py /opt/groundserve/
WORKDIR /home/groundserve
# USER too: torch asks for the user's name, and this one is in no passwd file.
ENV PYTHONPATH=/opt/groundserve${PYTHONPATH:+:$PYTHONPATH} \
    PYTHONUNBUFFERED=1 \
    HOME=/home/groundserve \
    USER=groundserve \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    REPLICA_DEVICE=cuda \
    REPLICA_HOST=0.0.0.0 \
    HF_HOME=/huggingface \
    LEASE_DIR=/leases \
    MODELS_DIR=/huggingface/groundserve \
    TRITON_CACHE_DIR=/home/groundserve/.cache/triton
USER 1000:1000
EXPOSE 8000
# /ready, never /health: a failed /health makes SGLang exit without draining.
HEALTHCHECK --interval=5s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "-I", "-S", "/opt/groundserve/healthcheck.py", "8000", "/ready"]
ENTRYPOINT ["python3", "-m", "replica"]
