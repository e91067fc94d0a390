# Images of stepgraph: `docker build --target cpu .` or `--target cuda`; see docs/container.md, and `make image`.
#
# Compilers stay behind in the stages that build. At run time there is none, as nothing needs one: the kernels for CPUs are compiled
# ahead, for three kinds of them; those for GPUs are compiled at the first start by Triton, which brings its compiler, but for one
# module that talks with the driver, which is compiled here.

ARG PYTHON_IMAGE=python:3.12-slim-bookworm


FROM ${PYTHON_IMAGE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/stepgraph
ENV PATH=/opt/stepgraph/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt ./


FROM build AS build-cpu
# torch first, and alone: it is most of the image, and stays in the builder's cache while the source changes
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url "${TORCH_INDEX}" --constraint constraints.txt torch
COPY . .
ARG COMMIT
# xgrammar declares triton, whose 640 MiB nothing uses without a GPU
RUN STEPGRAPH_COMMIT="${COMMIT}" pip install --constraint constraints.txt '.[server,tracing]' && pip uninstall --yes triton
WORKDIR /
RUN python -m stepgraph.native && stepgraph pull smollm2


FROM build AS build-cuda
RUN pip install --constraint constraints.txt torch triton
COPY . .
ARG COMMIT
RUN STEPGRAPH_COMMIT="${COMMIT}" pip install --constraint constraints.txt '.[server,tracing,cuda]'
WORKDIR /
RUN python -m stepgraph.platforms.kernel_cache && stepgraph pull smollm2


FROM ${PYTHON_IMAGE} AS runtime
# tini is process 1: it hands signals on, from the first moment, and takes leave of processes whose parents are gone
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --user-group --create-home stepgraph \
    && install --directory --owner=stepgraph --group=stepgraph --mode=700 /home/stepgraph/.cache
ENV PATH=/opt/stepgraph/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/home/stepgraph \
    XDG_CACHE_HOME=/home/stepgraph/.cache \
    HF_HOME=/home/stepgraph/.cache/huggingface \
    TRITON_CACHE_DIR=/home/stepgraph/.cache/triton
# a number, so that an orchestrator can see that it is not root
USER 1000:1000
WORKDIR /home/stepgraph
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["tini", "--", "stepgraph"]
CMD ["serve", "--host", "0.0.0.0"]
ARG COMMIT
ARG VERSION
LABEL org.opencontainers.image.title="stepgraph" \
      org.opencontainers.image.description="LLM inference in which every step is one launch of one captured graph" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"


FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/stepgraph /opt/stepgraph


FROM runtime AS cpu
COPY --from=build-cpu /opt/stepgraph /opt/stepgraph
