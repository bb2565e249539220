# SEDAC in a container, three images from one file (BuildKit):
#   docker build -t sedac:cpu .                          engine and control service on a CPU, the demo model inside
#   docker build -t sedac:control --target control .     the control service and `sedac ctl` alone, without torch
#   docker build -t sedac:cuda --target cuda .           engine on an NVIDIA GPU; pinned and configured, but not built or run by the tests
#
# Behind a proxy with its own certificates:   --secret id=ca,src=/etc/ssl/certs/ca-certificates.crt
# With a pip configuration of your own:       --secret id=pip_conf,src=$HOME/.config/pip/pip.conf
# With wheels that no index of yours has:     put them into constraints/wheels/
# None of the three leaves a trace in the image.
#
# To run one:   docker run --init --shm-size 1g -p 127.0.0.1:8000:8000 -p 127.0.0.1:50051:50051 sedac:cpu
# It stands --read-only --tmpfs /tmp --cap-drop ALL; what it keeps lies in the volumes /var/lib/sedac and /var/cache/sedac.
# docker-compose.yml does it all.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04

FROM ${PYTHON_IMAGE} AS python
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    PIP_FIND_LINKS=/wheels \
    PATH=/opt/sedac/bin:$PATH

# The sedac wheel, the demo's files in it; pip and hatchling stay behind here.
FROM python AS package
RUN python3 -m venv /opt/sedac
COPY constraints/*.txt /build/constraints/
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=bind,source=constraints/wheels,target=/wheels \
    pip install --constraint /build/constraints/tools.txt --constraint /build/constraints/cpu.txt hatchling
COPY pyproject.toml README.md LICENSE /build/
COPY service /build/service
COPY probes /build/probes
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /dist /build

# Dependencies only: the wheel is installed in the final stage, so that a change of code makes one layer, of the wheel alone.
FROM python AS control-venv
RUN python3 -m venv /opt/sedac
COPY constraints/cpu.txt pyproject.toml /build/
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=bind,source=constraints/wheels,target=/wheels \
    python -c 'import tomllib; print(*tomllib.load(open("/build/pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >/build/needs.txt \
    && pip install --constraint /build/cpu.txt --requirement /build/needs.txt

FROM python AS cpu-venv
RUN python3 -m venv /opt/sedac
COPY constraints/install.py constraints/cpu.txt /build/
ARG TORCH_INDEX=
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=bind,source=constraints/wheels,target=/wheels \
    python /build/install.py --torch-index "${TORCH_INDEX}" /build/cpu.txt

# vLLM for CUDA at pinned versions; torch and the CUDA libraries come from the package index, the driver from the host. `sedac serve` serves
# the demo model inside CUDA graphs here, without its draft, which they can't hold. Tests take this target's command line through vLLM's
# configuration and hold its pins against what vLLM asks for; none builds or runs it.
FROM ${CUDA_IMAGE} AS cuda
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PATH=/opt/sedac/bin:$PATH
RUN python3 -m venv /opt/sedac
COPY constraints/cuda.txt /build/
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=bind,source=constraints/wheels,target=/wheels \
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_FIND_LINKS=/wheels pip install --no-cache-dir --no-deps --requirement /build/cuda.txt
RUN --mount=type=bind,from=package,source=/dist,target=/dist pip install --no-cache-dir --no-deps /dist/*.whl && pip check
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/cache/sedac sedac \
    && install -d -o sedac -g sedac /var/lib/sedac /var/cache/sedac
ENV HOME=/var/cache/sedac \
    XDG_CACHE_HOME=/var/cache/sedac \
    XDG_CONFIG_HOME=/var/cache/sedac/config \
    HF_HOME=/var/cache/sedac/huggingface \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    SEDAC_CONTROL_HOST=0.0.0.0 \
    SEDAC_CONTROL_INSECURE=1 \
    SEDAC_CONTROL_METRICS_HOST=0.0.0.0 \
    SEDAC_CONTROL_DATABASE=/var/lib/sedac/control.sqlite3
USER 10001:10001
WORKDIR /var/lib/sedac
VOLUME ["/var/lib/sedac", "/var/cache/sedac"]
EXPOSE 8000 50051 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=600s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["sedac"]
CMD ["serve", "--host", "0.0.0.0"]
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sedac" \
      org.opencontainers.image.description="Serve a language model through vLLM and spend less computing on the tokens that need less" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"

# What both images for a CPU run on: uid 10001, a read-only root file system, two writable folders.
FROM ${PYTHON_IMAGE} AS runtime
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/cache/sedac sedac \
    && install -d -o sedac -g sedac /var/lib/sedac /var/cache/sedac
# Inside a container the services listen on every interface; what is published, and where, is the operator's choice. SEDAC_CONTROL_INSECURE=1
# lets the control service do so without TLS: whoever publishes its port beyond loopback sets SEDAC_CONTROL_TLS_CERT, _TLS_KEY and
# _PRINCIPALS (files in a volume), and SEDAC_CONTROL_INSECURE=0, which refuses to start without them.
ENV PATH=/opt/sedac/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/sedac \
    SEDAC_CONTROL_HOST=0.0.0.0 \
    SEDAC_CONTROL_INSECURE=1 \
    SEDAC_CONTROL_METRICS_HOST=0.0.0.0 \
    SEDAC_CONTROL_DATABASE=/var/lib/sedac/control.sqlite3
WORKDIR /var/lib/sedac
STOPSIGNAL SIGTERM
ENTRYPOINT ["sedac"]

FROM runtime AS control
COPY --from=control-venv /opt/sedac /opt/sedac
RUN --mount=type=bind,from=package,source=/dist,target=/dist pip install --no-cache-dir --no-deps /dist/*.whl
USER 10001:10001
VOLUME ["/var/lib/sedac"]
EXPOSE 50051 9464
HEALTHCHECK --interval=5s --timeout=6s --start-period=60s --retries=3 \
    CMD ["python", "-m", "sedac.control.server.health"]
CMD ["control"]
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sedac" \
      org.opencontainers.image.description="SEDAC's control service: policies for engines, over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"

FROM runtime AS cpu
# vLLM's kernels load libnuma. Its torch.compile calls a C++ compiler when the engine starts, and what that compiles includes Python.h, which
# a PYTHON_IMAGE with a distribution's Python has in a package of its own.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 \
        $(python3 -c 'import pathlib, sysconfig; print("" if pathlib.Path(sysconfig.get_path("include"), "Python.h").exists() else "python3-dev")') \
    && rm -rf /var/lib/apt/lists/*
COPY --from=cpu-venv /opt/sedac /opt/sedac
RUN --mount=type=bind,from=package,source=/dist,target=/dist pip install --no-cache-dir --no-deps /dist/*.whl \
    && python -m sedac.engine.backends.build
# Compiled graphs are loaded as libraries, so their folder is a volume: a tmpfs is mounted noexec by default.
ENV XDG_CACHE_HOME=/var/cache/sedac \
    XDG_CONFIG_HOME=/var/cache/sedac/config \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/sedac/inductor \
    HF_HOME=/var/cache/sedac/huggingface \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1
USER 10001:10001
VOLUME ["/var/lib/sedac", "/var/cache/sedac"]
EXPOSE 8000 50051 9464
HEALTHCHECK --interval=10s --timeout=6s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
CMD ["serve", "--host", "0.0.0.0"]
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sedac" \
      org.opencontainers.image.description="Serve a language model through vLLM and spend less computing on the tokens that need less" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
