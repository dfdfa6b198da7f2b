"""Signals in loader processes: those for the whole job are the trainer's to answer."""

from __future__ import annotations

import os
import signal
import threading


def shield_worker(worker_id: int) -> None:
    """Ignore stopping signals in a loader process, except its own trainer's.

    SLURM and terminals signal every process of a job. A worker that died of it would take the
    training down before it can save; the trainer stops its workers itself when it is done.

    Args:
        worker_id: Number of the worker, unused.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(trainer: int) -> None:
    """End with SIGTERM of the trainer; whoever else sends one is not answered."""
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == trainer or os.getppid() != trainer:
            os._exit(128 + signal.SIGTERM)
