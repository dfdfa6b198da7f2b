"""Joining a Ray cluster, for whoever runs work there."""

from __future__ import annotations

import logging
import os
from typing import Any


def join_cluster(ray: Any, address: str | None, **alone: Any) -> None:
    """Join the cluster at an address; without one, that which is found, or a new one here.

    Args:
        ray: The package.
        address: Of the cluster; None for RAY_ADDRESS, the one that is found, or a new one.
        **alone: Options of ray.init for a new one on this machine.

    Raises:
        ConnectionError: No cluster answers at the address that was asked for.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address=address or "auto", **quiet)
        return
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        if address is not None or "RAY_ADDRESS" in os.environ:
            where = address or os.environ["RAY_ADDRESS"]
            reason = (str(error).splitlines() or [""])[0]
            raise ConnectionError(
                f"address {where!r}: no Ray cluster answers there ({reason}); "
                "start one with `ray start --head`"
            ) from error
    ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", **alone, **quiet)
