# The image that launch/gke.sh and launch/xpk.sh run: this checkout, what requirements.txt pins, JAX for one kind of
# device, and gcsfs. It has been read and checked by a test, never built: where it was written, no registry of images
# can be reached.
#   docker build --build-arg DEVICE=tpu -t us-docker.pkg.dev/PROJECT/REPOSITORY/tfusion:TAG .
#   docker push us-docker.pkg.dev/PROJECT/REPOSITORY/tfusion:TAG
FROM python:3.12.11-slim-bookworm

# cpu, tpu or gpu (CUDA 13; a driver older than 580 needs DEVICE=cuda12)
ARG DEVICE=tpu
# Whom it runs as. UID=0 is root, where a node pool hands its devices to root alone.
ARG UID=1000

RUN useradd --create-home --non-unique --uid "$UID" tfusion
WORKDIR /tfusion
RUN chown "$UID" /tfusion

# In a layer of their own: a change of the code installs nothing anew.
COPY requirements.txt /tmp/requirements/
COPY launch/requirements.txt /tmp/requirements/launch.txt
RUN case "$DEVICE" in \
      cpu) jax='' ;; \
      tpu) jax=tpu ;; \
      gpu) jax=cuda13 ;; \
      cuda12) jax=cuda12 ;; \
      *) echo "error: DEVICE=$DEVICE; choices: cpu, tpu, gpu, cuda12" >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir -r /tmp/requirements/requirements.txt -r /tmp/requirements/launch.txt \
      "$(sed -n "s/^jax==/jax${jax:+[$jax]}==/p" /tmp/requirements/requirements.txt)" \
    && python -c 'import jax, gcsfs'

COPY --chown=$UID . .
USER $UID
# Also where this is not the working directory: python -m tfusion.train
ENV PYTHONPATH=/tfusion PYTHONUNBUFFERED=1
RUN python -c 'import tfusion.train'
ENTRYPOINT ["python", "-m"]
CMD ["tfusion.train", "--help"]
