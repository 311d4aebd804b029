# The replica image for NVIDIA GPUs: SGLang's own image plus replica/.
ARG SGLANG_IMAGE=lmsysorg/sglang:v0.5.23
ARG PYTHON_IMAGE=python:3.11-slim

# Installed as a package, because SGLang finds our plug-in by its entry points; in a folder of its own, so that nothing
# depends on how Python is set up in SGLang's image.
FROM ${PYTHON_IMAGE} AS package
WORKDIR /build
COPY pyproject.toml LICENSE ./
COPY replica replica
# An empty README is enough: with the real one, each change to it would rebuild the image and replace every replica.
RUN --mount=type=cache,target=/root/.cache/pip \
    touch README.md && pip install --quiet --root-user-action=ignore --no-deps --no-compile --target /opt/groundserve .

# hadolint ignore=DL3006
FROM ${SGLANG_IMAGE}
LABEL org.opencontainers.image.title="groundserve replica" \
      org.opencontainers.image.description="SGLang on a GPU of its own" \
      org.opencontainers.image.version="0.2.0.dev0" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 0:0
# Mode 1777, like /tmp: any user that the container runs as may write there, and so may later users of the volumes. Empty,
# because containers that start together on a new volume would all copy these folders into it at once, and fail.
RUN mkdir -p /home/groundserve/.cache /huggingface /leases \
    && chmod 1777 /home/groundserve /home/groundserve/.cache /huggingface /leases
COPY --from=package /opt/groundserve /opt/groundserve
COPY docker/healthcheck.py /opt/groundserve/
WORKDIR /home/groundserve
# USER is set because torch looks up the user's name, and this user has no passwd entry.
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
# /ready, never /health: after a failed /health SGLang exits without draining.
HEALTHCHECK --interval=5s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "-I", "-S", "/opt/groundserve/healthcheck.py", "8000", "/ready"]
ENTRYPOINT ["python3", "-m", "replica"]
