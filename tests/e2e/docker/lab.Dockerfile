# What SGLang's image is to docker/replica.Dockerfile, without SGLang: the lab's replica under SGLang's name.
ARG BALANCER_IMAGE=groundserve/balancer:test

# The balancer's packages are all that the lab needs.
# hadolint ignore=DL3006
FROM ${BALANCER_IMAGE}
COPY e2e/docker/stand_in /opt/lab
COPY lab /opt/lab/tests/lab
ARG LAB_VERSION=1
ENV PYTHONPATH=/opt/lab \
    LAB_VERSION=${LAB_VERSION}
