# groundserve with kubectl: the controller of a service on Kubernetes (groundserve manifests).
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
COPY balancer/requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --quiet --root-user-action=ignore --prefix=/install --ignore-installed --no-deps --require-hashes -r requirements.lock
COPY balancer /opt/groundserve/balancer
# The root file system is read-only at run time, so Python cannot compile anything later.
RUN python3 -m compileall -q /opt/groundserve/balancer

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="groundserve controller" \
      org.opencontainers.image.description="Keeps a service on Kubernetes as it is wanted" \
      org.opencontainers.image.version="0.2.0.dev0" \
      org.opencontainers.image.licenses="Apache-2.0"
# hadolint ignore=DL3008
RUN apt-get update -q && apt-get install -y -q --no-install-recommends kubernetes-client && rm -rf /var/lib/apt/lists/*
COPY --from=build /install/lib /usr/local/lib
COPY --from=build /opt/groundserve/balancer /opt/groundserve/balancer
WORKDIR /opt/groundserve
ENV PYTHONUNBUFFERED=1
# For people: kubectl exec deploy/NAME-controller -- groundserve status
COPY --chmod=755 docker/groundserve /usr/local/bin/
USER 1000:1000
ENTRYPOINT ["python3", "-m", "balancer.cli"]
