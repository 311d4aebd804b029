# The replica image for machines without a GPU: real SGLang on the CPU, with both embedded models in the image.
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS sglang
WORKDIR /build
COPY replica/requirements-cpu.lock replica/requirements-torch.txt ./
# An extra package index for torch alone: PyTorch's own has builds without CUDA, a tenth of the size.
ARG TORCH_INDEX=
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --quiet --root-user-action=ignore --no-deps --require-hashes -r requirements-cpu.lock \
    && PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" pip install --quiet --root-user-action=ignore -r requirements-torch.txt

FROM ${PYTHON_IMAGE} AS package
WORKDIR /build
COPY pyproject.toml LICENSE ./
COPY replica replica
# An empty README is enough: with the real one, each change to it would rebuild the image and replace every replica.
RUN --mount=type=cache,target=/root/.cache/pip \
    touch README.md && pip install --quiet --root-user-action=ignore --no-deps --target /opt/groundserve .

# Half a gigabyte and a minute, spent once here: replicas then start without a network, and scaling waits only for SGLang.
# Only the files of replica/ that build models are copied, so that other changes do not rebuild them.
FROM sglang AS models
WORKDIR /build
COPY replica/__init__.py replica/command.py replica/families.py replica/gpu.py replica/lock_file.py replica/media.py \
     replica/models.py replica/options.py replica/own_address.py replica/plugin.py replica/presets.py \
     replica/scratch.py replica/sharing.py replica/tiny_llava.py replica/
RUN MODELS_DIR=/opt/models python3 -m replica.models \
    && chmod -R a+rX /opt/models

FROM sglang
LABEL org.opencontainers.image.title="groundserve replica on a CPU" \
      org.opencontainers.image.description="SGLang on a plain CPU, with two small models" \
      org.opencontainers.image.version="0.2.0.dev0" \
      org.opencontainers.image.licenses="Apache-2.0"
# Mode 1777, like /tmp: any user that the container runs as may write there, and so may later users of the volumes. Empty,
# because containers that start together on a new volume would all copy these folders into it at once, and fail.
RUN mkdir -p /home/groundserve/.cache /huggingface /leases \
    && chmod 1777 /home/groundserve /home/groundserve/.cache /huggingface /leases
COPY --from=models /opt/models /opt/models
COPY --from=package /opt/groundserve /opt/groundserve
COPY docker/healthcheck.py /opt/groundserve/
WORKDIR /home/groundserve
ENV PYTHONPATH=/opt/groundserve \
    PYTHONUNBUFFERED=1 \
    HOME=/home/groundserve \
    USER=groundserve \
    REPLICA_DEVICE=cpu \
    REPLICA_HOST=0.0.0.0 \
    HF_HOME=/huggingface \
    LEASE_DIR=/leases \
    MODELS_DIR=/opt/models
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-I", "-S", "/opt/groundserve/healthcheck.py", "8000", "/ready"]
ENTRYPOINT ["python3", "-m", "replica"]
